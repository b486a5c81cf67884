"""The short examples on a tiny model: each runs, and does what it says it shows."""

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import byte_checkpoint
from PIL import Image

from mue_hf import MuEForConditionalGeneration

EXAMPLES = Path(__file__).parents[2] / "examples"


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@pytest.fixture
def example(monkeypatch):
    """A script as a module. While the test runs, `examples` is where modules are looked for."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return byte_checkpoint(folder, max_position_embeddings=160, generation={"max_new_tokens": 6})


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "noise.png"
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


@pytest.fixture
def cpu(monkeypatch):
    """Makes a script's trainer stay on the CPU and quiet."""

    def patch(script) -> None:
        arguments = script.MuETrainingArguments
        monkeypatch.setattr(script, "MuETrainingArguments", partial(arguments, use_cpu=True, disable_tqdm=True))

    return patch


def load(folder: Path) -> MuEForConditionalGeneration:
    return MuEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def changed(before: Path, after: Path) -> set[str]:
    old, new = load(before).state_dict(), load(after).state_dict()
    assert old.keys() == new.keys()
    return {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}


# PEFT 0.21 asks transformers by an old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@needs("accelerate", "datasets", "peft")
def test_lora_trains_attention_projections_only_and_merges(example, checkpoint, cpu, tmp_path):
    from peft import PeftModel

    lora = example("lora")
    cpu(lora)
    lora.main(["--model", str(checkpoint), "--data", "scenes:0:4", "--output", str(tmp_path), "--steps", "2"])
    projections = changed(checkpoint, tmp_path / "merged")
    assert projections and all(name.endswith("_proj.weight") and "_attn." in name for name in projections)
    # the adapter alone, on the model it was trained on, is the merged model
    adapted = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "pixel_values": torch.ones(1, 3, 64, 64)}
    with torch.no_grad():
        expected, found = adapted(**inputs).logits, load(tmp_path / "merged")(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs("accelerate", "datasets")
@pytest.mark.parametrize("source", ["scenes", "file"])
def test_streaming(source, example, checkpoint, cpu, tmp_path):
    streaming, data = example("streaming"), "scenes:0:9"
    cpu(streaming)
    if source == "scenes":
        rows = list(streaming.stream(data))
        assert len({row["image_id"] for row in rows}) == 9 and all(len(row["references"]) == 2 for row in rows)
    else:
        example("mue_hf.data.scenes").write_scenes(tmp_path / "data", {"train": 5}, image_size=64)
        data = str(tmp_path / "data" / "captions.jsonl")
    arguments = ["--model", checkpoint, "--data", data, "--output", tmp_path / "out", "--steps", 2, "--batch-size", 2]
    streaming.main([*map(str, arguments)])
    assert changed(checkpoint, tmp_path / "out")


@needs("accelerate", "datasets")
def test_plain_loop_and_gradient_checkpointing(example, checkpoint, tmp_path):
    arguments = ["--model", checkpoint, "--data", "scenes:0:4", "--steps", 3, "--batch-size", 2, "--output"]
    run = example("plain_loop").main
    losses = run([*map(str, arguments), str(tmp_path / "kept")])
    assert changed(checkpoint, tmp_path / "kept")
    assert run([*map(str, arguments), str(tmp_path / "again"), "--gradient-checkpointing"]) == losses
    assert not changed(tmp_path / "kept", tmp_path / "again")


@needs("accelerate", "datasets")
def test_plain_loop_in_two_processes(checkpoint, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--model", checkpoint, "--data", "scenes:0:8", "--steps", 2, "--batch-size", 2, "--output", tmp_path]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += [str(EXAMPLES / "plain_loop.py"), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert changed(checkpoint, tmp_path)


@needs("accelerate")
def test_big_model_on_one_device_and_with_parts_in_files(example, checkpoint, photo, capsys):
    run = example("big_model").main
    arguments = [str(photo), "--model", str(checkpoint)]
    captions = run(arguments)
    # less than the whole has
    assert run([*arguments, "--memory", "cpu=300KB"]) == captions
    places = capsys.readouterr().out
    assert "'cpu'" in places and "'disk'" in places


def test_compiled_layers_give_the_same_tokens(example, checkpoint, photo):
    torch._dynamo.reset()
    # no compiler is needed: the graphs are made and run as they are
    arguments = [str(photo), "--model", str(checkpoint), "--backend", "eager", "--repeats", "1"]
    tokens = example("compile").main([*arguments, "--device", "cpu"])
    assert tokens["compiled"] == tokens["eager"]


@needs("accelerate")
def test_the_fsdp_file_is_one_of_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / "fsdp.yaml"))
    layers = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert layers == MuEForConditionalGeneration._no_split_modules


def test_statements_out_of_captions(example, photo, tmp_path, monkeypatch, capsys):
    source, file = tmp_path / "captions.jsonl", tmp_path / "statements.jsonl"
    other = tmp_path / "other.png"
    other.write_bytes(photo.read_bytes())
    captions = [(photo, "a red bag"), (other, "a blue bag")]
    lines = [{"image": str(path), "split": "dev", "captions": [text]} for path, text in captions]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["make_statements", str(source), str(file), "--split", "dev"])
    example("make_statements").main()
    assert capsys.readouterr().out.startswith("4 statements in ")
    told = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["hypothesis"], one["label"]) for one in told][:2] == [
        ("a red bag", "entailment"),
        ("a blue bag", "contradiction"),
    ]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--kinds", "count", "place"])
    with pytest.raises(ValueError, match="`source` must have captions that can trade words"):
        example("make_statements").main()
