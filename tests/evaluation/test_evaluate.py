"""`mue-hf evaluate` on a tiny checkpoint and generated scenes: records, resuming, settings, figures by hand."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import FIRST_PRESET, byte_checkpoint, tiny_config
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.data.features import trunk_fingerprint
from mue_hf.data.scenes import write_scenes
from mue_hf.evaluation.arguments import EvaluationArguments
from mue_hf.evaluation.depths import (
    depth_by_position,
    executed_layers,
    extremes,
    similarity_curves,
    token_oracle,
)
from mue_hf.evaluation.measure import Meter
from mue_hf.evaluation.plots import draw_plots
from mue_hf.evaluation.rows import ControlledRows, describe_rows, donors, load_rows
from mue_hf.evaluation.run import Evaluation
from mue_hf.evaluation.settings import known_sweeps, make_settings
from mue_hf.evaluation.signals import SignalRecorder
from mue_hf.evaluation.store import read_records
from mue_hf.evaluation.tables import describe_records, make_table
from mue_hf.inference.depths import expected_time_reduction
from mue_hf.inference.loading import load_checkpoint
from mue_hf.inference.predict import Prediction, predict
from mue_hf.metrics.words import words_baseline

FAST = ["--tokenizer", "plain", "--metrics", "bleu,cider", "--resamples", 20, "--time-rows", 0]
SHUFFLED_AND_ORACLE = ["--sweep", "similarity=0.5", "--shuffled-depths", "similarity 0.5", "--oracle"]
EXITS = {"image_exit_threshold": 0.9, "text_exit_threshold": 0.6, "decoder_exit_threshold": 0.5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny random model whose tokens are bytes."""
    return byte_checkpoint(tmp_path_factory.mktemp("checkpoint"), generation=FIRST_PRESET)


@pytest.fixture(scope="module")
def parts(checkpoint):
    model = MuEForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
    return model, MuEProcessor.from_pretrained(checkpoint)


@pytest.fixture
def evaluate(checkpoint, tmp_path, capsys):
    """Runs `mue-hf evaluate --json` on three generated scenes; returns the exit code, the records and stderr."""

    def run(task, *arguments, data="scenes:1:3"):
        fixed = ["--model", checkpoint, "--data", data, "--output", tmp_path / "out" / "points.jsonl", "--json"]
        code = cli.main(["evaluate", task, *map(str, fixed + FAST), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return run


def prediction(image_exit_layers, text_exit_layers, decoder_exit_layers, image_id="a", output="x"):
    return Prediction(
        image_exit_layers, text_exit_layers, decoder_exit_layers, image_id, output, decoder_exit_layers, 7, 0.1
    )


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--help"])
    assert stop.value.code == 0
    assert "mue-hf evaluate captioning" in capsys.readouterr().out.split("example", 1)[1]


def test_records_are_complete(evaluate, tmp_path):
    table = tmp_path / "table.md"
    code, records, _ = evaluate(
        *("captioning", "--preset", "first", "--time-rows", 2, "--time-repeats", 1, "--table", table)
    )
    assert code == 0
    full, first = records
    assert [record["name"] for record in records] == ["full depth", "first"]
    for record in records:
        assert record["task"] == "captioning" and record["rows"] == record["image_count"] == 3
        assert record["quality"].keys() == record["intervals"].keys()
        assert record["quality"].keys() >= {"bleu_4_plain", "cider_plain"}
        assert record["environment"]["versions"].keys() >= {"torch", "transformers"}
        assert record["time"]["seconds"] > 0 and record["time"]["rows"] == 2
        assert record["length"]["tokens"] == 4
        assert [place["outputs"] for place in record["depth_by_position"]] == [3] * 4
        assert len(record["easiest"]) == len(record["hardest"]) == 3
        assert list(record["samples"]) == ["best", "median", "worst"]
        scores = [one["cider_plain"] for one in record["samples"].values()]
        assert scores == sorted(scores, reverse=True) and sum(scores) / 3 == pytest.approx(
            record["quality"]["cider_plain"]
        )
        assert sum(record["flops"]["parts"].values()) == pytest.approx(record["flops"]["mean"])
    assert full["identical"] == 1 and full["difference"]["mean"] == 0
    change = first["quality"]["cider_plain"] - full["quality"]["cider_plain"]
    assert first["difference"]["mean"] == pytest.approx(change)
    assert full["depth"] == {"image": 3, "text": 3, "decoder": 4}
    assert full["flops"]["skipped"] == 0 and set(full["layers_skipped"].values()) == {0}
    assert first["depth"] == {"image": 1, "text": 3, "decoder": 1}
    # Three encoder and four decoder layers, of which image, text and every token ran 1, 3 and 1.
    assert first["layers_skipped"] == pytest.approx(
        {"mean": 1 - (2 + 1) / 7, "sum": 1 - (4 + 1) / 10, "without_text": 1 - (1 + 1) / 7}
    )
    assert 0 < first["flops"]["skipped"] < first["flops"]["skipped_without_trunk"] < 1
    assert first["depth_counts"]["decoder"] == {"1": 12} and first["executed"] == 1
    lines = table.read_text().splitlines()
    assert "| layers run a token |" in lines[0]
    assert "cider_plain" in lines[0] and lines[3].startswith("| first |")
    # all images have the same depth
    conditions, load, samples = filter(None, lines[4:])
    best = full["samples"]["best"]
    assert samples.startswith(f'Captions by cider_plain, full depth: best "{best["output"]}" (')
    assert conditions.startswith("Split test of scenes:1:3, 3 rows of 3 images; float32, ")
    assert f"torch {version('torch')}" in conditions and load.startswith("Load average between ")


def test_easiest_and_hardest_images():
    def output(image_id, image, decoder):
        return Prediction(image, 3, (decoder, decoder), image_id, "a", (5, 2), 4, 0.1)

    predictions = [output("b", 1, 2), output("a", 3, 2), output("c", 1, 1), output("b", 3, 4)]
    easiest, hardest = extremes(predictions, 2)
    assert easiest == [{"image_id": "c", "depth": 3.0}, {"image_id": "a", "depth": 5.0}]
    assert hardest == [{"image_id": "b", "depth": 5.5}, {"image_id": "a", "depth": 5.0}]
    record = {
        "name": "early",
        "criterion": "similarity",
        "source": {"split": "test", "data": "some.jsonl"},
        "rows": 4,
        "image_count": 3,
        "dtype": "float32",
        "environment": {"hardware": "a CPU", "device": "cpu", "threads": 2, "versions": {"torch": "2"}},
        "easiest": easiest,
        "hardest": hardest,
    }
    told = describe_records([record, record | {"name": "later"}])
    assert told.endswith("decoder; easiest: c (3.0), a (5.0); hardest: b (5.5), a (5.0).") and "later" not in told


def test_entailment_records(evaluate):
    code, records, _ = evaluate("entailment", "--sweep", "similarity-decoder=-2,2", "--batch-size", 5)
    assert code == 0
    full, early, never = records
    assert (full["rows"], full["image_count"]) == (24, 3)
    change = early["quality"]["accuracy"] - full["quality"]["accuracy"]
    assert early["difference"]["mean"] == pytest.approx(change)
    assert never["identical"] == 1 and never["quality"] == full["quality"]
    assert early["depth"]["decoder"] == 1 and early["depth"]["image"] == 3
    kinds = full["by_kind"]
    assert sum(kind["rows"] for kind in kinds.values()) == 24
    right = sum(kind["rows"] * kind["accuracy"] for kind in kinds.values())
    assert right / 24 == pytest.approx(full["quality"]["accuracy"])
    assert all(1 / 3 <= kind["base_rate"] <= 1 for kind in kinds.values())


def test_words_alone_stand_beside_the_model(evaluate, tmp_path):
    words = ["--words-baseline", "scenes:3:20", "scenes:4:20", "--table", tmp_path / "table.md"]
    _, (plain,), _ = evaluate("entailment")
    code, (record,), _ = evaluate("entailment", *words)
    assert code == 0 and "words" not in plain and plain["key"] != record["key"]
    told = record["words"]
    assert told["difference"]["mean"] == pytest.approx(record["quality"]["accuracy"] - told["accuracy"])
    assert told["interval"][0] <= told["accuracy"] <= told["interval"][1]
    kinds, by_kind = record["by_kind"], told["by_kind"]
    assert kinds.keys() == by_kind.keys()
    right = sum(kinds[kind]["rows"] * by_kind[kind]["accuracy"] for kind in kinds)
    assert right / 24 == pytest.approx(told["accuracy"])
    # they are the labels of the baseline
    taught = [row for seed in (3, 4) for row in load_rows("entailment", f"scenes:{seed}:20", "train")]
    rows = load_rows("entailment", "scenes:1:3", "test")
    texts = [[row["hypothesis"] for row in some] for some in (taught, rows)]
    labels = words_baseline(texts[0], [row["label"] for row in taught], texts[1])
    assert told["accuracy"] == sum(label == row["label"] for label, row in zip(labels, rows, strict=True)) / 24
    _, (other,), _ = evaluate("entailment", *words[:2])
    assert other["key"] != record["key"]
    code, _, error = evaluate("captioning", *words)
    assert code == 2 and "`words_baseline` belongs to entailment" in error
    code, _, error = evaluate("entailment", "--words-baseline", tmp_path / "no.jsonl")
    assert code == 2 and "`source` must exist" in error
    assert "| words alone | difference to words alone |" in (tmp_path / "table.md").read_text()


def test_points_of_a_sweep_are_what_their_names_say(evaluate, checkpoint, tmp_path):
    saved = tmp_path / "saved"
    shutil.copytree(checkpoint, saved)
    path = saved / "generation_config.json"
    options = {"exit_criterion": "fixed", "image_exit_layer": 1, "decoder_exit_layer": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    sweeps = ["--sweep", "similarity-decoder=2", "--sweep", "fixed", "--preset", "first"]
    code, records, _ = evaluate("captioning", "--model", saved, *sweeps)
    assert code == 0
    depths = {record["name"]: record["depth"] for record in records}
    assert depths["similarity-decoder 2"] == depths["full depth"] == {"image": 3, "text": 3, "decoder": 4}
    assert depths["fixed decoder 2"] == {"image": 3, "text": 3, "decoder": 2}
    assert depths["first"] == {"image": 1, "text": 3, "decoder": 1}
    file = tmp_path / "points.json"
    file.write_text(json.dumps({"mine": {"text_exit_threshold": 2.0}}))
    _, records, _ = evaluate("captioning", "--model", saved, "--sweep", file)
    assert records[1]["depth"] == {"image": 3, "text": 3, "decoder": 4}
    # one point without a sweep takes what is saved
    _, records, _ = evaluate("captioning", "--model", saved, "--generate", "text_exit_layer=2")
    assert records[1]["depth"] == {"image": 1, "text": 2, "decoder": 1}


def test_what_is_there_is_not_measured_again(evaluate, tmp_path, monkeypatch):
    _, (full, first), _ = evaluate("captioning", "--preset", "first")
    path = tmp_path / "out" / "points.jsonl"
    lines = path.read_text().splitlines()
    # An interrupted run: the second record was cut, its outputs are there.
    path.write_text(lines[0] + "\n" + lines[1][:50])
    monkeypatch.setattr("mue_hf.evaluation.run.predict", lambda *_, **__: pytest.fail("predicted again"))
    _, (same_full, again), _ = evaluate("captioning", "--preset", "first")
    assert same_full == full
    changing = {"measured_at", "measuring_seconds"}
    for record in (again, first):
        record["environment"].pop("load_average")
    assert {name: again[name] for name in again.keys() - changing} == {
        name: first[name] for name in first.keys() - changing
    }
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("captioning", ["--num-beams", 2]),
        ("captioning", ["--limit", 2]),
        ("captioning", ["--split", "dev"]),
        ("captioning", ["--resamples", 30]),
        ("entailment", ["--images", "shuffled"]),
        ("entailment", ["--images", "none"]),
        ("entailment", ["--prompt-type", "none"]),
    ],
    ids=["decoding", "rows", "split", "scoring", "shuffled", "no images", "prompt"],
)
def test_what_differs_is_measured_anew(task, change, evaluate, tmp_path):
    _, (one,), _ = evaluate(task)
    _, (other,), _ = evaluate(task, *change)
    assert one["key"] != other["key"]
    assert len(read_records(tmp_path / "out" / "points.jsonl")) == 2
    assert other["identical"] == 1
    if "none" in change and "--images" in change:
        assert other["depth"]["image"] == 0 and other["layers_skipped"]["without_text"] is None


def test_order_and_batches_do_not_matter(evaluate, tmp_path):
    _, one, _ = evaluate("entailment", "--sweep", "similarity=0.5,0.9")
    (tmp_path / "out").rename(tmp_path / "before")
    _, other, _ = evaluate("entailment", "--sweep", "similarity=0.9,0.5", "--batch-size", 3)
    assert {record["key"]: record["quality"] for record in one} == {
        record["key"]: record["quality"] for record in other
    }


def test_features_stand_for_images(evaluate, tmp_path):
    _, one, _ = evaluate("entailment", "--preset", "first", "--images", "shuffled")
    (tmp_path / "out").rename(tmp_path / "before")
    features = ["--features", tmp_path / "features"]
    _, other, _ = evaluate("entailment", "--preset", "first", "--images", "shuffled", *features)
    assert [record["quality"] for record in one] == [record["quality"] for record in other]


def test_shuffled_depths_and_oracle(evaluate):
    code, records, _ = evaluate("captioning", *SHUFFLED_AND_ORACLE, "--num-beams", 1)
    assert code == 0
    full, similar, shuffled, oracle = records
    assert shuffled["shuffled_depths_of"] == "similarity 0.5"
    for stream in ("image", "text"):
        assert shuffled["depth_counts"][stream] == similar["depth_counts"][stream]
    assert shuffled["depth_counts"]["decoder"].keys() <= similar["depth_counts"]["decoder"].keys()
    assert oracle["identical"] == 1 and oracle["quality"] == full["quality"] and oracle["time"] is None
    assert 1 <= oracle["depth"]["decoder"] <= 4 and oracle["depth"]["image"] == 3


def test_differences_to_another_point(evaluate):
    _, records, _ = evaluate("captioning", "--sweep", "similarity=-2,0.5", "--against", "similarity -2")
    full, early, _ = records
    assert early["difference"]["mean"] == 0 and early["against"] == "similarity -2"
    change = full["quality"]["cider_plain"] - early["quality"]["cider_plain"]
    assert full["difference"]["mean"] == pytest.approx(change)


def test_every_criterion_with_recorded_thresholds_and_plots(evaluate, tmp_path):
    plots = tmp_path / "plots"
    arguments = [
        "--sweep",
        "all",
        "--thresholds-split",
        "dev",
        "--thresholds-rows",
        4,
        "--num-thresholds",
        1,
        "--limit",
        4,
    ]
    code, records, _ = evaluate("entailment", *arguments, "--plots", plots)
    assert code == 0
    criteria = {record["criterion"] for record in records}
    # the checkpoint has no fit
    assert criteria >= {*known_sweeps()} - {"agreement"} | {
        "similarity per layer",
        "fixed image",
        "fixed text",
        "fixed decoder",
        "full",
    }
    names = {path.name for path in plots.iterdir()}
    assert names == {
        *("quality_flops.png", "identical_flops.png", "similarity_layers.png"),
        *("depth_kind.png", "accuracy_kind.png"),
    }
    for path in plots.iterdir():
        with Image.open(path) as picture:
            assert len(picture.getcolors(1 << 20)) > 10


def test_plots_of_captions(evaluate, tmp_path):
    timing = ["--time-rows", 1, "--time-repeats", 1]
    code, *_ = evaluate("captioning", "--preset", "first", *timing, "--plots", tmp_path / "plots")
    assert code == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names >= {"quality_time.png", "identical_time.png", "depth_position.png"}


def test_records_of_version_0_1_make_tables_and_plots(tmp_path):
    records = read_records(Path(__file__).parents[2] / "model_cards" / "mue-scenes-small.evaluation.jsonl")
    some = [one for one in records if (one["task"], one["images"]) == ("entailment", "own")]
    # A point of the kind that it called random.
    some.append(
        some[-1] | {"key": "0", "name": "random like fixed 3", "criterion": "random", "random_like": "fixed 3"}
    )
    table = make_table(some)
    assert "| balanced | 0." in table and "| random like fixed 3 |" in table
    assert "mue-hf 0.1.0" in describe_records(some)
    assert len(draw_plots(some, tmp_path)) >= 4


def test_options_of_version_0_1_are_taken_with_a_warning(evaluate):
    old = ["--levels-split", "dev", "--levels-rows", 4, "--levels", 1, "--random", "similarity-decoder, level 1"]
    new = ["--thresholds-split", "dev", "--thresholds-rows", 4, "--num-thresholds", 1]
    new += ["--shuffled-depths", "similarity-decoder, thresholds 1"]
    _, expected, quiet = evaluate("entailment", "--sweep", "similarity-decoder", *new)
    code, records, warned = evaluate("entailment", "--sweep", "similarity-decoder", *old)
    assert code == 0 and records == expected
    assert records[-1]["name"] == "shuffled depths of similarity-decoder, thresholds 1"
    assert " is now " not in quiet
    for before, after in zip(old[::2], new[::2], strict=True):
        assert f"mue-hf evaluate: {before} is now {after}" in warned


def test_batch_norms_stay_folded(evaluate, checkpoint, tmp_path):
    """The fingerprint of the weights is that from before folding; what is run and timed is folded."""
    _, (record,), _ = evaluate("captioning")
    assert record["weights"] == trunk_fingerprint(MuEForConditionalGeneration.from_pretrained(checkpoint))
    model, processor = load_checkpoint(str(checkpoint))
    assert model.get_encoder().folding is not None
    arguments = {"metrics": ["bleu"], "tokenizer": "plain", "time_rows": 0, "output": tmp_path / "other.jsonl"}
    evaluation = Evaluation(model, processor, EvaluationArguments("captioning", "scenes:1:3", **arguments))
    assert [one["quality"] for one in evaluation.records()]
    assert model.get_encoder().folding is not None


def test_files_are_read(evaluate, tmp_path):
    write_scenes(tmp_path / "scenes", {"test": 2, "dev": 1}, statements=3)
    data = str(tmp_path / "scenes" / "entailment.jsonl")
    code, (record,), _ = evaluate("entailment", "--kind-column", "kind", data=data)
    assert code == 0 and record["rows"] == 6 and record["by_kind"]
    sweep = tmp_path / "points.json"
    sweep.write_text(json.dumps({"mine": {"exit_criterion": "fixed", "decoder_exit_layer": 2}}))
    data = str(tmp_path / "scenes" / "captions.jsonl")
    code, (_, mine), _ = evaluate("captioning", "--sweep", sweep, data=data)
    assert code == 0 and mine["name"] == "mine" and mine["depth"]["decoder"] == 2


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("captioning", ["--preset", "nosuch"], "`exit_preset` must name a preset"),
        ("captioning", ["--decoder-threshold", "nan"], "`decoder_exit_threshold` must be a finite number"),
        ("captioning", ["--generate", "exit_criterian=never"], "did you mean `exit_criterion`"),
        ("captioning", ["--split", "val"], "`split` must be one of"),
        ("captioning", ["--metrics", "blue"], "`metrics` must be a list out of"),
        ("captioning", ["--against", "x"], "`against` must name a point of this run"),
        ("captioning", ["--shuffled-depths", "x"], "`shuffled_depths` must name points of this run"),
        ("captioning", ["--oracle", "--num-beams", "2"], "`oracle` needs greedy decoding"),
        ("captioning", ["--images", "none"], "belong to entailment"),
        ("captioning", ["--preset", "first", "--preset", "first"], "must differ in name"),
        ("entailment", ["--num-beams", "2"], "Options of decoding belong to captioning"),
        ("entailment", ["--limit", "8", "--images", "shuffled"], "need at least two images"),
        ("entailment", ["--output", "points.json"], "must be a .jsonl file"),
        ("entailment", ["--data", "scenes:1"], "must be scenes:SEED:COUNT"),
        ("entailment", ["--data-option", "label_column=answer"], "got ['label_column'] for 'scenes:1:3'"),
        ("entailment", ["--data", "no/such.jsonl"], "`source` must exist"),
    ],
)
def test_bad_input_is_a_message_and_code_2(task, arguments, message, evaluate, tmp_path):
    code, records, error = evaluate(task, *arguments)
    assert code == 2
    assert message in error
    assert records == [] and not (tmp_path / "out").exists()


def test_missing_java_is_said_before_any_work(evaluate, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("METEOR needs Java.")

    monkeypatch.setattr("mue_hf.evaluation.run.caption_scores", fail)
    code, _, error = evaluate("captioning")
    assert code == 2
    assert "METEOR needs Java. Or pass other `metrics`" in error


@pytest.mark.parametrize("sweep", ["nosuch", "fixed=2", "all=0.5", "similarity=x"])
def test_bad_sweeps_are_usage_errors(sweep, evaluate):
    with pytest.raises(SystemExit) as stop:
        evaluate("captioning", "--sweep", sweep)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"key": "a"}\n[1]\n', "line 2"),
        ('{"key": "a"}\n[1]\n{"key": "b', "line 2"),
        ('{"key": "a"}\n{"image": "a.png"}', "at the end of"),
        ("no newline", "at the end of"),
    ],
    ids=["line", "line and cut", "last line", "text"],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "points.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(path)
    assert path.read_text() == content


@pytest.mark.parametrize("cut", ["{", '{"key', '{"key": "b", "name": "fu'])
def test_a_record_that_was_cut_is_dropped(tmp_path, cut):
    path = tmp_path / "points.jsonl"
    path.write_text('{"key": "a"}\n' + cut)
    assert read_records(path) == [{"key": "a"}]
    assert path.read_text() == '{"key": "a"}\n'


def test_reduction_by_hand():
    config = MuEConfig(encoder_layers=6, decoder_layers=4)
    some = [prediction(2, 4, (1, 3)), prediction(6, 6, (4,))]
    # Words of 2 + 1 outputs: encoder layers 3, 3, 6 of 6 (mean), 6, 6, 12 of 12 (sum), 2, 2, 6 of 6 (image).
    assert expected_time_reduction(config, some) == pytest.approx(
        {"mean": 1 - (12 + 8) / 30, "sum": 1 - (24 + 8) / 48, "without_text": 1 - (10 + 8) / 30}
    )
    alone = [prediction(0, 3, (2,))]
    assert expected_time_reduction(config, alone) == pytest.approx(
        {"mean": 1 - 5 / 10, "sum": 1 - 5 / 10, "without_text": None}
    )
    assert expected_time_reduction(config, [prediction(6, 6, ())])["mean"] == 0


def test_depths_by_hand():
    some = [prediction(2, 4, (1, 3), "a"), prediction(2, 2, (4,), "b"), prediction(1, 1, (1,), "b")]
    assert depth_by_position(some) == [{"depth": 2.0, "outputs": 3}, {"depth": 3.0, "outputs": 1}]
    easy, hard = extremes(some, 1)
    assert easy == [{"image_id": "b", "depth": (6 + 2) / 2}] and hard == [{"image_id": "a", "depth": 5.0}]


@pytest.mark.parametrize("kv", ["project", "exact"])
def test_layers_run_for_a_token_are_those_counted(kv, parts):
    model, processor = parts
    rows = load_rows("captioning", "scenes:1:3", "test")
    ran, tokens, some = 0, 0, []
    for row, threshold in product(rows, (0.02, 0.05, 0.1, 0.2, 0.4)):
        inputs = processor(images=row["image"])
        inputs["pixel_values"] = inputs["pixel_values"].double()
        exits = {"exit_criterion": "confidence", "decoder_exit_threshold": threshold, "exit_kv": kv}
        output = model.generate(**inputs, **exits, max_new_tokens=8, return_dict_in_generate=True)
        ran, tokens = ran + output.executed_layers["decoder"], tokens + output.decoder_exit_layers.shape[1]
        some.append(prediction(3, 3, tuple(output.decoder_exit_layers[0].tolist())))
    assert any(len(set(one.decoder_exit_layers)) > 1 for one in some)
    assert executed_layers(some, kv) == ran / tokens


@pytest.mark.parametrize("prompt_type", ["prev_output", "none"])
def test_flops_of_answers_are_those_counted(prompt_type, checkpoint):
    # torch's counter follows modules through the graph, and sees eager attention only.
    model = MuEForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()
    model.requires_grad_(False)
    processor = MuEProcessor.from_pretrained(checkpoint)
    rows = load_rows("entailment", "scenes:1:1", "test", limit=1)
    exits = {"exit_criterion": "fixed", "image_exit_layer": 2, "text_exit_layer": 1, "decoder_exit_layer": 3}
    with FlopCounterMode(display=False) as counter:
        some = predict(model, processor, rows, "entailment", exits, prompt_type=prompt_type, progress=False)
    meter = Meter(model, processor, "entailment", rows, {}, prompt_type)
    assert meter.flops(some, exits)["mean"] == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_oracle_is_the_first_settled_layer(parts):
    model, processor = parts
    rows = load_rows("captioning", "scenes:1:2", "test")
    with SignalRecorder(model) as recorder:
        full = predict(model, processor, rows, "captioning", batch_size=2, progress=False)
    oracle = token_oracle(full, recorder.signals)
    for row, one, other in zip(rows, full, oracle, strict=True):
        inputs = processor(images=row["image"])
        inputs["pixel_values"] = inputs["pixel_values"].double()
        ids = torch.tensor([[0, *one.token_ids[:-1]]])
        states = model(**inputs, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states[1:]
        best = torch.stack([model.lm_head(model.model.decoder.layer_norm(state[0])).argmax(-1) for state in states])
        expected = [next(k for k in range(4) if (best[k:, t] == best[-1, t]).all()) + 1 for t in range(ids.shape[1])]
        assert list(other.decoder_exit_layers) == expected
    curves = similarity_curves(recorder.signals)
    assert curves.keys() == {"image", "text", "decoder"}
    assert curves["decoder"]["agreeing"][-1] == 1
    assert all(low <= high for low, high in zip(curves["image"]["low"], curves["image"]["high"], strict=True))


def test_settings_of_a_joint_encoder():
    config = tiny_config(modality_decomposition=False)
    settings = make_settings(config, sweeps=[("similarity", [0.9]), ("fixed", None)])
    assert settings[1].exits == {"encoder_exit_threshold": 0.9, "decoder_exit_threshold": 0.9}
    assert {point.criterion for point in settings} == {"full", "similarity", "fixed", "fixed encoder", "fixed decoder"}


def test_base_options_hold_for_sweeps():
    base = {"image_exit_threshold": 0.8, "exit_kv": "exact"}
    settings = make_settings(
        tiny_config(), sweeps=[("similarity", [0.9]), ("entropy", [0.1]), ("fixed", None)], base=base
    )
    similar, entropy, fixed = settings[1], settings[2], settings[3]
    assert similar.exits == base | {"text_exit_threshold": 0.9, "decoder_exit_threshold": 0.9}
    assert entropy.exits == base | {"exit_criterion": "entropy", "decoder_exit_threshold": 0.1}
    assert fixed.exits["exit_kv"] == "exact" and "image_exit_threshold" not in fixed.exits
    assert [point.name for point in make_settings(tiny_config(), base=base)] == ["full depth", "given"]


def test_donors_and_controls():
    ids = ["a", "a", "b", "c", "c"]
    chosen = donors(ids)
    assert all(ids[donor] != own for own, donor in zip(ids, chosen, strict=True))
    assert chosen[0] == chosen[1] and chosen[3] == chosen[4]
    assert {ids[donor] for donor in chosen} == {"a", "b", "c"}
    rows = [{"image_id": name, "image": name, "premise": "p"} for name in ids]
    controlled = ControlledRows(rows, False, chosen, True)
    assert controlled[2] == {"image_id": "b", "image": ids[chosen[2]], "premise": None}
    assert ControlledRows(rows, True, None, False)[0] == {"image_id": "a", "image": None, "premise": "p"}


def test_fingerprints_follow_the_data(tmp_path):
    rows = load_rows("entailment", "scenes:1:2", "test")
    same, other = (load_rows("entailment", f"scenes:{seed}:2", "test") for seed in (1, 2))
    prints = [describe_rows(some).fingerprint for some in (rows, same, other)]
    assert prints[0] == prints[1] != prints[2]
    relabelled = [row | {"label": "neutral"} for row in rows]
    repainted = [row | {"image": rows[-1]["image"]} for row in rows]
    assert len({prints[0], describe_rows(relabelled).fingerprint, describe_rows(repainted).fingerprint}) == 3


@pytest.mark.parametrize("task", ["captioning", "entailment"])
def test_two_processes_give_what_one_gives(task, evaluate, checkpoint, tmp_path):
    """One command of each kind in two processes; five scenes and forty statements do not divide by the batches."""
    sweep = [*SHUFFLED_AND_ORACLE, "--thresholds-split", "dev"]
    data = "scenes:1:5"
    _, expected, _ = evaluate(task, *sweep, "--thresholds-rows", 4, "--num-thresholds", 1, data=data)
    (tmp_path / "out").rename(tmp_path / "one")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    command += ["-m", "mue_hf.cli", "evaluate", task, "--model", checkpoint, "--data", data]
    command += ["--output", tmp_path / "out" / "points.jsonl", "--json", *FAST, *sweep]
    command += ["--thresholds-rows", 4, "--num-thresholds", 1, "--features", tmp_path / "features"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert records == read_records(tmp_path / "out" / "points.jsonl")
    changing = {"environment", "measured_at", "measuring_seconds", "source"}
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["environment"]["processes"] == 2
        for name in theirs.keys() - changing:
            assert ours[name] == theirs[name], name
    # Each output was written once, and none of them is half.
    names = {path.name for path in (tmp_path / "out" / "points").iterdir()}
    assert names == {path.name for path in (tmp_path / "one" / "points").iterdir()}
