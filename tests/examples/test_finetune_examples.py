"""The fine-tuning scripts on ten scenes and a tiny model: training, resuming, scores, bad data, two processes."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_checkpoint
from safetensors.torch import load_file

from mue_hf import MuEForConditionalGeneration, MuEProcessor

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install mue-hf[train]")

from mue_hf.data.scenes import write_scenes
from mue_hf.evaluation.rows import load_rows
from mue_hf.inference.predict import predict

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = ("captioning", "entailment")
FILES = {"captioning": "captions", "entailment": "entailment"}
# Steps 1 to 4; the checkpoint lies within the first epoch.
FAST = "--use_cpu --max_steps 4 --save_steps 3 --logging_steps 1 --disable_tqdm True".split()
BATCHES = "--per_device_train_batch_size 4 --per_device_eval_batch_size 3".split()
SCORES = {"captioning": "--tokenizer plain --metrics bleu cider".split(), "entailment": []}


@pytest.fixture(scope="module")
def examples():
    """The scripts as modules. While the tests run, `examples` is where modules are looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield {task: importlib.import_module(f"finetune_{task}") for task in TASKS}


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A tiny joint model, as `mue-hf convert` gives one, whose tokens are bytes."""
    generation = {"max_new_tokens": 6, "num_beams": 2}
    sizes = {"image_size": 32, "max_position_embeddings": 160}
    folder = tmp_path_factory.mktemp("origin")
    return byte_checkpoint(folder, **sizes, generation=generation, modality_decomposition=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten scenes: five to train, two for dev, three for test."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, {"train": 5, "dev": 2, "test": 3}, statements=3, image_size=32)
    return folder


@pytest.fixture
def run(examples, origin, data, tmp_path):
    """Runs a script; returns its output folder."""

    def call(task, *arguments, folder=tmp_path / "out"):
        paths = ["--model_name_or_path", origin, "--data", data / f"{FILES[task]}.jsonl", "--output_dir", folder]
        examples[task].main([*map(str, paths), *FAST, *BATCHES, *SCORES[task], *map(str, arguments)])
        return folder

    return call


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_run_and_resumed_run(task, run, tmp_path):
    folder = run(task, "--do_train", "--do_eval", "--do_predict", "--ema_decay", 0.9)
    assert len(losses(folder)) == 4
    score = {"captioning": "cider_plain", "entailment": "accuracy"}[task]
    for part in ("eval", "predict"):
        assert f"{part}_{score}" in json.loads((folder / f"{part}_results.json").read_text())
    # OFA's joint encoder has become MuE's two streams.
    model = MuEForConditionalGeneration.from_pretrained(folder)
    assert model.config.modality_decomposition and model.config.encoder_drop_path_rate == 0.1
    # the last checkpoint of a run that was cut off, and one that was cut off while it was written
    shutil.copytree(folder / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    (tmp_path / "again" / "checkpoint-4").mkdir()
    again = run(task, "--do_train", "--ema_decay", 0.9, folder=tmp_path / "again")
    expected, found = weights(folder), weights(again)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert losses(again) == losses(folder)


@pytest.mark.parametrize("task", TASKS)
def test_scores_without_texts_are_refused_before_training(task, run, tmp_path):
    with pytest.raises(ValueError, match="`predict_with_generate` must be True with `do_eval` or `do_predict`"):
        run(task, "--do_train", "--do_eval", "--predict_with_generate", "False")
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_written_answers_are_those_of_predict(run, data):
    folder = run("entailment", "--do_train", "--do_predict")
    model = MuEForConditionalGeneration.from_pretrained(folder).eval()
    rows = load_rows("entailment", str(data / "entailment.jsonl"), "test")
    expected = predict(model, MuEProcessor.from_pretrained(folder), rows, "entailment", progress=False)
    found = lines(folder / "predictions.jsonl")
    assert [row["answer"] for row in found] == [one.output for one in expected]
    assert [row["hypothesis"] for row in found] == list(rows["hypothesis"])


def test_written_captions_are_those_of_predict(run, data):
    folder = run("captioning", "--do_train", "--do_predict", "--max_train_samples", 4)
    model = MuEForConditionalGeneration.from_pretrained(folder).eval()
    rows = load_rows("captioning", str(data / "captions.jsonl"), "test")
    expected = predict(model, MuEProcessor.from_pretrained(folder), rows, "captioning", progress=False)
    found = lines(folder / "predictions.jsonl")
    assert found == [{"image_id": one.image_id, "caption": one.output} for one in expected]


@pytest.mark.parametrize("task", TASKS)
def test_frozen_trunk_and_generated_scenes(task, run, origin):
    source = ["--data", "scenes:1:3", "--max_steps", 2]
    folder = run(task, "--do_train", "--do_eval", "--freeze_trunk", *source)
    shards = list((folder / "_features").glob("*/*.safetensors"))
    assert len(shards) == 2
    before, after = weights(origin), weights(folder)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and not any("embed_images" in name for name in changed)


@pytest.mark.parametrize("source", ["files", "scenes"])
@pytest.mark.parametrize("task", TASKS)
def test_streaming(task, source, run):
    options = ["--data", "scenes:0:4"] if source == "scenes" else []
    folder = run(task, "--do_train", "--do_eval", "--streaming", *options)
    assert len(losses(folder)) == 4


def test_second_stage(run):
    options = ["--scst_samples", 2, "--label_smoothing_factor", 0, "--scst_references", 2]
    folder = run("captioning", "--do_train", "--do_eval", *options)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert "reward" in history[0]


def test_arguments_in_a_file(examples, origin, tmp_path):
    arguments = {
        "model_name_or_path": str(origin),
        "data": "scenes:0:2",
        "output_dir": str(tmp_path / "out"),
        "do_predict": True,
        "use_cpu": True,
    }
    (tmp_path / "run.json").write_text(json.dumps(arguments))
    examples["entailment"].main([str(tmp_path / "run.json")])
    assert len(lines(tmp_path / "out" / "predictions.jsonl")) == 16


def test_defaults_are_the_papers(examples, tmp_path):
    for task, batch, smoothing in (("captioning", 64, 0.1), ("entailment", 32, 0.0)):
        cls = getattr(examples[task], f"{task.capitalize()}Arguments")
        args = cls(str(tmp_path), use_cpu=True)
        assert (args.learning_rate, args.num_train_epochs, args.weight_decay) == (3e-5, 5, 0.01)
        assert (args.per_device_train_batch_size, args.label_smoothing_factor) == (batch, smoothing)
        assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.999, 1.0)
        assert args.lr_scheduler_type == "polynomial" and args.get_warmup_steps(100) == 6
        assert args.layer_weights is None and args.self_distillation == 0


@pytest.mark.parametrize(
    ("task", "fault", "message"),
    [
        ("captioning", {"references": ["..."]}, "caption without words: 1"),
        ("captioning", {"image": "images/none.png"}, "missing or unreadable image: 1"),
        ("entailment", {"label": "perhaps"}, "unknown label: 1"),
        ("entailment", {"hypothesis": ""}, "hypothesis without words: 1"),
    ],
    ids=["caption", "image", "label", "hypothesis"],
)
def test_bad_rows_stop_the_run_or_are_counted(task, fault, message, run, data, tmp_path, caplog):
    rows = lines(data / f"{FILES[task]}.jsonl")
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, [rows[0] | fault, *rows[1:]])))
    options = ["--data", tmp_path / "bad.jsonl", "--data_option", f"image_root={data}", "--max_steps", 2]
    with pytest.raises(ValueError, match=message):
        run(task, "--do_train", *options)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    folder = run(task, "--do_train", "--skip_bad", *options)
    assert len(losses(folder)) == 2
    assert f"left out {{'{message.removesuffix(': 1')}': 1" in caplog.text


def test_wrong_column(run):
    with pytest.raises(ValueError, match="`caption_column` must name a column of the source"):
        run("captioning", "--do_train", "--data_option", "caption_column=nosuch")


def test_a_trained_model_is_not_written_over(run, tmp_path):
    folder = run("entailment", "--do_train", "--save_strategy", "no", "--max_steps", 2)
    with pytest.raises(ValueError, match="`output_dir` must not hold a model that the run would write over"):
        run("entailment", "--do_train", folder=folder)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be a folder"):
        run("entailment", "--do_train", "--resume_from_checkpoint", tmp_path / "nosuch", folder=folder)


def test_two_processes_end_with_the_same_model_and_metrics(run, origin, data, tmp_path):
    """A whole epoch of 12 pairs, 4 in a step, and 6 pairs to score, which do not fill the batches of two processes."""
    # differing seeds of dropout and drop path would be no error
    common = ["--dropout", 0, "--drop_path_rate", 0, "--freeze_batch_norm", "--max_train_samples", 12]
    common += ["--do_train", "--do_eval", "--do_predict", "--max_steps", 3]
    one = run("entailment", *common)
    two = tmp_path / "two"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    paths = ["--model_name_or_path", origin, "--data", data / "entailment.jsonl", "--output_dir", two]
    batches = ["--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 4]
    arguments = [*FAST, *common, *paths, *batches, "--ddp_backend", "gloo"]
    command += [str(EXAMPLES / "finetune_entailment.py"), *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    expected, found = weights(one), weights(two)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    for part in ("eval", "predict"):
        metrics, others = (json.loads((folder / f"{part}_results.json").read_text()) for folder in (one, two))
        names = [name for name in metrics if not name.endswith(("runtime", "per_second", "epoch"))]
        assert {name: others[name] for name in names} == pytest.approx({name: metrics[name] for name in names})
    assert lines(two / "predictions.jsonl") == lines(one / "predictions.jsonl")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate shards models over GPUs alone, and over several")
def test_fully_sharded_run_ends_with_the_same_model(run, origin, data, tmp_path):
    """NOT RUN where this was written; tests/training/test_trainer.py compares a sharded step's gradients on CPUs."""
    common = ["--dropout", 0, "--drop_path_rate", 0, "--freeze_batch_norm", "--do_train", "--max_steps", 3]
    one = run("entailment", *common, "--max_train_samples", 12)
    two = tmp_path / "two"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "fsdp.yaml")]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    paths = ["--model_name_or_path", origin, "--data", data / "entailment.jsonl", "--output_dir", two]
    arguments = [*FAST[1:], *common, "--max_train_samples", 12, *paths, "--per_device_train_batch_size", 2]
    arguments += ["--predict_with_generate", "False"]
    command += [str(EXAMPLES / "finetune_entailment.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-4)
