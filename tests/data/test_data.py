"""Loaders of every kind of source, what they say about bad rows, the collator's batches, mixtures of data sets, and
cached trunk features."""

import csv
import json
import pickle
from collections import Counter
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import character_tokenizer, tiny_model
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import ExifTags, ImageOps
from PIL import Image as PilImage

from mue_hf.data import (
    CAPTIONING_FEATURES,
    ENTAILMENT_FEATURES,
    CaptionPairs,
    CaptionTexts,
    Mixture,
    MuEDataCollator,
    features,
    load_captioning,
    load_entailment,
    reader,
)
from mue_hf.data.features import TrunkFeatureDataset, cache_trunk_features, image_digest, trunk_fingerprint, unfolded
from mue_hf.data.mixture import check_shares
from mue_hf.data.scenes import SceneDataset
from mue_hf.evaluation.rows import load_rows, row_fields
from mue_hf.model.processing_mue import CAPTION_PROMPT, MuEImageProcessorPil, MuEProcessor

CAPTIONS = [["A dog runs.", "the dog!"], ["Two cats"], ["a Man", "a man, sitting", "he sits"]]
PAIRS = [(None, "It runs.", "entailment"), ("Two cats.", "One cat", "neutral"), ("a man", "no man", "contradiction")]


@pytest.fixture
def folder(tmp_path):
    """Three pictures with a colour of their own, in PNG."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        PilImage.new("RGB", (12, 10), (80 * number, 200, 30)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


@pytest.fixture
def captioning(tmp_path):
    """The loader, whose copies of sources stay in the test's own folder."""
    return partial(load_captioning, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def entailment(tmp_path):
    return partial(load_entailment, cache_dir=str(tmp_path / "cache"))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def jpeg() -> bytes:
    """A picture with something in it, so that most of the file is its data."""
    file = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PilImage.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def color(image: PilImage.Image) -> int:
    return image.convert("RGB").getpixel((0, 0))[0] // 80


def jsonl(folder):
    splits = ["train", "train", "test"]
    rows = [{"image": f"images/{i}.png", "split": split, "captions": CAPTIONS[i]} for i, split in enumerate(splits)]
    return write_lines(folder / "captions.jsonl", rows), {}


def karpathy(folder):
    images = [
        {
            "filepath": "images",
            "filename": f"{i}.png",
            "cocoid": i,
            "split": ["train", "restval", "test"][i],
            "sentences": [{"raw": caption, "tokens": caption.split()} for caption in captions],
        }
        for i, captions in enumerate(CAPTIONS)
    ]
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path, {"split": "train+restval", "field": "images"}


def one_caption_per_row(folder):
    path = folder / "captions.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "caption"])
        writer.writerows([f"images/{i}.png", caption] for i in range(2) for caption in CAPTIONS[i])
    return path, {"split": None}


def image_folder(folder):
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        (folder / "set" / split).mkdir(parents=True)
        for i in numbers:
            (folder / "images" / f"{i}.png").rename(folder / "set" / split / f"{i}.png")
        rows = [{"file_name": f"{i}.png", "captions": CAPTIONS[i]} for i in numbers]
        write_lines(folder / "set" / split / "metadata.jsonl", rows)
    return folder / "set", {}


def embedded(folder) -> Dataset:
    paths = [str(folder / "images" / f"{i}.png") for i in range(3)]
    rows = Dataset.from_dict({"picture": paths, "text": CAPTIONS}).cast_column("picture", Image())
    return rows.add_column("part", ["train", "train", "test"])


def parquet(folder):
    path = folder / "rows.parquet"
    embedded(folder).to_parquet(path)
    return path, {"image_column": "picture", "split_column": "part"}


def parquet_folder(folder):
    (folder / "set").mkdir()
    rows = embedded(folder)
    rows.select([0, 1]).to_parquet(folder / "set" / "train.parquet")
    rows.select([2]).to_parquet(folder / "set" / "test.parquet")
    return folder / "set", {"image_column": "picture"}


STREAMED = [jsonl, karpathy, image_folder, parquet, parquet_folder]
SOURCES = [*STREAMED, one_caption_per_row]


class TestCaptioning:
    @pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
    def test_sources(self, folder, captioning, make):
        path, options = make(folder)
        rows = captioning(path, **options)
        assert rows.features == CAPTIONING_FEATURES
        assert [row["references"] for row in rows] == CAPTIONS[:2]
        assert [color(row["image"]) for row in rows] == [0, 1]
        assert len(set(rows["image_id"])) == 2

    @pytest.mark.parametrize(
        "make", [one for one in SOURCES if one is not one_caption_per_row], ids=lambda m: m.__name__
    )
    def test_streamed(self, folder, captioning, make):
        path, options = make(folder)
        rows = captioning(path, **options)
        streamed = captioning(path, **options, streaming=True)
        assert streamed.features == rows.features
        for row, other in zip(rows, streamed, strict=True):
            assert color(row.pop("image")) == color(other.pop("image"))
            assert row == other

    def test_hub(self, folder, monkeypatch):
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            rows = embedded(folder)
            return rows if kwargs["split"] else DatasetDict(first=rows.select([0, 2]), second=rows.select([1]))

        monkeypatch.setattr(reader, "load_dataset", load_dataset)
        rows = load_captioning("someone/pictures", "validation", image_column="picture", name="en", revision="v1")
        assert len(rows) == 3
        options = {"name": "en", "revision": "v1", "streaming": False}
        assert calls == [(("someone/pictures",), options | {"split": "validation"})]
        rows = load_captioning("someone/pictures", image_column="picture", split_column="part")
        assert sorted(rows["references"]) == sorted(CAPTIONS[:2])

    def test_columns(self, folder, captioning):
        rows = [{"image": "0.png", "image_id": 7, "first": "a dog", "second": "one dog", "place": "park"}]
        path = write_lines(folder / "rows.jsonl", rows)
        options = {"caption_column": ["first", "second"], "image_root": folder / "images", "keep_columns": ["place"]}
        (row,) = captioning(path, None, **options)
        assert (row["image_id"], row["references"], row["place"]) == ("7", ["a dog", "one dog"], "park")

    def test_ids_do_not_depend_on_where_the_folder_is(self, folder, captioning):
        assert captioning(jsonl(folder)[0])["image_id"] == ["images/0.png", "images/1.png"]
        assert captioning(image_folder(folder)[0])["image_id"] == ["train/0.png", "train/1.png"]

    @pytest.mark.parametrize(
        ("source", "options", "match"),
        [
            ("missing.jsonl", {}, "`source` must exist"),
            ("images/0.png", {}, "`source` must be a file of the kinds"),
            ("captions.jsonl", {"split": "validation"}, r"rows of the split 'validation'.*\['test', 'train'\]"),
            ("captions.jsonl", {"caption_column": "text"}, r"`caption_column` must name a column.*\['text'\]"),
            ("captions.jsonl", {"image_column": "{a}/{image}"}, "`image_column` must name a column"),
            ("captions.jsonl", {"keep_columns": ["place"]}, "must name a column .*'place'"),
            ("plain.jsonl", {}, "`split_column` must name a column.*`split=None`"),
            ("images", {}, "`caption_column` must name a column"),
            ("broken.jsonl", {}, "a JSON object in each line; in .*broken.jsonl line 1 must be JSON, .*Fix or delete"),
            ("broken.json", {}, "`source` must be .*that `datasets` can read, .*JSON parse error"),
        ],
        ids=lambda value: value if isinstance(value, str) and " " not in value else "",
    )
    def test_bad_source(self, folder, captioning, source, options, match):
        jsonl(folder)
        write_lines(folder / "plain.jsonl", [{"image": "images/0.png", "captions": ["a dog"]}])
        for suffix in ("json", "jsonl"):
            (folder / f"broken.{suffix}").write_text('{"image": "images/0.png", ')
        with pytest.raises(ValueError, match=match):
            captioning(folder / source, **options)

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    @pytest.mark.parametrize(
        ("line", "match"),
        [
            ('{"image": "images/1.png", ', r"in .*lines\.jsonl line 3 must be JSON, got an error: .*Fix or delete"),
            ("[1]", r"in .*lines\.jsonl line 3 must be a JSON object\. Fix or delete"),
            ('"text"', r"in .*lines\.jsonl line 3 must be a JSON object\. Fix or delete"),
        ],
        ids=["cut", "list", "text"],
    )
    def test_one_bad_line_of_many_is_named(self, folder, captioning, line, match, streaming):
        good = json.dumps({"image": "images/0.png", "captions": ["a dog"]})
        (folder / "lines.jsonl").write_text("\n".join([good, "", line, good]))
        with pytest.raises(ValueError, match=match):
            captioning(folder / "lines.jsonl", None, streaming=streaming)

    def test_empty_file(self, folder, captioning):
        (folder / "lines.jsonl").write_text("\n")
        with pytest.raises(ValueError, match=r"in .*lines\.jsonl no line was found"):
            captioning(folder / "lines.jsonl", None)

    def test_numbers_are_no_paths(self, folder, captioning):
        path = write_lines(folder / "rows.jsonl", [{"image": 3, "captions": ["a dog"]}])
        with pytest.raises(ValueError, match="missing or unreadable image: 1 .first in row 0"):
            captioning(path, None)

    @pytest.fixture
    def bad(self, folder):
        (folder / "images" / "text.png").write_text("no picture")
        whole = (folder / "images" / "0.png").read_bytes()
        (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
        rows = [
            {"image": "images/0.png", "captions": ["a dog", " . "]},
            {"image": "images/9.png", "captions": ["a cat"]},
            {"image": "images/text.png", "captions": ["a cat"]},
            {"image": "images/cut.png", "captions": ["a cat"]},
            {"image": None, "captions": ["a cat"]},
            {"image": "images/1.png", "captions": []},
            {"image": "images/2.png", "captions": ["", None]},
        ]
        return write_lines(folder / "bad.jsonl", rows)

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_bad_rows(self, bad, captioning, streaming, caplog):
        match = r"caption without words: 3 \(first in row 0: .*unreadable image: 4 \(first in row 1: .*9.png.*skip_bad"
        with pytest.raises(ValueError, match=match):
            list(captioning(bad, None, streaming=streaming))
        skipped = Counter()
        rows = list(captioning(bad, None, streaming=streaming, skip_bad=True, skipped=skipped))
        assert [row["references"] for row in rows] == [["a dog"]]
        assert skipped == {"missing or unreadable image": 4, "caption without words": 3, "no caption": 2}
        assert "Left out of" in caplog.text and "missing or unreadable image: 4 (first in row 1" in caplog.text

    def test_bad_embedded_rows(self, folder, captioning):
        good = (folder / "images" / "0.png").read_bytes()
        broken = [b"", b"no picture", good[: len(good) // 2], jpeg()[:-400]]
        images = [None, *({"bytes": one, "path": "9.png"} for one in broken), {"bytes": good, "path": None}]
        schema = Features(CAPTIONING_FEATURES)
        references = [*2 * CAPTIONS[:2], CAPTIONS[1], CAPTIONS[2]]
        table = {"image": images, "image_id": list("012345"), "references": references}
        Dataset.from_dict(table, features=schema).to_parquet(folder / "rows.parquet")
        for streaming in (False, True):
            with pytest.raises(ValueError, match="missing or unreadable image: 5"):
                list(captioning(folder / "rows.parquet", None, streaming=streaming))
            (row,) = captioning(folder / "rows.parquet", None, streaming=streaming, skip_bad=True)
            assert row["references"] == CAPTIONS[2] and color(row["image"]) == 0


class TestEntailment:
    def rows(self):
        return [
            {"image": f"images/{i}.png", "split": "train", "premise": premise, "hypothesis": text, "label": label}
            for i, (premise, text, label) in enumerate(PAIRS)
        ]

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_jsonl(self, folder, entailment, streaming):
        path = write_lines(folder / "pairs.jsonl", self.rows())
        rows = entailment(path, streaming=streaming)
        assert rows.features == ENTAILMENT_FEATURES
        assert [(row["premise"], row["hypothesis"], row["label"]) for row in rows] == PAIRS
        assert [color(row["image"]) for row in rows] == [0, 1, 2]

    def test_snli_ve_file(self, folder, entailment):
        (folder / "images" / "0.png").rename(folder / "images" / "0.jpg")
        row = {"Flickr30K_ID": "0", "sentence1": "a", "sentence2": "b", "gold_label": "neutral", "pairID": "0.jpg#1"}
        path = write_lines(folder / "snli_ve_dev.jsonl", [row, row | {"gold_label": "-"}])
        with pytest.raises(ValueError, match="unknown label: 1 .*row 1: gold_label holds '-'"):
            entailment(path, None, image_root=folder / "images")
        rows = entailment(path, None, image_root=folder / "images", skip_bad=True)
        assert rows["label"] == ["neutral"] and rows["premise"] == ["a"] and rows["image_id"] == ["0.jpg"]

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_numbered_classes(self, folder, entailment, streaming):
        names = ["entailment", "neutral", "contradiction"]
        paths = [str(folder / "images" / f"{i}.png") for i in range(3)]
        columns = {"image": paths, "hypothesis": ["a", "b", "c"], "label": [2, 0, 1]}
        for kind, options in ((ClassLabel(names=names), {}), (Value("int64"), {"label_names": names})):
            schema = Features(image=Image(), hypothesis=Value("string"), label=kind)
            Dataset.from_dict(columns, features=schema).to_parquet(folder / "pairs.parquet")
            rows = entailment(folder / "pairs.parquet", None, streaming=streaming, **options)
            assert [row["label"] for row in rows] == ["contradiction", "entailment", "neutral"]
            assert [row["premise"] for row in rows] == [None] * 3
        with pytest.raises(ValueError, match="label holds 2, .*label_names"):
            list(entailment(folder / "pairs.parquet", None, streaming=streaming))

    def test_answers_are_labels(self, folder, entailment):
        rows = [row | {"label": answer} for row, answer in zip(self.rows(), ["yes", "no", "maybe"], strict=True)]
        path = write_lines(folder / "pairs.jsonl", rows)
        assert entailment(path)["label"] == ["entailment", "contradiction", "neutral"]

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"hypothesis": " ,. "}, "hypothesis without words: 1"),
            ({"premise": ""}, "premise without words: 1 .*null"),
            ({"label": "perhaps"}, "unknown label: 1 .*'perhaps'"),
            ({"image": "9.png"}, "missing or unreadable image: 1"),
        ],
        ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
    )
    def test_bad_rows(self, folder, entailment, change, match):
        rows = self.rows()
        rows[1] |= change
        path = write_lines(folder / "pairs.jsonl", rows)
        with pytest.raises(ValueError, match=match):
            entailment(path)
        assert len(entailment(path, skip_bad=True)) == 2

    @pytest.mark.parametrize("name", ["hypothesis", "label", "premise"])
    def test_missing_column(self, folder, entailment, name):
        path = write_lines(folder / "pairs.jsonl", self.rows())
        with pytest.raises(ValueError, match=f"`{name}_column` must name a column .*'other'"):
            entailment(path, **{f"{name}_column": "other"})


@pytest.fixture(scope="module")
def processor() -> MuEProcessor:
    return MuEProcessor(MuEImageProcessorPil(size={"height": 64, "width": 64}), character_tokenizer())


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Two scenes with captions alone."""
    dataset = SceneDataset(2, statements=0)
    return [dataset[0], dataset[1]]


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    """Two scenes with two statements each, alone."""
    dataset = SceneDataset(2, statements=2, captions=False)
    return [dataset[0], dataset[1]]


def target_texts(processor, batch) -> list[str]:
    return [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


def is_part(view: PilImage.Image, image: PilImage.Image) -> bool:
    """Whether these pixels stand somewhere in the image."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), np.asarray(view).shape)
    return bool((windows == np.asarray(view)).all((-3, -2, -1)).any())


def tiny(processor, **overrides):
    positions = {"max_position_embeddings": 256, "vocab_size": len(processor.tokenizer)}
    return tiny_model(dtype=torch.float32, std=0.05, **positions | overrides)


class TestRows:
    def test_one_row_per_caption(self, folder, captioning):
        path, _ = jsonl(folder)
        rows = captioning(path, None)
        pairs = CaptionPairs(rows, [row["references"] for row in row_fields(rows)])
        assert [pair["references"] for pair in pairs] == [[caption] for some in CAPTIONS for caption in some]
        assert [color(pair["image"]) for pair in pairs] == [0, 0, 1, 2, 2, 2]

    def test_fields_are_the_rows_without_images(self, folder):
        path, _ = jsonl(folder)
        rows = load_rows("captioning", str(path), "train", cache_dir=str(folder / "cache"))
        expected = [{"image_id": f"images/{i}.png", "references": CAPTIONS[i]} for i in range(2)]
        assert row_fields(rows) == row_fields(list(rows)) == expected

    def test_streamed_rows_are_limited_too(self, folder):
        path, _ = jsonl(folder)
        options = {"streaming": True, "cache_dir": str(folder / "cache")}
        rows = load_rows("captioning", str(path), "all", limit=2, **options)
        assert [row["references"] for row in rows] == CAPTIONS[:2]
        assert len(list(load_rows("captioning", str(path), "all", **options))) == 3


class TestCollator:
    def test_captions(self, processor, rows):
        batch = MuEDataCollator(processor, captions_per_image=2, random_captions=False)(rows)
        assert batch["pixel_values"].shape == (2, 3, 64, 64)
        assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == [CAPTION_PROMPT] * 2
        assert batch["attention_mask"].all()
        expected = [f" {text}</s>" for row in rows for text in row["references"]]
        assert target_texts(processor, batch) == expected
        for inputs, labels in zip(batch["decoder_input_ids"], batch["labels"], strict=True):
            length = (labels != -100).sum()
            assert inputs[0] == 0 and torch.equal(inputs[1:length], labels[: length - 1])
            assert (inputs[length:] == processor.tokenizer.pad_token_id).all() and (labels[length:] == -100).all()

    def test_captions_as_ofa_trains(self, processor, rows):
        row = rows[0] | {"references": [" ".join(["A Dog's"] + ["word"] * 30)]}
        (text,) = target_texts(processor, MuEDataCollator(processor, captions_per_image=1)([row]))
        assert text == " a dogs" + " word" * 18 + "</s>"

    def test_captions_drawn(self, processor, rows):
        row = rows[0] | {"references": ["a", "b", "c"]}
        collator = MuEDataCollator(processor, captions_per_image=2)
        torch.manual_seed(0)
        drawn = {tuple(target_texts(processor, collator([row]))) for _ in range(60)}
        assert len(drawn) == 6
        repeated = MuEDataCollator(processor, captions_per_image=7, random_captions=False)([row])
        assert "".join(target_texts(processor, repeated)) == "".join(f" {letter}</s>" for letter in "abcabca")

    @pytest.mark.parametrize("premise", [None, "Two-cats.", ["a man", None]], ids=["without", "one", "each"])
    def test_entailment(self, processor, pairs, premise):
        rows = [row | {"premise": premise} for row in pairs]
        batch = MuEDataCollator(processor)(rows)
        statements = [text for row in rows for text in row["hypothesis"]]
        premises = (premise if isinstance(premise, list) else [premise] * 2) * 2
        inputs = processor(task="entailment", hypothesis=statements, premise=premises)
        assert torch.equal(batch["input_ids"], inputs["input_ids"])
        assert torch.equal(batch["attention_mask"], inputs["attention_mask"])
        answers = [processor.entailment_answers[label] for row in rows for label in row["label"]]
        assert target_texts(processor, batch) == [f" {answer}</s>" for answer in answers]
        for row, answer in enumerate(answers):
            prompt = inputs["decoder_input_ids"][row][inputs["decoder_attention_mask"][row] == 1].tolist()
            (ids,) = processor.encode_answers([answer])
            length = len(prompt) + len(ids)
            assert batch["decoder_input_ids"][row, :length].tolist() == prompt + ids
            assert batch["labels"][row, : len(prompt) - 1].eq(-100).all()
            assert batch["labels"][row, len(prompt) - 1 : length].tolist() == [*ids, 2]
            assert batch["labels"][row, length:].eq(-100).all()

    def test_entailment_options(self, processor, pairs):
        rows = [row | {"premise": "a picture"} for row in pairs]
        batch = MuEDataCollator(processor, use_premise=False, prompt_type="none")(rows)
        plain = MuEDataCollator(processor)(pairs)
        assert torch.equal(batch["input_ids"], plain["input_ids"])
        assert batch["decoder_input_ids"][:, 0].eq(0).all() and batch["labels"][:, 0].ne(-100).all()
        assert target_texts(processor, batch) == target_texts(processor, plain)

    def test_both_tasks(self, processor):
        dataset = SceneDataset(2, statements=3)
        rows = [dataset[0], dataset[1]]
        batch = MuEDataCollator(processor, captions_per_image=2, random_captions=False)(rows)
        assert len(batch["pixel_values"]) == 2 and len(batch["input_ids"]) == len(batch["labels"]) == 10
        expected = [
            text
            for row in rows
            for text in [*row["references"], *(processor.entailment_answers[label] for label in row["label"])]
        ]
        assert target_texts(processor, batch) == [f" {text}</s>" for text in expected]

    @pytest.mark.parametrize("statements", [0, 2], ids=["captions", "both"])
    def test_rows_belong_to_their_images(self, processor, statements):
        """Every target is predicted as if image, text and target were alone."""
        dataset = SceneDataset(2, statements=statements)
        model = tiny(processor)
        rows = [dataset[0], dataset[1]]
        batch = MuEDataCollator(processor, captions_per_image=2, random_captions=False)(rows)
        with torch.no_grad():
            logits = model(**batch).logits
            for row, labels in enumerate(batch["labels"]):
                text = row * len(batch["input_ids"]) // len(batch["labels"])
                length = batch["attention_mask"][text].sum()
                width = int((labels != -100).nonzero().max()) + 1
                alone = model(
                    input_ids=batch["input_ids"][text : text + 1, :length],
                    pixel_values=batch["pixel_values"][row * 2 // len(batch["labels"])][None],
                    decoder_input_ids=batch["decoder_input_ids"][row : row + 1, :width],
                )
                torch.testing.assert_close(alone.logits[0], logits[row, :width], atol=1e-4, rtol=1e-4)

    def test_image_features(self, processor, rows):
        model, collator = tiny(processor), MuEDataCollator(processor, random_captions=False)
        batch = collator(rows)
        with torch.no_grad():
            found = model.trunk_features(batch["pixel_values"])
            cached = collator(
                [row | {"image": None, "image_features": one} for row, one in zip(rows, found, strict=True)]
            )
            assert "pixel_values" not in cached
            assert torch.equal(model(**batch).loss, model(**cached).loss)

    def test_text_alone(self, processor, rows):
        """Rows without an image: what the decoder learns is what it would of each text alone."""
        model = tiny(processor)
        alone = [row | {"image": None} for row in rows]
        collator = MuEDataCollator(processor, captions_per_image=2, random_captions=False)
        batch, beside = collator(alone), collator(rows)
        assert batch.keys() == {"input_ids", "attention_mask", "decoder_input_ids", "labels"}
        assert all(torch.equal(values, beside[name]) for name, values in batch.items())
        with torch.no_grad():
            logits = model(**batch).logits
            for row, labels in enumerate(batch["labels"]):
                width = int((labels != -100).sum())
                one = model(
                    input_ids=batch["input_ids"][row // 2][None],
                    decoder_input_ids=batch["decoder_input_ids"][row, :width][None],
                )
                torch.testing.assert_close(one.logits[0], logits[row, :width], atol=1e-4, rtol=1e-4)
            assert not torch.allclose(model(**beside).logits, logits, atol=1e-2)

    def test_statements_without_images(self, processor, pairs):
        batch = MuEDataCollator(processor)([row | {"image": None} for row in pairs])
        assert "pixel_values" not in batch and len(batch["input_ids"]) == len(batch["labels"]) == 4

    @pytest.mark.parametrize("kind", ["image", "image_features"])
    def test_text_alone_among_images_is_refused(self, processor, rows, kind):
        whole = rows[0] if kind == "image" else rows[0] | {"image": None, "image_features": torch.zeros(16, 4, 4)}
        for order in (1, -1):
            with pytest.raises(ValueError, match="must all have an `image` or all have `image_features`"):
                MuEDataCollator(processor)([whole, rows[1] | {"image": None}][::order])
        # forgotten is not left out
        forgotten = [{name: value for name, value in row.items() if name != "image"} for row in rows]
        with pytest.raises(ValueError, match="must all have an `image`"):
            MuEDataCollator(processor)(forgotten)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"captions_per_image": 0}, "`captions_per_image` must be at least 1"),
            ({"max_words": 0}, "`max_words` must be at least 1"),
            ({"prompt_type": "src"}, "`prompt_type` must be"),
        ],
    )
    def test_bad_arguments(self, processor, arguments, match):
        with pytest.raises(ValueError, match=match):
            MuEDataCollator(processor, **arguments)

    def test_bad_rows(self, processor, rows, pairs):
        collator = MuEDataCollator(processor)
        cases = [
            ([], "at least one row"),
            ([rows[0], pairs[0]], "alike in their texts"),
            ([pairs[0], pairs[1] | {"hypothesis": ["a"], "label": ["neutral"]}], "alike in their texts"),
            ([pairs[0] | {"label": ["neutral"]}], r"`rows\[0\]` must have a label"),
            ([pairs[0] | {"label": ["yes", "no"]}], r"`rows\[0\]` must have a label of"),
            ([{"image": rows[0]["image"]}], "must have references or a hypothesis.*remove_unused_columns"),
            ([rows[0] | {"references": []}], "must have references or a hypothesis"),
            ([rows[0], rows[1] | {"image": None}], "must all have an `image`"),
            ([rows[0] | {"references": ["..."]}], "must hold words"),
        ]
        for bad, match in cases:
            with pytest.raises(ValueError, match=match):
                collator(bad)


class TestCaptionTexts:
    def test_rows(self, tmp_path, processor):
        lines = [{"captions": CAPTIONS[0]}, {"id": 3, "references": CAPTIONS[2]}]
        texts = CaptionTexts(write_lines(tmp_path / "texts.jsonl", lines))
        assert texts.references == [CAPTIONS[0], CAPTIONS[2]]
        assert [texts[i] for i in range(len(texts))] == [{"image": None, "references": CAPTIONS[i]} for i in (0, 2)]
        assert len(MuEDataCollator(processor)([texts[0], texts[1]])["labels"]) == 2

    @pytest.mark.parametrize(
        ("line", "match"),
        [
            ('{"captions": ["a dog"', r"JSON object in each line: .*texts\.jsonl: line 2 must be JSON"),
            ('["a dog"]', r"JSON object in each line: .*line 2 must be a JSON object"),
            ('{"text": "a dog", "other": []}', "a list of captions with words in one of .*got .*'text'.*leave such"),
            ('{"captions": "a dog"}', "a list of captions with words"),
            ('{"captions": []}', "a list of captions with words"),
            ('{"captions": ["a dog", " . "]}', "a list of captions with words"),
            ('{"captions": ["a dog", 7]}', "a list of captions with words"),
            ('{"captions": ["a dog", null]}', "a list of captions with words"),
        ],
        ids=["cut", "list", "no captions", "text", "empty", "punctuation", "number", "null"],
    )
    def test_bad_line(self, tmp_path, line, match):
        path = tmp_path / "texts.jsonl"
        path.write_text(f'{{"captions": ["two cats"]}}\n{line}\n')
        with pytest.raises(ValueError, match=match):
            CaptionTexts(path)

    def test_no_file(self, tmp_path):
        for path in (tmp_path, tmp_path / "missing.jsonl"):
            with pytest.raises(ValueError, match="`source` must be a JSONL file of captions, got .*which is none"):
                CaptionTexts(path)
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(ValueError, match="`source` must hold a line of captions at least, got none in .*drop it"):
            CaptionTexts(tmp_path / "empty.jsonl")


class Numbers(torch.utils.data.Dataset):
    """Rows that say which they are, and of which data set."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.name, range(self.count)[index]


def mixed(counts: list[int], shares: list[float], **options) -> tuple[Mixture, list]:
    """A mixture of data sets a, b, ... of these sizes, and its rows."""
    parts = [Numbers(name, count) for name, count in zip("abcdefgh", counts, strict=False)]
    mixture = Mixture(parts, shares, **{"batch_size": 3, "num_batches": 60} | options)
    return mixture, [mixture[index] for index in range(len(mixture))]


class TestMixture:
    @pytest.mark.parametrize(
        ("shares", "off"),
        [
            ([0.5, 0.3, 0.2], 1),
            ([1 / 3] * 3, 1),
            ([0.0, 0.97, 0.01, 0.02], 1),
            ([0.394, 0.003, 0.075, 0.001, 0.004, 0.452, 0.003, 0.068], 2),
        ],
        ids=["three", "alike", "rare", "eight"],
    )
    def test_shares_hold_at_every_point(self, shares, off):
        mixture, rows = mixed([4] * len(shares), shares, num_batches=200)
        assert len(mixture) == len(rows) == 600
        given = Counter()
        for batch in range(200):
            (name,) = {name for name, _ in rows[3 * batch : 3 * batch + 3]}
            given[name] += 1
            for part, share in zip("abcdefgh", shares, strict=False):
                assert abs(given[part] - share * (batch + 1)) < off
        assert given.keys() >= {part for part, share in zip("abcdefgh", shares, strict=False) if share > 0.005}
        assert given.keys() <= {part for part, share in zip("abcdefgh", shares, strict=False) if share}

    def test_every_row_once_an_epoch(self):
        # sizes that no batch divides, and one below a batch
        _, rows = mixed([7, 2, 10], [0.5, 0.2, 0.3])
        for name, count in (("a", 7), ("b", 2), ("c", 10)):
            seen = [number for part, number in rows if part == name]
            epochs = [seen[start : start + count] for start in range(0, len(seen) - count + 1, count)]
            assert len(epochs) > 4 and all(sorted(epoch) == list(range(count)) for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) > 1
            rest = seen[len(epochs) * count :]
            assert len(set(rest)) == len(rest)

    def test_order_follows_from_the_seed(self):
        mixture, rows = mixed([7, 9], [0.5, 0.5])
        assert rows == mixed([7, 9], [0.5, 0.5])[1] != mixed([7, 9], [0.5, 0.5], seed=1)[1]
        # what was read before does not matter, nor how much comes later
        again = pickle.loads(pickle.dumps(mixture))
        assert [again[index] for index in (100, 3, 177)] == [rows[index] for index in (100, 3, 177)]
        assert mixed([7, 9], [0.5, 0.5], num_batches=90)[1][:180] == rows
        # equally large data sets have orders of their own
        first, second = ([number for part, number in mixed([7, 7], [0.5, 0.5])[1] if part == name] for name in "ab")
        assert first != second

    def test_what_rows_draw_follows_from_the_seed_too(self):
        class Drawing(Numbers):
            def __getitem__(self, index):
                return int(torch.randint(1000, ()))

        def drawn(seed: int = 0) -> Mixture:
            return Mixture([Drawing("a", 5), Drawing("b", 3)], [0.5, 0.5], batch_size=2, num_batches=20, seed=seed)

        torch.manual_seed(0)
        before = torch.get_rng_state()
        rows = list(drawn())
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert [drawn()[index] for index in (30, 7)] == [rows[30], rows[7]]
        assert len(set(rows)) > 30 and rows != list(drawn(seed=1))

    @pytest.mark.parametrize("index", [-1, 180])
    def test_it_ends(self, index):
        mixture, rows = mixed([7, 9], [0.5, 0.5])
        with pytest.raises(IndexError):
            mixture[index]
        assert list(mixture) == rows

    @pytest.mark.parametrize(
        ("shares", "match"),
        [
            ([1.0], r"one share in \[0, 1\] for each of 2 sources, got \[1.0\]"),
            ([0.5, 0.3, 0.2], "for each of 2 sources"),
            ([1.5, -0.5], r"one share in \[0, 1\]"),
            ([float("nan"), 1.0], r"one share in \[0, 1\]"),
            ([0.5, 0.4], r"must sum to 1, got \[0.5, 0.4\], which sum to 0.9; scale them"),
            ([0.0, 0.0], "must sum to 1"),
        ],
        ids=["few", "many", "out of range", "nan", "sum", "none"],
    )
    def test_bad_shares(self, shares, match):
        with pytest.raises(ValueError, match=match):
            mixed([7, 9], shares)
        with pytest.raises(ValueError, match=match):
            check_shares(shares, 2)

    def test_shares_may_be_rounded(self):
        check_shares([0.1] * 10, 10)
        check_shares([0.333333, 0.333333, 0.333334], 3)

    def test_bad_parts_and_numbers(self):
        with pytest.raises(ValueError, match=r"`parts\[1\]` must have rows, got none for a share of 0.5; drop it"):
            mixed([7, 0], [0.5, 0.5])
        assert {name for name, _ in mixed([7, 0], [1.0, 0.0])[1]} == {"a"}
        with pytest.raises(ValueError, match=r"`parts\[0\]` must have a length, got generator; load it without"):
            Mixture([(row for row in ())], [1.0], batch_size=1, num_batches=1)
        for name in ("batch_size", "num_batches"):
            with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
                mixed([7, 9], [0.5, 0.5], **{name: 0})


class TestFeatureCache:
    @pytest.fixture
    def dataset(self, folder, captioning) -> Dataset:
        """Five rows on pictures of noise, the first and the last with the same one."""
        for number in range(4):
            noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3)).astype(np.uint8)
            PilImage.fromarray(noise).save(folder / "images" / f"{number}.png")
        rows = [{"image": f"images/{i % 4}.png", "image_id": i, "captions": [f"row {i}"]} for i in range(5)]
        return captioning(write_lines(folder / "rows.jsonl", rows), None)

    @pytest.fixture
    def computed(self, monkeypatch) -> list[int]:
        """The sizes of batches that reach the trunk; shards of two pictures."""
        sizes, compute = [], features._compute

        def counted(model, processor, images, *options):
            sizes.append(len(images))
            return compute(model, processor, images, *options)

        monkeypatch.setattr(features, "_compute", counted)
        monkeypatch.setattr(features, "SHARD", 2)
        return sizes

    def expected(self, model, processor, dataset):
        pixels = processor.image_processor([row["image"] for row in dataset], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return model.trunk_features(pixels), model.trunk_features(pixels.flip(-1))

    def test_equal_and_computed_once(self, tmp_path, processor, dataset, computed):
        model = tiny(processor)
        model.train()
        cache = partial(cache_trunk_features, model, processor, dataset, tmp_path / "features", batch_size=3)
        first, exact = cache(), cache(dtype=torch.float32)
        assert computed == [2, 2] * 2
        assert model.training and model.model.encoder.embed_images.training
        found, _ = self.expected(model.eval(), processor, dataset)
        for cached, tolerance in ((first, 1e-3), (exact, 1e-6)):
            assert len(cached) == 5
            for number, row in enumerate(cached):
                assert row["references"] == [f"row {number}"] and "image" not in row
                torch.testing.assert_close(row["image_features"], found[number], atol=tolerance, rtol=tolerance)
        again = cache()
        assert len(computed) == 4
        assert torch.equal(again[3]["image_features"], first[3]["image_features"])
        assert torch.equal(pickle.loads(pickle.dumps(again))[3]["image_features"], first[3]["image_features"])

    def test_resumes(self, tmp_path, processor, dataset, computed, monkeypatch):
        model, counted = tiny(processor), features._compute

        def interrupted(*arguments):
            if len(computed) == 1:
                raise KeyboardInterrupt
            return counted(*arguments)

        monkeypatch.setattr(features, "_compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_trunk_features(model, processor, dataset, tmp_path / "features")
        (folder,) = (tmp_path / "features").iterdir()
        assert [path.suffix for path in folder.iterdir()] == [".safetensors"]
        monkeypatch.setattr(features, "_compute", counted)
        cached = cache_trunk_features(model, processor, dataset, tmp_path / "features")
        assert computed == [2, 2]
        found, _ = self.expected(model, processor, dataset)
        torch.testing.assert_close(cached[3]["image_features"], found[3], atol=1e-3, rtol=1e-3)
        # Another data set on known pictures needs no trunk.
        cache_trunk_features(model, processor, dataset.select([4, 2]), tmp_path / "features")
        assert computed == [2, 2]

    def test_mirror(self, tmp_path, processor, dataset, computed):
        model = tiny(processor)
        cached = cache_trunk_features(model, processor, dataset, tmp_path, mirror=True, dtype=torch.float32)
        expected = self.expected(model, processor, dataset)
        torch.manual_seed(0)
        drawn = [cached[1]["image_features"] for _ in range(20)]
        nearest = [min((0, 1), key=lambda side: (one - expected[side][1]).abs().max()) for one in drawn]
        assert 5 <= sum(nearest) <= 15
        for one, side in zip(drawn, nearest, strict=True):
            torch.testing.assert_close(one, expected[side][1], atol=1e-6, rtol=1e-6)
        upright = cache_trunk_features(model, processor, dataset, tmp_path, dtype=torch.float32)
        assert computed == [4, 4]
        torch.testing.assert_close(upright[1]["image_features"], expected[0][1], atol=1e-6, rtol=1e-6)

    def views(self, cached: TrunkFeatureDataset, index: int) -> list[torch.Tensor]:
        """The features of all views of a row, in order."""
        row = cached.places[index]
        return [TrunkFeatureDataset([{}], [[place]])[0]["image_features"] for place in row]

    def test_crops(self, tmp_path, processor, dataset, computed):
        model = tiny(processor)
        cache = partial(cache_trunk_features, model, processor, dataset, dtype=torch.float32)
        cached = cache(tmp_path / "one", crops=3)
        assert computed == [8, 8]
        image = dataset[1]["image"].convert("RGB")
        names = features._views(
            image_digest(dataset.cast_column("image", Image(decode=False))[1]["image"]), False, 3, 0.75
        )
        drawn = [features._draw_view(image, name, 0.75) for name in names]
        assert drawn[0].size == (20, 20) and len({view.tobytes() for view in drawn}) == 4
        for view in drawn[1:]:
            assert all(15 <= side <= 20 for side in view.size)
            assert is_part(view, image) and not is_part(ImageOps.mirror(view), image)
        pixels = processor.image_processor(drawn, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found = model.trunk_features(pixels)
        for one, other in zip(self.views(cached, 1), found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        # in another folder, and with the random numbers of another run
        torch.manual_seed(5)
        elsewhere = cache(tmp_path / "two", crops=3)
        assert all(map(torch.equal, self.views(cached, 1), self.views(elsewhere, 1)))

    def test_views_are_computed_once_and_drawn(self, tmp_path, processor, dataset, computed):
        model = tiny(processor)
        cache = partial(cache_trunk_features, model, processor, dataset, tmp_path, dtype=torch.float32)
        cache()
        assert computed == [2, 2]
        cache(crops=2)
        assert computed[2:] == [4, 4]
        cached = cache(crops=3)
        assert computed[4:] == [2, 2]
        both = cache(crops=1, mirror=True)
        # a crop that may be mirrored is another view
        assert computed[6:] == [4, 4]
        cache(crops=3), cache(crops=1), cache(), cache(mirror=True), cache(crops=1, mirror=True)
        assert len(computed) == 8
        cache(crops=1, crop_side=0.5)
        assert computed[8:] == [2, 2]
        for data, count in ((cached, 4), (both, 3)):
            views = self.views(data, 2)
            assert len(views) == count
            torch.manual_seed(0)
            rows = [data[2]["image_features"] for _ in range(40 * count)]
            drawn = Counter(next(i for i, view in enumerate(views) if torch.equal(view, row)) for row in rows)
            assert len(drawn) == count and all(20 < times < 60 for times in drawn.values())

    def test_crops_are_mirrored_by_chance(self):
        image = PilImage.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8))
        mirrored = []
        for name in features._views("some image", True, 60, 0.5)[2:]:
            view = features._draw_view(image, name, 0.5)
            assert 7 <= view.width <= 14 and 4 <= view.height <= 9
            mirrored.append(is_part(ImageOps.mirror(view), image))
            assert mirrored[-1] != is_part(view, image)
        assert 18 < sum(mirrored) < 42
        upright = [features._draw_view(image, name, 0.5) for name in features._views("some image", False, 60, 0.5)[1:]]
        assert all(is_part(view, image) for view in upright)
        assert len({view.size for view in upright}) > 20

    def test_a_tiny_image_has_crops(self):
        image = PilImage.new("RGB", (1, 2))
        for name in features._views("tiny", True, 20, 0.1)[2:]:
            assert min(features._draw_view(image, name, 0.1).size) == 1

    def test_images_of_any_form_have_upright_views(self, tmp_path, processor, dataset):
        """A path, and a picture that its camera turned: its views are those of what one sees."""
        model = tiny(processor)
        upright = dataset[0]["image"].convert("RGB")
        turned = upright.rotate(90, expand=True)
        turned.getexif()[ExifTags.Base.Orientation] = 6
        upright.save(tmp_path / "upright.png")
        for image in (turned, str(tmp_path / "upright.png")):
            rows = [{"image": image}]
            cached = cache_trunk_features(
                model, processor, rows, tmp_path / "features", mirror=True, dtype=torch.float32
            )
            expected = self.expected(model, processor, [{"image": upright}])
            for one, other in zip(self.views(cached, 0), expected, strict=True):
                torch.testing.assert_close(one, other[0], atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("at_once", [2**18, 64 * 64], ids=["at once", "one by one"])
    def test_module(self, tmp_path, processor, dataset, computed, monkeypatch, at_once):
        """The rest of the trunk makes of the cached output of a module what the trunk gives."""
        # a trunk runs large images a few at a time on CPUs
        monkeypatch.setattr("mue_hf.model.vision_mue.PIXELS_AT_ONCE", at_once)
        model = tiny(processor)
        trunk = model.model.encoder.embed_images
        stages = trunk.encoder.stages
        options = {"mirror": True, "crops": 1, "dtype": torch.float32}
        cached = cache_trunk_features(model, processor, dataset, tmp_path, module="encoder.stages.1", **options)
        whole = cache_trunk_features(model, processor, dataset, tmp_path, **options)
        assert computed == [6, 6] * 2 and len(list(tmp_path.iterdir())) >= 2
        for index in range(5):
            inner, outer = torch.stack(self.views(cached, index)), torch.stack(self.views(whole, index))
            assert inner.shape[1:] == (12, 8, 8) and outer.shape[1:] == (16, 4, 4)
            with torch.no_grad():
                torch.testing.assert_close(stages[2](inner), outer, atol=1e-5, rtol=1e-5)
        assert not trunk.encoder.stages[1]._forward_hooks

    def test_what_comes_after_the_module_may_change(self, tmp_path, processor, dataset, computed):
        model = tiny(processor)
        trunk = model.model.encoder.embed_images
        cache = partial(cache_trunk_features, model, processor, dataset, tmp_path / "features")
        cache(module="encoder.stages.1")
        prints = [trunk_fingerprint(trunk), trunk_fingerprint(trunk, "encoder.stages.1")]
        with torch.no_grad():
            next(trunk.encoder.stages[2].parameters()).add_(1)
            next(trunk.encoder.stages[2].buffers()).add_(1)
        cache(module="encoder.stages.1")
        assert computed == [2, 2]
        assert trunk_fingerprint(trunk, "encoder.stages.1") == prints[1] != trunk_fingerprint(trunk) != prints[0]
        for change in (trunk.encoder.stages[1].parameters(), trunk.embedder.buffers()):
            prints.append(trunk_fingerprint(trunk, "encoder.stages.1"))
            next(change).data.add_(1)
            assert trunk_fingerprint(trunk, "encoder.stages.1") != prints[-1]
        # one module's output is not another's
        cache(module="encoder.stages.0"), cache(module="encoder.stages.1")
        assert len(list((tmp_path / "features").iterdir())) == 3 and computed == [2, 2] * 3

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"crops": -1}, "`crops` must be at least 0"),
            ({"crop_side": 0.0}, r"`crop_side` a share in \(0, 1\), got 0 and 0.0"),
            ({"crop_side": 1.0}, r"`crop_side` a share in \(0, 1\)"),
            ({"module": "encoder.stages.7"}, r"must name a module of the trunk, got 'encoder.stages.7'.*'embedder'"),
            ({"module": "embedder.pooler"}, "must name a module with weights, got 'embedder.pooler'; name the one"),
        ],
        ids=lambda value: "" if isinstance(value, str) else str(value),
    )
    def test_bad_options(self, tmp_path, processor, dataset, options, match):
        with pytest.raises(ValueError, match=match):
            cache_trunk_features(tiny(processor), processor, dataset, tmp_path / "features", **options)
        assert not (tmp_path / "features").exists()

    def test_key(self, tmp_path, processor, dataset, computed):
        model = tiny(processor)
        small = MuEProcessor(MuEImageProcessorPil(size={"height": 32, "width": 32}), processor.tokenizer)
        before = trunk_fingerprint(model.model.encoder.embed_images)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        assert trunk_fingerprint(model.model.encoder.embed_images) == before
        cache_trunk_features(model, processor, dataset, tmp_path / "features")
        assert cache_trunk_features(model, small, dataset, tmp_path / "features")[0]["image_features"].shape[-1] == 2
        next(model.model.encoder.embed_images.buffers()).data += 1
        cache_trunk_features(model, processor, dataset, tmp_path / "features")
        assert len(list((tmp_path / "features").iterdir())) == 3 and len(computed) == 6

    def test_an_error_leaves_batch_norms_folded(self, processor):
        model = tiny(processor).eval()
        model.fold_batch_norms()
        folded = trunk_fingerprint(model.model.encoder.embed_images)
        with pytest.raises(KeyboardInterrupt), unfolded(model):
            assert trunk_fingerprint(model.model.encoder.embed_images) != folded
            raise KeyboardInterrupt
        assert trunk_fingerprint(model.model.encoder.embed_images) == folded

    def test_scenes(self, tmp_path, processor):
        cached = cache_trunk_features(tiny(processor), processor, SceneDataset(2, statements=1), tmp_path)
        batch = MuEDataCollator(processor)([cached[0], cached[1]])
        assert batch["image_features"].shape[0] == 2 and len(batch["input_ids"]) == 4

    def test_bad(self, tmp_path, processor, dataset):
        model = tiny(processor)
        with pytest.raises(ValueError, match="known length.*without streaming"):
            cache_trunk_features(model, processor, dataset.to_iterable_dataset(), tmp_path)
        with pytest.raises(ValueError, match="`image` must be an image or a path, got NoneType"):
            image_digest(None)
        cache_trunk_features(model, processor, dataset, tmp_path / "features")
        (shard,) = (tmp_path / "features").glob("*/*")
        shard.write_bytes(shard.read_bytes()[:100])
        with pytest.raises(ValueError, match="a damaged one, .*delete it"):
            cache_trunk_features(model, processor, dataset, tmp_path / "features")
        with torch.no_grad():
            for name, weight in model.model.encoder.embed_images.named_parameters():
                weight.mul_(1e6 if "normalization" in name else 1)
        with pytest.raises(ValueError, match="pass torch.float32"):
            cache_trunk_features(model, processor, dataset, tmp_path / "features")
