"""Bulk work: rows in order, each once, alike for all batch sizes and numbers of workers; files that survive kills."""

import csv
import io
import json
import os
import sys
from collections import Counter
from contextlib import redirect_stdout
from itertools import count, islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bulk_fixtures import make_images
from filelock import FileLock
from PIL import Image

from mue_hf import MuEForConditionalGeneration, MuEImageProcessorPil, MuEProcessor, cli
from mue_hf.inference.bulk import CAPTION_COLUMNS, bulk_rows
from mue_hf.inference.journal import Journal
from mue_hf.inference.sources import Row, Source

PRESET = {"exit_preset": "balanced"}
REASONS = {
    "truncated": "complete image|Pillow can read",
    "text": "no known format",
    "empty": "no known format",
    "bomb": "at most 134,217,728 pixels",
    "postscript": "PostScript",
    "missing": "must exist",
}


@pytest.fixture(scope="module")
def model(checkpoint):
    return MuEForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def processor(checkpoint):
    return MuEProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return folder, make_images(folder, 23, 0.4, seed=5)


@pytest.fixture(scope="module")
def listed(images):
    """A list of them, those that are missing too."""
    folder, made = images
    path = folder / "list.txt"
    path.write_text("".join(f"{name}\n" for name in made), encoding="utf-8")
    return path


@pytest.fixture
def caption(checkpoint, tmp_path, capsys):
    """Runs `mue-hf caption ... --out` in float64 and returns exit code, rows and what was written to stderr."""

    def run(*arguments, out="out.jsonl", workers=0):
        fixed = ["--model", checkpoint, "--dtype", "float64", "--workers", workers, "--out", tmp_path / out]
        code = cli.main(["caption", *map(str, [*arguments, *fixed])])
        path = tmp_path / out
        lines = path.read_text(encoding="utf-8").splitlines() if code < 2 and out.endswith(".jsonl") else []
        return code, [json.loads(line) for line in lines], capsys.readouterr()

    return run


class TestRows:
    def test_each_row_once_in_order_with_its_reason(self, caption, images, listed):
        code, rows, _ = caption(listed)
        assert code == 1
        assert [row["row"] for row in rows] == list(range(23))
        assert [row["image"] for row in rows] == list(images[1])
        assert len({row["caption"] for row in rows}) > 3
        for row, damage in zip(rows, images[1].values(), strict=True):
            assert (row["caption"] is None) == (row["error"] is not None) == (damage is not None)
            if damage is not None:
                assert any(reason in row["error"] for reason in REASONS[damage].split("|")), row

    def test_batches_and_workers_change_nothing(self, caption, listed):
        columns = ["--columns", "image_exit_layers,text_exit_layers,decoder_exit_layers,layers_skipped,flops_skipped"]
        _, expected, _ = caption(listed, *columns, "--batch-size", 1)
        for index, (batch_size, workers) in enumerate([(4, 0), (16, 2)]):
            _, rows, _ = caption(listed, *columns, "--batch-size", batch_size, out=f"{index}.jsonl", workers=workers)
            assert rows == expected

    def test_rows_say_what_generate_says(self, model, processor, images):
        folder, made = images
        good = [str(folder / name) for name, damage in made.items() if damage is None][:3]
        options = {"image_exit_threshold": 0.5, "decoder_exit_threshold": 0.9, "num_beams": 2}
        totals = Counter()
        work = {"options": options, "columns": CAPTION_COLUMNS, "batch_size": 2, "workers": 0, "totals": totals}
        rows = list(bulk_rows(model, processor, (Row(7 + i, path, path) for i, path in enumerate(good)), **work))
        assert [row["row"] for row in rows] == [7, 8, 9] and [row["batch_size"] for row in rows] == [2, 2, 1]
        for row in rows:
            inputs = processor(images=row["image"]).to(torch.float64)
            output = model.generate(**inputs, **options, return_dict_in_generate=True)
            assert row["caption"] == processor.post_process_image_text_to_text(output.sequences)[0]
            assert row["decoder_exit_layers"] == output.decoder_exit_layers[0].tolist()
            assert (row["image_exit_layers"], row["text_exit_layers"]) == (output.image_exit_layers[0], 3)
            assert row["seconds"] > 0 and 0 <= row["flops_skipped"] < 1 and row["error"] is None
        assert totals["rows"] == 3 and totals["bad"] == 0 and 0 < totals["ran"] <= totals["full"]

    def test_one_caption_for_each_row_whatever_is_saved(self, model, processor, images, monkeypatch):
        folder, made = images
        rows = [Row(n, folder / name) for n, name in enumerate(name for name, bad in made.items() if bad is None)][:4]
        expected = list(bulk_rows(model, processor, rows, options={"num_beams": 2}, workers=0))
        for name in ("num_beams", "num_return_sequences"):
            monkeypatch.setattr(model.generation_config, name, 2)
        assert list(bulk_rows(model, processor, rows, workers=0)) == expected
        assert len({row["caption"] for row in expected}) > 2

    def test_shapes_wait_for_each_other(self, checkpoint, model):
        """Images of two sizes run in batches of their own, and no row waits for ever."""
        tokenizer = MuEProcessor.from_pretrained(checkpoint).tokenizer
        processor = MuEProcessor(MuEImageProcessorPil(do_resize=False), tokenizer)
        small, large = (Image.linear_gradient("L").resize((side, side)) for side in (32, 64))
        pictures = [large, *[small] * 12, large]
        rows = (Row(number, picture, str(number)) for number, picture in enumerate(pictures))
        columns = ["batch_size", "image_exit_layers"]
        results = list(bulk_rows(model, processor, rows, columns=columns, batch_size=2, workers=0))
        assert [row["image"] for row in results] == [str(number) for number in range(14)]
        assert [row["batch_size"] for row in results] == [1, *[2] * 12, 1]

    def test_a_row_that_the_model_refuses_is_a_bad_row(self, checkpoint, model):
        """Its batch mates are not."""
        tokenizer = MuEProcessor.from_pretrained(checkpoint).tokenizer
        processor = MuEProcessor(MuEImageProcessorPil(do_resize=False), tokenizer)
        wide = Image.linear_gradient("L").resize((2000, 32))
        rows = [Row(number, picture) for number, picture in enumerate([wide, wide.resize((32, 32)), wide])]
        results = list(bulk_rows(model, processor, rows, workers=0))
        assert [row["error"] is None for row in results] == [False, True, False]
        assert "image_bucket_size" in results[0]["error"]

    def test_memory_is_flat(self, model, processor):
        """Rows are read as they are needed: an endless source gives its first results."""
        picture, read = Image.new("RGB", (8, 8)), []
        rows = (read.append(number) or Row(number, picture) for number in count())
        results = list(islice(bulk_rows(model, processor, rows, batch_size=4, workers=0), 10))
        assert [row["row"] for row in results] == list(range(10))
        assert len(read) <= 16

    def test_a_crashing_decoder_costs_one_row(self, model, processor, images):
        folder, made = images
        good = next(str(folder / name) for name, damage in made.items() if damage is None)
        rows = [Row(0, good), Row(1, Crash()), Row(2, good), Row(3, None, fault="`image` must hold an image.")]
        results = list(bulk_rows(model, processor, rows, workers=1))
        assert [row["row"] for row in results] == [0, 1, 2, 3]
        assert results[0]["caption"] == results[2]["caption"] is not None
        assert "crash" in results[1]["error"] and results[3]["error"] == "`image` must hold an image."

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"task": "caption"}, "`task` must be one of"),
            ({"batch_size": 0}, "`batch_size` must be at least 1"),
            ({"workers": -1}, "`workers` must be at least 0"),
            ({"columns": ["depth"]}, r"`columns` must be among .* got \['depth'\]"),
            ({"columns": ["scores"]}, "`columns` must be among"),
            ({"options": {"exit_preset": "nosuch"}}, "`exit_preset` must name a preset"),
            ({"options": {"exit_criterian": "never"}}, "did you mean `exit_criterion`"),
            ({"options": {"num_beens": 2}}, "num_beens"),
            ({"options": {"num_return_sequences": 2, "num_beams": 2}}, "`num_return_sequences` must be 1"),
            ({"task": "entailment", "options": {"num_beams": 2}}, "`options` of entailment must be exit options"),
            ({"task": "vqa"}, "`answers` must be given for vqa"),
            ({"task": "vqa", "answers": ["a", "a"]}, "`answers` must differ"),
        ],
        ids=lambda value: None,
    )
    def test_bad_arguments_are_refused_before_a_row_is_read(self, model, processor, arguments, message):
        def rows():
            pytest.fail("a row was read")
            yield

        with pytest.raises(ValueError, match=message):
            bulk_rows(model, processor, rows(), **{"workers": 0} | arguments)


class Crash:
    """An image that ends the process that unpacks it."""

    def __reduce__(self):
        return os._exit, (1,)


class TestFiles:
    def test_a_finished_file_is_left_alone(self, caption, listed, tmp_path):
        code, rows, _ = caption(listed)
        stamp = (tmp_path / "out.jsonl").stat().st_mtime_ns
        assert caption(listed)[:2] == (code, rows)
        assert (tmp_path / "out.jsonl").stat().st_mtime_ns == stamp
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]

    @pytest.mark.parametrize(
        "tear",
        [
            lambda part: part.write_bytes(part.read_bytes()[:-9]),
            lambda part: part.write_bytes(part.read_bytes()[:-1]),
            lambda part: part.write_bytes(part.read_bytes() + b'{"row": 11, "image": "000'),
            lambda part: part.write_bytes(part.read_bytes() + b"\0" * 64 + b"\n"),
            lambda part: part.write_bytes(part.read_bytes() + b'{"row": 17, "image": null, "error": null}\n'),
            lambda part: part.write_bytes(b""),
            lambda part: part.unlink(),
        ],
        ids=["torn line", "no newline", "half a line", "zeros", "a gap", "empty", "lost"],
    )
    @pytest.mark.parametrize("end", ["jsonl", "parquet"])
    def test_goes_on_where_it_was(self, caption, listed, tmp_path, monkeypatch, tear, end):
        _, expected, _ = caption(listed, out="whole.jsonl")
        out = tmp_path / f"out.{end}"

        def killed(journal, records):
            append(journal, records)
            if journal.counts["rows"] > 10:
                raise KeyboardInterrupt

        append = Journal.append
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", killed)
            assert caption(listed, "--batch-size", 3, out=out.name)[0] == 130
        assert not out.exists()
        tear(tmp_path / f"{out.name}.part")
        # Another batch size does not matter.
        code, rows, output = caption(listed, "--batch-size", 5, "--json", out=out.name)
        summary = json.loads(output.out)
        assert (
            code == 1
            and summary["rows"] == 23
            and summary["bad"] == sum(row["error"] is not None for row in rows or expected)
        )
        assert (pq.read_table(out).to_pylist() if end == "parquet" else rows) == expected
        assert not (tmp_path / f"{out.name}.part").exists()

    def test_killed_between_counts_and_result(self, caption, listed, tmp_path, monkeypatch):
        _, expected, _ = caption(listed, out="whole.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr("mue_hf.inference.journal.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            patch.setattr("mue_hf.inference.journal.write_whole", lambda path, content: path.write_text(content))
            assert caption(listed)[0] == 130
        code, rows, _ = caption(listed)
        assert (code, rows) == (1, expected)

    def test_killed_between_result_and_tidying(self, caption, listed, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(
                "mue_hf.inference.journal.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            patch.setattr("mue_hf.inference.journal.write_whole", lambda path, content: path.write_text(content))
            assert caption(listed, out="out.parquet")[0] == 130
        assert (tmp_path / "out.parquet").exists() and (tmp_path / "out.parquet.part").exists()
        assert caption(listed, out="out.parquet")[0] == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "out.parquet.run.json"]

    @pytest.mark.parametrize("content", ["{}", "[]", '{"settings": 1}', "{", ""])
    def test_a_damaged_record_of_the_run(self, caption, listed, tmp_path, content):
        (tmp_path / "out.jsonl.run.json").write_text(content)
        code, _, output = caption(listed)
        assert code == 2 and "must hold the settings of a run as JSON" in output.err

    def test_a_file_that_the_run_has_not_made(self, caption, listed, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert caption(listed)[0] == 130
        (tmp_path / "out.jsonl").write_text("precious\n")
        code, _, output = caption(listed)
        assert code == 2 and "`out` must be new, or made by such a run" in output.err
        assert (tmp_path / "out.jsonl").read_text() == "precious\n"

    @pytest.mark.parametrize("name", ["row", "image", "caption", "error", "seconds"])
    def test_kept_columns_take_no_name_of_a_result(self, caption, listed, tmp_path, name):
        table = tmp_path / "table.jsonl"
        table.write_text(json.dumps({"image": "a.png", "row": 9, "caption": "b", "error": "c", "seconds": "d"}))
        code, _, output = caption(table, "--keep", name, out="out.parquet")
        assert code == 2 and f"must not name columns that results have of their own, got ['{name}']" in output.err
        assert not (tmp_path / "out.parquet.part").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--preset", "paper-captioning"], "options {'exit_preset': 'balanced'} there"),
            (["--columns", "seconds"], r"columns \[\] there, \['seconds'\] now"),
            (["--dtype", "float32"], "dtype 'torch.float64' there"),
        ],
        ids=["preset", "columns", "dtype"],
    )
    def test_other_settings_are_refused(self, caption, checkpoint, listed, tmp_path, arguments, message, capsys):
        assert caption(listed)[0] == 1
        command = ["caption", str(listed), "--model", str(checkpoint), "--out", str(tmp_path / "out.jsonl")]
        fixed = [] if "--dtype" in arguments else ["--dtype", "float64"]
        assert cli.main([*command, "--workers", "0", *fixed, *arguments]) == 2
        assert message.replace("\\", "") in capsys.readouterr().err

    def test_overwrite(self, caption, listed):
        caption(listed)
        code, rows, _ = caption(listed, "--overwrite", "--columns", "seconds")
        assert code == 1 and all("seconds" in row for row in rows)

    def test_a_changed_source_is_refused(self, caption, listed, images, tmp_path, monkeypatch):
        names = tmp_path / "names.txt"
        lines = [f"{images[0] / name}\n" for name in images[1]]
        names.write_text("".join(lines))
        monkeypatch.setattr(Journal, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert caption(names)[0] == 130
        names.write_text("".join(lines[3:]))
        code, _, output = caption(names)
        assert code == 2 and "the source has changed; restore it" in output.err

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("out.txt", "`out` must end in .jsonl or .parquet"),
            ("none/out.jsonl", "`out` must be in a folder that exists"),
            ("there.jsonl", "`out` must be new, or made by such a run"),
        ],
    )
    def test_bad_files(self, caption, listed, tmp_path, out, message):
        (tmp_path / "there.jsonl").write_text("precious\n")
        code, _, output = caption(listed, out=out)
        assert code == 2 and message in output.err
        assert (tmp_path / "there.jsonl").read_text() == "precious\n"

    def test_parquet_without_its_extra(self, caption, listed, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        code, _, output = caption(listed, out="out.parquet")
        assert code == 2 and "parquet needs the extra `train`" in output.err

    def test_two_runs_do_not_share_a_file(self, caption, listed, tmp_path):
        with FileLock(tmp_path / "out.jsonl.lock"):
            code, _, output = caption(listed)
        assert code == 2 and "another process is writing" in output.err

    def test_parquet_types(self, caption, tmp_path):
        Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
        kept = [("n", 1), ("x", 0.5), ("mixed", 3), ("flag", True), ("text", "\udcff")]
        rows = [{"image": "a.png", **dict(kept)}, {"image": "none.png", "n": None, "x": 1, "mixed": "three"}]
        table = tmp_path / "table.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = ["--columns", ",".join(CAPTION_COLUMNS), "--keep", ",".join(name for name, _ in kept)]
        assert caption(table, *columns, out="out.parquet")[0] == 1
        result = pq.read_table(tmp_path / "out.parquet")
        kinds = dict(zip(result.schema.names, map(str, result.schema.types), strict=True))
        assert kinds["decoder_exit_layers"].startswith("list<") and kinds["seconds"] == "double"
        assert [kinds[name] for name, _ in kept] == ["int64", "double", "string", "bool", "string"]
        assert result["mixed"].to_pylist() == ["3", "three"] and result["text"].to_pylist() == ["\\udcff", None]


class TestSources:
    @pytest.fixture
    def place(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("b/2.jpg", "b/10.jpg", "a.png", "b/a/3.PNG", "B.webp"):
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (len(name), 9, 9)).save(path)
        (tmp_path / "photos" / "notes.md").write_text("not an image")
        return tmp_path

    def names(self, *sources, **options):
        source = Source([str(one) for one in sources], **options)
        rows = list(source.rows())
        assert source.total in (None, len(rows))
        assert [row.number for row in rows] == list(range(len(rows)))
        return [row.name for row in rows]

    def test_folder(self, place):
        expected = ["photos/B.webp", "photos/a.png", "photos/b/10.jpg", "photos/b/2.jpg", "photos/b/a/3.PNG"]
        assert self.names("photos") == expected
        assert self.names("photos/b/", "photos/a.png") == [
            "photos/b/10.jpg",
            "photos/b/2.jpg",
            "photos/b/a/3.PNG",
            "photos/a.png",
        ]

    def test_list(self, place):
        (place / "photos" / "list.txt").write_bytes(b"a.png\r\n\nhttp://host/x.png\nb/2.jpg\n\xff.png")
        rows = list(Source(["photos/list.txt"]).rows())
        assert [row.name for row in rows] == ["a.png", "http://host/x.png", "b/2.jpg", "\\udcff.png"]
        assert [row.image for row in rows][:2] == [os.path.join("photos", "a.png"), "http://host/x.png"]
        assert os.fsencode(rows[3].image) == b"photos/\xff.png"
        assert next(Source(["photos/list.txt"], image_root="elsewhere").rows()).image == os.path.join(
            "elsewhere", "a.png"
        )

    def test_json_lines(self, place):
        lines = [
            '{"image": "a.png", "id": 1}',
            "",
            '{"image": ',
            "[1]",
            '"text"',
            '{"id": 2}',
            '{"image": ""}',
            "[" * 99999,
        ]
        (place / "table.jsonl").write_text("\n".join(lines))
        source = Source(["table.jsonl"])
        rows = list(source.rows(keep=["id"]))
        assert source.columns == ["image", "id"] and source.total == len(rows) == 7
        assert [row.name for row in rows] == ["a.png", *[None] * 4, "", None]
        assert [row.fields["id"] for row in rows] == [1, None, None, None, 2, None, None]
        assert [row.fault is None for row in rows] == [True, *[False] * 6]
        assert "line 3 must be JSON" in rows[1].fault
        assert [row.fault for row in rows[2:4]] == [f"line {line} must be a JSON object." for line in (4, 5)]

    @pytest.mark.parametrize("name", ["list.txt", "table.jsonl", "table.csv"])
    def test_a_byte_order_mark_is_no_part_of_the_first_name(self, place, name):
        first = {"list.txt": "a.png\n", "table.jsonl": '{"image": "a.png"}\n', "table.csv": "image\na.png\n"}[name]
        (place / name).write_text(first, encoding="utf-8-sig")
        assert self.names(name) == ["a.png"]

    def test_csv(self, place):
        with open("table.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [["file_name", "id"], ["a.png", "1", "beyond"], ["b/2.jpg"], ["x" * 200000, "3"]]
            )
        rows = list(Source(["table.csv"]).rows(keep=["id"]))
        assert [row.name for row in rows][:2] == ["a.png", "b/2.jpg"]
        assert [row.fields["id"] for row in rows] == ["1", None, None]
        assert "must be CSV" in rows[2].fault

    def test_parquet(self, place):
        content = (place / "photos" / "a.png").read_bytes()
        pq.write_table(
            pa.Table.from_pylist([{"image": {"bytes": content, "path": "a.png"}}, {"image": None}]), "one.parquet"
        )
        pq.write_table(pa.Table.from_pylist([{"path": "photos/a.png"}]), "two.parquet")
        rows = list(Source(["one.parquet"]).rows())
        assert [(row.image, row.name, row.fault is None) for row in rows] == [
            (content, "a.png", True),
            (None, None, False),
        ]
        assert [row.image for row in Source(["two.parquet"]).rows()] == [os.path.join(".", "photos/a.png")]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["empty"], "must be a folder with images"),
            (["none.txt"], "`source` must exist"),
            (["/none"], "`source` must exist"),
            (["broken.parquet"], "must be a parquet file|Parquet"),
            (["bare.jsonl"], "must be a table with rows, got none in bare.jsonl: line 2 must be a JSON object. Fix"),
            (["bad.jsonl"], "must be a table with rows, got none in bad.jsonl: line 1 must be JSON, .* Fix the file"),
            (["nothing.csv"], "must be a table with rows, got none in nothing.csv: it has no lines. Fix the file"),
            (["other.jsonl"], "`image_column` must be given"),
            (["photos", "other.jsonl"], "`image_column` must be given"),
        ],
        ids=lambda value: None,
    )
    def test_bad_sources(self, place, names, message):
        (place / "empty").mkdir()
        (place / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
        (place / "bare.jsonl").write_text("\n[1]\n")
        (place / "bad.jsonl").write_text('{"image": "a.png",')
        (place / "nothing.csv").write_text("")
        (place / "other.jsonl").write_text('{"picture": "a.png"}\n')
        with pytest.raises(ValueError, match=message):
            Source(names).rows()

    def test_unknown_columns(self, place):
        source = Source(["photos"])
        for arguments in ({"image_column": "x"}, {"keep": ["x"]}, {"texts": {"text": "x"}}):
            with pytest.raises(ValueError, match=r"must name a column, got 'x' among \['image'\]"):
                source.rows(**arguments)

    def test_dataset(self, place, monkeypatch):
        """What `datasets` streams, its images as the bytes that they are."""
        import datasets

        stored = datasets.Dataset.from_dict(
            {"image": ["photos/a.png", "photos/b/2.jpg"], "id": [1, 2]},
            features=datasets.Features({"image": datasets.Image(), "id": datasets.Value("int64")}),
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: stored.to_iterable_dataset())
        rows = list(Source(["org/photos"]).rows(keep=["id"]))
        assert [row.fields["id"] for row in rows] == [1, 2] and rows[0].name.endswith("a.png")


class TestAnswers:
    @pytest.fixture
    def answer(self, checkpoint, capsys):
        def run(*arguments):
            fixed = ["--model", checkpoint, "--dtype", "float64", "--workers", "0"]
            code = cli.main(["answer", *map(str, [*arguments, *fixed])])
            return code, capsys.readouterr()

        return run

    @pytest.fixture
    def pairs(self, images, tmp_path):
        """Rows with and without a premise, and some that cannot be used."""
        folder, made = images
        good = [str(folder / name) for name, damage in made.items() if damage is None]
        rows = [
            {"image": good[0], "hypothesis": "two dogs", "premise": None, "id": "a"},
            {"image": good[1], "hypothesis": "a cat", "premise": "animals", "id": "b"},
            {"image": good[1], "hypothesis": "...", "premise": None, "id": "c"},
            {"image": "none.png", "hypothesis": "a cat", "premise": None, "id": "d"},
            {"image": good[2], "premise": "no hypothesis", "id": "e"},
            {"image": good[2], "hypothesis": "a long row of words", "premise": None, "id": "f"},
        ]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path, rows

    @pytest.mark.parametrize("batch_size", [1, 16])
    def test_entailment(self, answer, pairs, model, processor, batch_size):
        path, rows = pairs
        columns = ["--columns", "scores,decoder_exit_layers,layers_skipped", "--keep", "id"]
        code, output = answer(path, *columns, "--batch-size", batch_size)
        results = [json.loads(line) for line in output.out.splitlines()]
        assert code == 1 and "3 of 6 rows could not be used" in output.err
        assert [row["id"] for row in results] == list("abcdef")
        assert [row["error"] is None for row in results] == [True, True, False, False, False, True]
        answers = ["yes", "no", "maybe"]
        for given, row in zip(rows, results, strict=True):
            if row["error"] is None:
                texts = {name: given[name] for name in ("hypothesis", "premise")}
                inputs = processor(images=given["image"], task="entailment", **texts).to(torch.float64)
                scores = model.score_answers(processor.encode_answers(answers), **inputs, exit_preset="balanced")[0]
                assert row["scores"] == pytest.approx(scores.tolist(), abs=1e-9)
                assert row["answer"] == answers[scores.argmax()] and row["hypothesis"] == given["hypothesis"]
                assert row["decoder_exit_layers"] == [1] and row["layers_skipped"] > 0

    def test_the_summary_says_what_was_counted(self, answer, caption, pairs, listed, tmp_path):
        """Layers for answers, FLOPs for captions; the old key stays."""
        _, output = answer(pairs[0], "--out", tmp_path / "answers.jsonl", "--json")
        summary = json.loads(output.out)
        assert 0 < summary["layers_skipped"] == summary["compute_skipped"] < 1 and "flops_skipped" not in summary
        _, output = answer(pairs[0], "--out", tmp_path / "more.jsonl")
        assert f"{summary['layers_skipped']:.0%} of layers skipped" in output.out
        _, _, output = caption(listed, "--json")
        summary = json.loads(output.out)
        assert 0 < summary["flops_skipped"] == summary["compute_skipped"] < 1 and "layers_skipped" not in summary
        assert f"{summary['flops_skipped']:.0%} of FLOPs skipped" in caption(listed, out="others.jsonl")[2].out

    def test_names_that_are_no_text(self, answer, tmp_path):
        path = tmp_path / "table.jsonl"
        path.write_text(json.dumps({"image": "\udcff.png", "hypothesis": "a"}))
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as out:
            assert answer(path)[0] == 1
            out.flush()
        assert b"udcff.png" in out.buffer.getvalue()

    def test_questions(self, answer, images, model, processor, tmp_path):
        folder, made = images
        good = [folder / name for name, damage in made.items() if damage is None][:3]
        with open(tmp_path / "questions.csv", "w", newline="") as file:
            csv.writer(file).writerows([["image", "question"], *[[path, f"What is on {path.stem}"] for path in good]])
        (tmp_path / "answers.txt").write_text("a cat, or two\na dog\n\nneither\n")
        out = tmp_path / "out.parquet"
        arguments = ["--answers", f"@{tmp_path / 'answers.txt'}", "--generate", "exit_criterion=never", "--out", out]
        assert answer(tmp_path / "questions.csv", *arguments)[0] == 0
        answers = ["a cat, or two", "a dog", "neither"]
        for row, path in zip(pq.read_table(out).to_pylist(), good, strict=True):
            inputs = processor(images=path, task="vqa", text=row["question"]).to(torch.float64)
            scores = model.score_answers(processor.encode_answers(answers), **inputs, exit_criterion="never")[0]
            assert row["answer"] == answers[scores.argmax()]

    @pytest.mark.parametrize(
        ("columns", "arguments", "message"),
        [
            (["image"], [], "`--hypothesis-column` or `--question-column` must be given for entailment"),
            (["image", "question"], [], "`answers` must be given for vqa"),
            (
                ["image", "question"],
                ["--task", "entailment"],
                "must be given for entailment, got none of the usual names",
            ),
            (["image", "question", "hypothesis"], [], "`--task` must be given"),
            (["image", "hypothesis"], ["--answers", "a,a"], "`answers` must differ"),
            (["image", "hypothesis"], ["--generate", "num_beams=2"], "must be exit options"),
            (["image", "hypothesis"], ["--premise-column", "x"], "`premise_column` must name a column"),
        ],
        ids=lambda value: None,
    )
    def test_bad_input(self, answer, tmp_path, columns, arguments, message):
        path = tmp_path / "table.jsonl"
        path.write_text(json.dumps(dict.fromkeys(columns, "a")))
        code, output = answer(path, *arguments)
        assert code == 2 and message in output.err and output.out == ""


def test_sources_need_out(checkpoint, listed, capsys):
    assert cli.main(["caption", str(listed), "--model", str(checkpoint)]) == 2
    assert "`--out` must be given for a folder, a list or a table" in capsys.readouterr().err
