"""Audits of bulk work: which rows are run again, what they say, and what follows where the budget is refuted."""

import json
from collections import Counter

import pytest
import torch
from bulk_fixtures import BALANCED, make_checkpoint, make_images

from mue_hf import MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.calibration.presets import write_preset
from mue_hf.inference.audit import Audit, BudgetRefutedError, promised_budget
from mue_hf.inference.bulk import bulk_rows
from mue_hf.inference.journal import Journal
from mue_hf.inference.sources import Row

ROWS = 30
PROMISE = {"risk": "disagreement", "task": "captioning", "budget": 0.05}
# Thresholds that no layer reaches.
CAREFUL = {"image_exit_threshold": 2.0, "text_exit_threshold": 2.0, "decoder_exit_threshold": 2.0}


@pytest.fixture(scope="module")
def promising(tmp_path_factory):
    """A checkpoint with presets that promise something."""
    folder = make_checkpoint(tmp_path_factory.mktemp("promising"))
    write_preset(folder, "bold", BALANCED | PROMISE)
    write_preset(folder, "careful", CAREFUL | PROMISE)
    write_preset(folder, "beams", BALANCED | PROMISE | {"generation": {"num_beams": 2}})
    settings = {"num_beams": 2, "do_sample": False, "no_repeat_ngram_size": 1, "length_penalty": 1.0}
    settings |= {"max_new_tokens": 7, "batch_size": 16, "dtype": "float64"}
    write_preset(folder, "settings", BALANCED | PROMISE | {"certified_for": settings})
    write_preset(folder, "float32", BALANCED | PROMISE | {"certified_for": settings | {"dtype": "float32"}})
    write_preset(folder, "expected", BALANCED | PROMISE | {"guarantee": "expectation"})
    write_preset(folder, "metric", BALANCED | PROMISE | {"risk": "metric"})
    write_preset(folder, "compute", {**BALANCED, "risk": "disagreement", "task": "captioning", "compute": 0.6})
    write_preset(folder, "statements", BALANCED | PROMISE | {"task": "entailment"})
    return folder


@pytest.fixture(scope="module")
def model(promising):
    return MuEForConditionalGeneration.from_pretrained(promising, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def processor(promising):
    return MuEProcessor.from_pretrained(promising)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A list of images of which some are damaged."""
    folder = tmp_path_factory.mktemp("images")
    made = make_images(folder, ROWS, 0.1, seed=7)
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in made))
    return folder / "list.txt"


@pytest.fixture(scope="module")
def rows(images):
    names = images.read_text().split()
    return [Row(number, str(images.parent / name), name) for number, name in enumerate(names)]


@pytest.fixture
def run(model, processor, rows):
    """Rows of a bulk run under a preset, with an audit of some share, and the audit."""

    def go(preset, share=0.4, number=ROWS, batch_size=4, workers=0, **arguments):
        options = {"exit_preset": preset}
        audit = Audit(share, budget=promised_budget(model, processor, "captioning", options), **arguments)
        work = {"options": options, "batch_size": batch_size, "workers": workers, "audit": audit}
        return list(bulk_rows(model, processor, rows[:number], **work)), audit

    return go


@pytest.fixture
def caption(promising, images, tmp_path, capsys):
    """Runs `mue-hf caption ... --out` and returns exit code, rows (of the finished file) and output."""

    def go(*arguments, preset="bold", out="out.jsonl", source=images):
        path = tmp_path / out
        fixed = ["--model", promising, "--dtype", "float64", "--workers", 0, "--batch-size", 4, "--out", path]
        code = cli.main(["caption", *map(str, [source, *fixed, "--preset", preset, *arguments])])
        done = path.read_text().splitlines() if path.exists() and path.suffix == ".jsonl" else []
        return code, [json.loads(line) for line in done], capsys.readouterr()

    return go


def killed_after(number):
    """What stands in for `Journal.append` where the process is killed once so many rows are written."""
    append = Journal.append

    def killed(journal, records):
        append(journal, records)
        if journal.counts["rows"] >= number:
            raise KeyboardInterrupt

    return killed


class TestRows:
    def test_the_same_rows_whatever_the_batches_and_workers(self, run):
        expected, _ = run("bold", batch_size=1)
        assert 5 < sum(row["audited"] for row in expected) < 25
        for batch_size, workers in ((3, 0), (16, 2)):
            assert run("bold", batch_size=batch_size, workers=workers)[0] == expected

    def test_changed_is_what_full_depth_says(self, run, model, processor, rows):
        found, audit = run("bold", share=1.0, number=12)
        assert sum(row["error"] is not None for row in found) == sum(not row["audited"] for row in found) > 0
        full = list(bulk_rows(model, processor, rows[:12], options={"exit_criterion": "never"}, workers=0))
        for row, whole in zip(found, full, strict=True):
            assert row["changed"] == (None if row["error"] else row["caption"] != whole["caption"])
        assert audit.changed == sum(bool(row["changed"]) for row in found) > 5
        assert audit.rows == sum(row["audited"] for row in found)

    def test_exits_that_change_nothing(self, run):
        found, audit = run("careful")
        assert {row["changed"] for row in found if row["audited"]} == {False}
        summary = audit.summary()
        assert (summary["changed_share"], summary["refuted_at"], summary["interval"][0]) == (0.0, None, 0.0)

    def test_the_rows_themselves_stay_as_they_are(self, run, model, processor, rows):
        plain = list(bulk_rows(model, processor, rows, options={"exit_preset": "bold"}, workers=0))
        found, _ = run("bold", on_drift="warn", share=0.1)
        assert [{name: row[name] for name in plain[0]} for row in found] == plain
        assert {row["full_depth"] for row in found} == {False}

    def test_shares_and_seeds(self):
        numbers = range(20_000)
        for share in (0.02, 0.5):
            drawn = sum(map(Audit(share).draws, numbers))
            assert drawn == pytest.approx(share * 20_000, abs=4 * (20_000 * share * (1 - share)) ** 0.5)
        assert all(map(Audit(1.0).draws, numbers))
        one, other = ({n for n in numbers if Audit(0.1, seed=seed).draws(n)} for seed in (0, 1))
        assert len(one & other) == pytest.approx(200, abs=60)
        # A larger share holds the rows of a smaller one.
        assert one <= {n for n in numbers if Audit(0.2).draws(n)}

    def test_time_stands_apart(self, model, processor, rows):
        totals = Counter()
        work = {"options": {"exit_preset": "careful"}, "workers": 0, "columns": ["seconds"]}
        list(bulk_rows(model, processor, rows[:8], **work, totals=totals, audit=Audit(1.0)))
        assert totals["audit_seconds"] > 0
        assert totals["ran"] == pytest.approx(totals["full"])


class TestDrift:
    def test_warns_once(self, run):
        with pytest.warns(UserWarning, match=r"budget of 0.05 changed outputs is refuted after row \d+") as caught:
            found, audit = run("bold", share=1.0)
        assert len([one for one in caught if "refuted" in str(one.message)]) == 1
        assert len(found) == ROWS and {row["full_depth"] for row in found} == {False}
        assert audit.refuted_at is not None and audit.summary()["refuted_at"] == audit.refuted_at

    def test_stops_after_the_row(self, model, processor, rows):
        audit, found = Audit(1.0, budget=0.05, on_drift="stop"), []
        with pytest.raises(BudgetRefutedError, match="calibrate on images like these"):
            found.extend(bulk_rows(model, processor, rows, options=BALANCED, batch_size=4, workers=0, audit=audit))
        given = bulk_rows(model, processor, rows, options=BALANCED, batch_size=4, workers=0, audit=Audit(1.0))
        by_hand = Audit(1.0, budget=0.05, on_drift="stop")
        for row in given:
            by_hand.see(row)
            if by_hand.refuted_at is not None:
                break
        assert audit.refuted_at == by_hand.refuted_at == row["row"] < ROWS - 1

    def test_goes_on_at_full_depth(self, run, model, processor, rows):
        with pytest.warns(UserWarning, match="goes on at full depth"):
            found, audit = run("bold", share=1.0, batch_size=2, on_drift="full")
        full = list(bulk_rows(model, processor, rows, options={"exit_criterion": "never"}, workers=0))
        deep = [row["row"] for row in found if row["full_depth"]]
        assert len(deep) > 10 and min(deep) > audit.refuted_at
        for row, whole in zip(found, full, strict=True):
            if row["full_depth"]:
                assert row["caption"] == whole["caption"] and not row["audited"] and row["changed"] is None
        good = [row for row in found if row["error"] is None]
        # A few batches had begun.
        assert {row["full_depth"] for row in good if row["row"] > audit.refuted_at + 16} == {True}

    def test_a_budget_that_is_kept_changes_nothing(self, run):
        for on_drift in ("stop", "full"):
            found, audit = run("careful", share=1.0, on_drift=on_drift)
            assert len(found) == ROWS and audit.refuted_at is None and not any(row["full_depth"] for row in found)


class TestPromises:
    @pytest.mark.parametrize(
        ("task", "options", "answers", "budget"),
        [
            ("captioning", {"exit_preset": "bold"}, None, 0.05),
            ("captioning", {"exit_preset": "bold", "num_return_sequences": 1}, None, 0.05),
            ("captioning", {"exit_preset": "bold", "num_beams": 2}, None, None),
            ("captioning", {"exit_preset": "beams", "num_beams": 2}, None, 0.05),
            ("captioning", {"exit_preset": "beams"}, None, None),
            ("captioning", {"exit_preset": "bold", "decoder_exit_threshold": 0.1}, None, None),
            ("captioning", {"exit_preset": "settings", "num_beams": 2, "max_new_tokens": 7}, None, 0.05),
            ("captioning", {"exit_preset": "settings", "num_beams": 2}, None, None),
            ("captioning", {"exit_preset": "settings", "num_beams": 1, "max_new_tokens": 7}, None, None),
            (
                *("captioning", {"exit_preset": "settings", "num_beams": 2, "max_new_tokens": 7, "top_k": 5}),
                *(None, None),
            ),
            ("captioning", {"exit_preset": "float32", "num_beams": 2, "max_new_tokens": 7}, None, None),
            ("captioning", {"exit_preset": "expected"}, None, None),
            ("captioning", {"exit_preset": "metric"}, None, None),
            ("captioning", {"exit_preset": "compute"}, None, None),
            ("captioning", {"exit_preset": "statements"}, None, None),
            ("captioning", {"exit_preset": "paper-captioning"}, None, None),
            ("captioning", BALANCED, None, None),
            ("entailment", {"exit_preset": "statements"}, None, 0.05),
            ("entailment", {"exit_preset": "statements"}, ["maybe", "no", "yes"], 0.05),
            ("entailment", {"exit_preset": "statements"}, ["yes", "no"], None),
            ("vqa", {"exit_preset": "statements"}, ["yes", "no", "maybe"], None),
        ],
    )
    def test_what_is_promised(self, model, processor, task, options, answers, budget):
        assert promised_budget(model, processor, task, options, answers) == budget

    @pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
    def test_shares_out_of_range(self, share):
        with pytest.raises(ValueError, match=r"`audit` must be above 0 and at most 1, got"):
            Audit(share)

    def test_reactions(self):
        with pytest.raises(ValueError, match="`on_drift` must be one of"):
            Audit(0.1, budget=0.05, on_drift="ignore")
        for on_drift in ("stop", "full"):
            with pytest.raises(ValueError, match="needs a budget of changed outputs, got none"):
                Audit(0.1, on_drift=on_drift)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "`audit` needs exits, got none"),
            ({"exit_criterion": "never"}, "`audit` needs exits, got none"),
            ({**BALANCED, "do_sample": True}, "not sampled, got `do_sample=True`"),
        ],
    )
    def test_nothing_to_audit(self, model, processor, options, message):
        with pytest.raises(ValueError, match=message):
            bulk_rows(model, processor, (), options=options, workers=0, audit=Audit(0.1))


class TestFiles:
    def test_goes_on_after_a_kill(self, caption, monkeypatch):
        """Rows, counts and the moment of the refutation are those of a run that was left alone."""
        arguments = ["--audit", 0.5, "--audit-seed", 3, "--json"]
        with pytest.warns(UserWarning, match="is refuted after row"):
            _, expected, output = caption(*arguments, out="whole.jsonl")
        whole = json.loads(output.out)["audit"]
        assert whole["rows"] > 10 and 4 < whole["refuted_at"] < ROWS - 4 and whole["budget"] == 0.05
        for number in (4, whole["refuted_at"] + 4):
            with monkeypatch.context() as patch:
                patch.setattr(Journal, "append", killed_after(number))
                assert caption(*arguments, out=f"{number}.jsonl")[0] == 130
            with pytest.warns(UserWarning, match=f"is refuted after row {whole['refuted_at']}:"):
                _, rows, output = caption(*arguments, "--batch-size", 3, out=f"{number}.jsonl")
            assert rows == expected
            assert json.loads(output.out)["audit"] == whole
        # A finished file still knows.
        summary = json.loads(caption(*arguments, out="whole.jsonl")[2].out)
        assert summary["audit"] == whole and summary["audit_seconds"] == 0

    def test_stop_keeps_the_rows_and_full_goes_on(self, caption, tmp_path):
        code, _, output = caption("--audit", 1, "--on-drift", "stop")
        assert code == 3 and "mue-hf caption: stopped: the budget of 0.05 changed outputs is refuted" in output.err
        kept = (tmp_path / "out.jsonl.part").read_text().splitlines()
        last = json.loads(kept[-1])["row"]
        assert f"after row {last}:" in output.err and not (tmp_path / "out.jsonl").exists()
        # Again stops at once.
        assert caption("--audit", 1, "--on-drift", "stop")[0] == 3
        assert (tmp_path / "out.jsonl.part").read_text().splitlines() == kept
        with pytest.warns(UserWarning, match="goes on at full depth"):
            code, rows, output = caption("--audit", 1, "--on-drift", "full")
        assert code == 1 and len(rows) == ROWS and f"refuted after row {last}" in output.out
        good = [row for row in rows if row["error"] is None]
        assert [row["full_depth"] for row in good] == [row["row"] > last for row in good]

    @pytest.mark.parametrize("again", [["--audit", 0.6], ["--audit", 0.5, "--audit-seed", 1], []])
    def test_another_audit_is_refused(self, caption, again):
        assert caption("--audit", 0.5, preset="careful")[0] == 1
        code, _, output = caption(*again, preset="careful")
        assert code == 2 and "was begun with others: audit {'share': 0.5, 'seed': 0} there" in output.err

    def test_a_run_without_an_audit_has_none_of_it(self, caption, tmp_path):
        _, rows, output = caption("--json", preset="careful")
        assert not {"audited", "changed", "full_depth"} & rows[0].keys()
        assert '"audit' not in (tmp_path / "out.jsonl.run.json").read_text() + output.out

    def test_parquet(self, caption, tmp_path):
        import pyarrow.parquet as pq

        assert caption("--audit", 0.3, preset="careful", out="out.parquet")[0] == 1
        schema = pq.read_schema(tmp_path / "out.parquet")
        assert {str(schema.field(name).type) for name in ("audited", "changed", "full_depth")} == {"bool"}

    @pytest.mark.parametrize(
        ("preset", "arguments", "message"),
        [
            ("bold", ["--audit", 0], "`audit` must be above 0 and at most 1"),
            ("metric", ["--audit", 0.5, "--on-drift", "stop"], "needs a budget of changed outputs"),
            ("bold", ["--audit", 0.5, "--num-beams", 2, "--on-drift", "full"], "needs a budget of changed outputs"),
            ("bold", ["--audit", 0.5, "--generate", "do_sample=true"], "not sampled"),
            ("bold", ["--on-drift", "stop"], "`--audit` must be given with"),
            ("bold", ["--audit-seed", 0], "`--audit` must be given with"),
        ],
    )
    def test_bad_input(self, caption, preset, arguments, message, tmp_path):
        code, _, output = caption(*arguments, preset=preset)
        assert code == 2 and message in output.err and not list(tmp_path.glob("out.*"))

    def test_a_few_images_have_no_audit(self, promising, images, capsys):
        first = images.parent / images.read_text().split()[0]
        assert cli.main(["caption", str(first), "--model", str(promising), "--audit", "0.5"]) == 2
        assert "`--out` must be given with `--audit`" in capsys.readouterr().err

    def test_answers_as_lines(self, promising, images, tmp_path, capsys):
        names = images.read_text().split()[:9]
        table = tmp_path / "table.jsonl"
        lines = [json.dumps({"image": name, "hypothesis": f"a {name}"}) for name in names]
        table.write_text("\n".join(lines))
        command = ["answer", table, "--model", promising, "--preset", "statements", "--workers", 0, "--audit", 1]
        cli.main([str(word) for word in [*command, "--image-root", images.parent]])
        output = capsys.readouterr()
        rows = [json.loads(line) for line in output.out.splitlines()]
        audited = [row["changed"] for row in rows if row["audited"]]
        assert len(audited) == sum(row["error"] is None for row in rows) > 5
        assert f"{sum(audited)} of {len(audited)} audited rows changed" in output.err and "budget 0.05" in output.err
