"""Data for fine-tuning: captioning and visual entailment from the Hub, folders, JSONL or parquet, and the collator.

Whatever the source, rows of captioning are `image`, `image_id` and `references`, those of entailment `image`,
`image_id`, `premise`, `hypothesis` and `label`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import torch
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetsError
from PIL import Image as PilImage
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm
from transformers.utils import logging

from ..model.processing_mue import CAPTION_PROMPT, PUNCTUATION, MuEProcessor

logger = logging.get_logger(__name__)

CAPTIONING_FEATURES = Features({"image": Image(), "image_id": Value("string"), "references": List(Value("string"))})
ENTAILMENT_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "premise": Value("string"),
        "hypothesis": Value("string"),
        "label": Value("string"),
    }
)
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

# The first that the source has; in braces a path made from columns (COCO Karpathy, SNLI-VE).
IMAGE_COLUMNS = ("image", "file_name", "{filepath}/{filename}", "filename", "{Flickr30K_ID}.jpg")
CAPTION_COLUMNS = ("references", "captions", "sentences", "caption", "text")
PREMISE_COLUMNS = ("premise", "sentence1")
HYPOTHESIS_COLUMNS = ("hypothesis", "sentence2")
LABEL_COLUMNS = ("label", "gold_label")
LABELS = tuple(MuEProcessor.entailment_answers)
ANSWER_LABELS = {answer: label for label, answer in MuEProcessor.entailment_answers.items()}


class _Faults:
    """What is wrong with the rows of a source, by reason: an error, or a count where bad ones are to be left out."""

    def __init__(self, source: str, skip: bool, counts: Counter | None) -> None:
        self.source, self.skip = source, skip
        self.counts = Counter() if counts is None else counts
        self.found: Counter = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, row: int, detail: str) -> None:
        self.counts[reason] += 1
        self.found[reason] += 1
        self.first.setdefault(reason, f"row {row}: {detail}")

    def report(self) -> None:
        if not self.found:
            return
        what = "; ".join(f"{reason}: {count} (first in {self.first[reason]})" for reason, count in self.found.items())
        self.found = Counter()
        if not self.skip:
            raise ValueError(
                f"`source` must hold good rows only, got in {self.source}: {what}; "
                "mend them, or pass `skip_bad=True` to leave them out."
            )
        logger.warning(f"Left out of {self.source}: {what}.")


def _names(template: str) -> list[str]:
    """The columns that a path such as "{filepath}/{filename}" is made from, or the one column that is named."""
    return [name for _, name, _, _ in Formatter().parse(template) if name] or [template]


@dataclass
class _Reader:
    """A source of rows, opened; the fields are the arguments of `load_captioning` of the same name."""

    source: str | os.PathLike
    split: str | None = "train"
    image_column: str | None = None
    id_column: str | None = None
    split_column: str | None = None
    image_root: str | os.PathLike | None = None
    keep_columns: Sequence[str] = ()
    streaming: bool = False
    skip_bad: bool = False
    skipped: Counter | None = None
    load_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        path = Path(self.source)
        self.is_file = path.is_file()
        self.root = Path(self.image_root or (path.parent if self.is_file else path)).absolute()
        if self.is_file and path.suffix not in FORMATS:
            raise ValueError(f"`source` must be a file of the kinds {list(FORMATS)}, got {str(path)!r}; convert it.")
        if not path.exists() and (path.suffix in FORMATS or path.is_absolute()):
            raise ValueError(f"`source` must exist, got {str(path)!r}; check the path.")
        self.rows = self._open(path)
        self.columns = self.rows.column_names or list(next(iter(self.rows), {}))
        if self.is_file and self.split is not None and self.split_column is None:
            self.split_column = self.column("split_column", None, ("split",), hint="; pass `split=None` for all rows")
        for name in (self.id_column, self.split_column, *self.keep_columns):
            self.column("columns", name, ())
        if self.id_column is None and "image_id" in self.columns:
            self.id_column = "image_id"
        self.image_column = self.column("image_column", self.image_column, IMAGE_COLUMNS)
        # Encoded images are passed on as they are: decoding them here would be wasted.
        if isinstance((self.rows.features or {}).get(self.image_column), Image | dict):
            self.rows = self.rows.cast_column(self.image_column, Image(decode=False))
        self.faults = _Faults(str(self.source), self.skip_bad, self.skipped)
        self.checked_paths: dict[str, str | None] = {}

    def _open(self, path: Path) -> Dataset | IterableDataset:
        options = (self.load_options or {}) | {"streaming": self.streaming}
        whole = self.split is None or self.split_column is not None
        try:
            if self.is_file:
                return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", **options)
            loaded = load_dataset(str(self.source), split=None if whole else self.split, **options)
        except (DatasetsError, OSError, ValueError) as error:
            raise ValueError(
                f"`source` must be a file, a folder or a dataset of the Hub that `datasets` can read, got "
                f"{str(self.source)!r} with split {self.split!r}: {error}"
            ) from error
        return concatenate_datasets(list(loaded.values())) if whole else loaded

    def column(self, argument: str, given: str | None, defaults: Sequence[str], hint: str = "") -> str | None:
        """`given`, or the first of `defaults` that the source has."""
        candidates = defaults if given is None else (given,)
        for candidate in candidates:
            if all(name in self.columns for name in _names(candidate)):
                return candidate
        if not candidates:
            return None
        raise ValueError(
            f"`{argument}` must name a column of the source, got none of {list(candidates)} among {self.columns} in "
            f"{self.source}; name the right one{hint}."
        )

    @cached_property
    def wanted_splits(self) -> set[str] | None:
        return None if self.split is None or self.split_column is None else set(self.split.split("+"))

    def _image_fault(self, stored: bytes | None, path: str | None) -> str | None:
        if stored:
            return _decoding_fault(BytesIO(stored))
        if path is None:
            return "there is none"
        if "://" in path:
            return None
        if path not in self.checked_paths:
            self.checked_paths[path] = _decoding_fault(path)
        return self.checked_paths[path]

    def _image_path(self, row: dict[str, Any]) -> str | None:
        """The path as the source gives it, None where it gives none."""
        names = _names(self.image_column)
        if any(row[name] is None or row[name] == "" for name in names):
            return None
        return self.image_column.format(**row) if "{" in self.image_column else row[self.image_column]

    def normalized(
        self, number: int, row: dict[str, Any], stored: bytes | None, path: str | None, fields: Callable
    ) -> dict[str, Any] | None:
        """One row in the schema, without its image's bytes; None if it is bad or of another split."""
        if self.wanted_splits is not None and row[self.split_column] not in self.wanted_splits:
            return None
        located = path if stored or path is None or "://" in path else str(self.root / path)
        if fault := self._image_fault(stored, located):
            self.faults.add("missing or unreadable image", number, fault)
            return None
        texts = fields(row, lambda reason, detail: self.faults.add(reason, number, detail))
        if texts is None:
            return None
        if self.id_column is not None:
            image_id = str(row[self.id_column])
        elif path is None:
            image_id = str(number)
        else:
            image_id = str(Path(path).relative_to(self.root)) if Path(path).is_relative_to(self.root) else path
        return {"path": located, "image_id": image_id, **texts, **{name: row[name] for name in self.keep_columns}}

    def read(self, columns: Sequence[str], fields: Callable, features: Features, gather: bool) -> Any:
        """All rows in the schema.

        Args:
            columns: those that `fields` needs.
            fields: (row, fault(reason, detail)) to the texts of the schema, or None for a bad row.
            features: the schema.
            gather: whether "references" of rows with the same image are joined.
        """
        needed = {*columns, *self.keep_columns, self.id_column, self.split_column} - {None}
        embedded = isinstance((self.rows.features or {}).get(self.image_column), Image)
        if not embedded:
            needed |= set(_names(self.image_column))
        if self.keep_columns:
            known = self.rows.features or {}
            features = Features(features | {name: known.get(name, Value("string")) for name in self.keep_columns})
        if self.streaming:
            return self._stream(fields, features, embedded)
        return self._table(sorted(needed), fields, features, embedded, gather)

    def _stream(self, fields: Callable, features: Features, embedded: bool) -> IterableDataset:
        def batch(columns: dict[str, list], numbers: list[int]) -> dict[str, list]:
            kept: dict[str, list] = {name: [] for name in features}
            for index, number in enumerate(numbers):
                row = {name: values[index] for name, values in columns.items()}
                image = row[self.image_column] if embedded else {"bytes": None, "path": self._image_path(row)}
                image = image or {"bytes": None, "path": None}
                one = self.normalized(number, row, image["bytes"], image["path"], fields)
                if one is not None:
                    one["image"] = image | {"path": one["path"]}
                    for name in features:
                        kept[name].append(one[name])
            self.faults.report()
            return kept

        rows = self.rows.map(batch, with_indices=True, batched=True, batch_size=16, remove_columns=self.columns)
        # `features=` of `map` would leave the images undecoded.
        return rows.cast(features)

    def _table(self, needed: list[str], fields: Callable, features: Features, embedded: bool, gather: bool) -> Dataset:
        kept: dict[str, dict[str, Any]] = {}
        seen_splits: set[str] = set()
        pictures = self._embedded() if embedded else None
        for number, row in enumerate(tqdm(self.rows.select_columns(needed), desc="checking", unit="row", delay=2)):
            stored, path = next(pictures) if embedded else (None, self._image_path(row))
            if self.split_column is not None:
                seen_splits.add(row[self.split_column])
            one = self.normalized(number, row, stored, path, fields)
            if one is None:
                continue
            key = one["image_id"] if gather else str(number)
            if key in kept:
                kept[key]["references"] += one["references"]
            else:
                kept[key] = one | {"number": number}
        self.faults.report()
        if not kept:
            raise ValueError(
                f"`source` must hold rows of the split {self.split!r}, got none in {self.source} "
                f"(splits there: {sorted(map(str, seen_splits)) or 'its own'}); check `split`."
            )
        if not embedded:
            columns = {name: [row["path" if name == "image" else name] for row in kept.values()] for name in features}
            return Dataset.from_dict(columns, features=features)
        # Texts beside the images as they are, then a choice of rows: no image is copied.
        by_number = {row["number"]: row for row in kept.values()}
        rows = [by_number.get(number, {}) for number in range(len(self.rows))]
        texts = Dataset.from_dict(
            {name: [row.get(name) for row in rows] for name in features if name != "image"},
            features=Features({name: kind for name, kind in features.items() if name != "image"}),
        )
        images = self.rows.select_columns([self.image_column]).cast_column(self.image_column, Image())
        if self.image_column != "image":
            images = images.rename_column(self.image_column, "image")
        return concatenate_datasets([images, texts], axis=1).select(list(by_number))

    def _embedded(self) -> Iterator[tuple[bytes | None, str | None]]:
        """For each row the encoded image if it is stored there, and its path."""
        for table in self.rows.select_columns([self.image_column]).with_format("arrow").iter(100):
            for image in table.column(self.image_column):
                yield (image["bytes"].as_py(), image["path"].as_py()) if image.is_valid else (None, None)


def _decoding_fault(file: str | BytesIO) -> str | None:
    """Why an image can't be decoded; JPEGs are, at an eighth of their size, which takes a fraction of the time."""
    try:
        with PilImage.open(file) as image:
            image.draft("RGB", (1, 1))
            image.load()
    # Pillow's decoders raise many kinds of errors.
    except Exception as error:
        return str(error) or type(error).__name__
    return None


Fault = Callable[[str, str], None]


def _has_words(text: Any) -> bool:
    return isinstance(text, str) and bool(text.translate(PUNCTUATION).strip())


def _captions(columns: Sequence[str], row: dict[str, Any], fault: Fault) -> dict[str, Any] | None:
    captions = []
    for name in columns:
        value = row[name]
        for caption in value if isinstance(value, list) else [value]:
            caption = caption.get("raw") if isinstance(caption, dict) else caption
            if _has_words(caption):
                captions.append(caption)
            else:
                fault("caption without words", f"{name} holds {caption!r}")
    if not captions:
        fault("no caption", f"{list(columns)} hold none")
        return None
    return {"references": captions}


@dataclass(frozen=True)
class _Pair:
    """Columns of an entailment source; `names` are the classes of a column of numbers."""

    premise: str | None
    hypothesis: str
    label: str
    names: Sequence[str] | None

    def __call__(self, row: dict[str, Any], fault: Fault) -> dict[str, Any] | None:
        premise = None if self.premise is None else row[self.premise]
        hypothesis, label = row[self.hypothesis], row[self.label]
        if self.names is not None and isinstance(label, int) and 0 <= label < len(self.names):
            label = self.names[label]
        if isinstance(label, str):
            label = ANSWER_LABELS.get(label, label)
        if not _has_words(hypothesis):
            return fault("hypothesis without words", f"{self.hypothesis} holds {hypothesis!r}")
        if premise is not None and not _has_words(premise):
            return fault("premise without words", f"{self.premise} holds {premise!r}; null stands for none")
        if label not in LABELS:
            known = [*LABELS, *ANSWER_LABELS]
            return fault(
                "unknown label", f"{self.label} holds {label!r}, not one of {known}; numbers need `label_names`"
            )
        return {"premise": premise, "hypothesis": hypothesis, "label": label}


def load_captioning(
    source: str | os.PathLike,
    split: str | None = "train",
    *,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    image_root: str | os.PathLike | None = None,
    keep_columns: Sequence[str] = (),
    streaming: bool = False,
    skip_bad: bool = False,
    skipped: Counter | None = None,
    **load_options: Any,
) -> Dataset | IterableDataset:
    """
    Images with their captions, one row per image, checked.

    Args:
        source (`str` or `os.PathLike`):
            A JSONL, JSON, CSV or parquet file, whose images are paths relative to it or embedded; a folder, such as an
            `imagefolder` with metadata.jsonl; or a dataset of the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Which rows; "a+b" for both, None for all.
        image_column (`str`, *optional*):
            Column of the images or their paths, or a path made from columns such as "{filepath}/{filename}". Default:
            the first that exists of "image", "file_name", "{filepath}/{filename}", "filename", "{Flickr30K_ID}.jpg".
        caption_column (`str` or sequence of `str`, *optional*):
            Column or columns with a caption, a list of captions, or a list of `{"raw": caption}` as in COCO Karpathy.
            Default: the first that exists of "references", "captions", "sentences", "caption", "text". Rows of the
            same image are joined, unless streamed.
        id_column (`str`, *optional*):
            Column that tells images apart. Default: "image_id" if there is one, else the image's path, else the row's
            number.
        split_column (`str`, *optional*):
            Column with each row's split. Default: "split" for files; none for folders and the Hub, which have splits
            of their own. Where it is named, `split` chooses by it among all of those.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder of relative paths. Default: that of the file.
        keep_columns (sequence of `str`, *optional*):
            Further columns to keep as they are.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether rows are read, and checked, only when they are needed.
        skip_bad (`bool`, *optional*, defaults to `False`):
            Whether bad captions and rows are left out and counted in a warning.
        skipped (`Counter`, *optional*):
            Where to add how many are bad, by reason.
        load_options (*optional*):
            Further arguments of `datasets.load_dataset`: `name`, `revision`, `field="images"` for Karpathy's JSON.

    Returns:
        `Dataset`, or `IterableDataset` if streamed: "image", "image_id", "references" (list of `str`, as written), and
        `keep_columns`.

    Raises:
        ValueError: if the source or the split does not exist, a column is missing, or rows are bad: an image that is
            missing or not an image, a caption without words, no caption.
    """
    options = (image_column, id_column, split_column, image_root, keep_columns, streaming, skip_bad, skipped)
    reader = _Reader(source, split, *options, load_options)
    columns = [caption_column] if caption_column is None or isinstance(caption_column, str) else caption_column
    columns = [reader.column("caption_column", name, CAPTION_COLUMNS) for name in columns]
    return reader.read(columns, partial(_captions, columns), CAPTIONING_FEATURES, gather=True)


def load_entailment(
    source: str | os.PathLike,
    split: str | None = "train",
    *,
    image_column: str | None = None,
    premise_column: str | None = None,
    hypothesis_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    image_root: str | os.PathLike | None = None,
    keep_columns: Sequence[str] = (),
    streaming: bool = False,
    skip_bad: bool = False,
    skipped: Counter | None = None,
    **load_options: Any,
) -> Dataset | IterableDataset:
    """
    Pairs of an image, with or without a premise, and a hypothesis, one row per pair, checked.

    Args:
        premise_column (`str`, *optional*):
            Column of the premise, null where there is none. Default: "premise" or "sentence1" if there is one.
        hypothesis_column (`str`, *optional*):
            Default: "hypothesis" or "sentence2".
        label_column (`str`, *optional*):
            Column of labels: "entailment", "neutral", "contradiction", or the answers "yes", "maybe", "no", or numbers
            of named classes. Default: "label" or "gold_label".
        label_names (sequence of `str`, *optional*):
            The classes by number, where the source does not name them.
        source, split, image_column, id_column, split_column, image_root, keep_columns, streaming, skip_bad, skipped,
        load_options:
            See [`load_captioning`].

    Returns:
        `Dataset`, or `IterableDataset` if streamed: "image", "image_id", "premise" (`str` or None), "hypothesis" (both
        as written), "label" ("entailment", "neutral" or "contradiction"), and `keep_columns`.

    Raises:
        ValueError: if the source or the split does not exist, a column is missing, or rows are bad: an image that is
            missing or not an image, a text without words, or an unknown label ("-" of SNLI among them).
    """
    options = (image_column, id_column, split_column, image_root, keep_columns, streaming, skip_bad, skipped)
    reader = _Reader(source, split, *options, load_options)
    if premise_column is not None or set(PREMISE_COLUMNS) & set(reader.columns):
        premise_column = reader.column("premise_column", premise_column, PREMISE_COLUMNS)
    hypothesis_column = reader.column("hypothesis_column", hypothesis_column, HYPOTHESIS_COLUMNS)
    label_column = reader.column("label_column", label_column, LABEL_COLUMNS)
    kind = (reader.rows.features or {}).get(label_column)
    if label_names is None and isinstance(kind, ClassLabel):
        label_names = kind.names
    columns = [name for name in (premise_column, hypothesis_column, label_column) if name is not None]
    pair = _Pair(premise_column, hypothesis_column, label_column, label_names)
    return reader.read(columns, pair, ENTAILMENT_FEATURES, gather=False)


class CaptionPairs(TorchDataset):
    """
    One row per caption, as OFA counts its epochs: a row of `rows` for each of its captions, with that one alone.

    Args:
        rows (sequence of `dict`): images, or their features, with captions.
        references (sequence of sequences of `str`): the captions of each row.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], references: Sequence[Sequence[str]]) -> None:
        self.rows = rows
        self.places = [(row, caption) for row, captions in enumerate(references) for caption in captions]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, caption = self.places[index]
        return self.rows[row] | {"references": [caption]}


class _Text(NamedTuple):
    """One encoder row: its tokens, what the decoder reads before its targets, and the targets with </s>."""

    source: list[int]
    prompt: list[int]
    targets: list[list[int]]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@dataclass
class MuEDataCollator:
    """
    Makes training batches of rows of captioning, of entailment, or of both at once.

    A row has "image" (anything that the processor reads) or "image_features" [channels, rows, columns] (see
    [`cache_trunk_features`]), and "references", or "hypothesis", "label" and optionally "premise", which may be lists
    (several statements on one image), or all of these. The image is encoded once whatever hangs on it:

    * captions alone are `captions_per_image` decoder rows per image, which share its prompt too;
    * statements are one row each in encoder and decoder; where captions are beside them, these are such rows as well.

    Texts become what OFA trains on: captions in lower case, without punctuation, of at most `max_words` words;
    hypothesis and premise normalised and put in the prompt; the answer "yes", "maybe" or "no".

    Args:
        processor ([`MuEProcessor`]):
            Makes tokens and pixels.
        captions_per_image (`int`, *optional*, defaults to 1):
            Captions of each image in a batch; an image with fewer references repeats some.
        random_captions (`bool`, *optional*, defaults to `True`):
            Whether they are drawn at random; False takes the first ones, for evaluation.
        max_words (`int`, *optional*, defaults to 20):
            Words of a caption.
        use_premise (`bool`, *optional*, defaults to `True`):
            Whether the prompt holds the premise where a row has one.
        prompt_type (`str`, *optional*, defaults to `"prev_output"`):
            OFA's name for what the decoder reads before the answer: "prev_output", the prompt of the encoder, or
            "none", `<s>` alone. Only the answer and `</s>` are trained.

    A call with a list of rows, one per image, returns:
        `dict[str, torch.Tensor]`:
        - **input_ids**, **attention_mask** [texts, text tokens], padded on the right; text t belongs to image
          t // (texts // images).
        - **pixel_values** [images, 3, height, width] or **image_features** [images, channels, rows, columns].
        - **decoder_input_ids** [targets, tokens], padded on the right with pad tokens, and **labels** of the same
          shape, -100 where nothing is to be learnt; target t belongs to text t // (targets // texts).

    Raises:
        ValueError: if an argument is out of range, or on a call a row has no texts or no image, texts have no words, a
            label is unknown, or rows differ in their number of texts.
    """

    processor: MuEProcessor
    captions_per_image: int = 1
    random_captions: bool = True
    max_words: int = 20
    use_premise: bool = True
    prompt_type: str = "prev_output"

    def __post_init__(self) -> None:
        for name in ("captions_per_image", "max_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}; pass more.")
        if self.prompt_type not in ("prev_output", "none"):
            raise ValueError(f'`prompt_type` must be "prev_output" or "none", got {self.prompt_type!r}; pass either.')

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("`rows` must hold at least one row, got none; leave empty batches out.")
        answers = self.processor.encode_answers(list(self.processor.entailment_answers.values()))
        answer_ids = dict(zip(self.processor.entailment_answers, answers, strict=True))
        texts = [self._texts(row, f"rows[{index}]", answer_ids) for index, row in enumerate(rows)]
        # For each row the number of targets of each of its texts.
        shapes = {tuple(len(text.targets) for text in row) for row in texts}
        if len(shapes) > 1:
            raise ValueError(
                f"`rows` must be alike in their texts, got {sorted(shapes)} targets of each; batch rows with equally "
                "many statements, and with captions either all or none."
            )
        flat = [text for row in texts for text in row]
        sources = [torch.tensor(text.source) for text in flat]
        pairs = [(text.prompt, target) for text in flat for target in text.targets]
        inputs = [torch.tensor([*prompt, *target[:-1]]) for prompt, target in pairs]
        labels = [torch.tensor([-100] * (len(prompt) - 1) + target) for prompt, target in pairs]
        pad = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(source) for source in sources], batch_first=True),
            "decoder_input_ids": pad_sequence(inputs, batch_first=True, padding_value=pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            **self._images(rows),
        }

    def _texts(self, row: dict[str, Any], name: str, answer_ids: dict[str, list[int]]) -> list[_Text]:
        """What the row trains; with statements beside them captions are texts of one target each."""
        start = self.processor.tokenizer.bos_token_id
        texts = []
        if references := row.get("references"):
            source = self.processor(text=CAPTION_PROMPT, return_tensors=None)["input_ids"][0]
            order = torch.randperm(len(references)).tolist() if self.random_captions else range(len(references))
            chosen = [references[order[count % len(order)]] for count in range(self.captions_per_image)]
            texts = [_Text(source, [start], self.processor.encode_captions(chosen, self.max_words))]
        if "hypothesis" in row:
            texts = [_Text(text.source, text.prompt, [target]) for text in texts for target in text.targets]
            hypotheses, labels = _as_list(row["hypothesis"]), _as_list(row["label"])
            premises = _as_list(row.get("premise")) if self.use_premise else [None]
            premises = premises * len(hypotheses) if len(premises) == 1 else premises
            if not len(hypotheses) == len(labels) == len(premises):
                raise ValueError(
                    f"`{name}` must have a label, and a premise if any, for each hypothesis, got {len(hypotheses)} "
                    f"hypotheses, {len(labels)} labels, {len(premises)} premises; make the lists equally long."
                )
            sources = self.processor(
                task="entailment", hypothesis=hypotheses, premise=premises, padding=False, return_tensors=None
            )["input_ids"]
            for source, label in zip(sources, labels, strict=True):
                if label not in answer_ids:
                    raise ValueError(f"`{name}` must have a label of {list(answer_ids)}, got {label!r}; rename it.")
                # The prompt ends where the answer begins: without </s>.
                prompt = source[:-1] if self.prompt_type == "prev_output" else [start]
                texts.append(_Text(source, prompt, [[*answer_ids[label], self.processor.tokenizer.eos_token_id]]))
        if not texts:
            raise ValueError(
                f"`{name}` must have references or a hypothesis, got {sorted(row)}; load it with `load_captioning` or "
                "`load_entailment`, and pass `remove_unused_columns=False` to the trainer."
            )
        return texts

    def _images(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        kinds = {tuple(key for key in ("image", "image_features") if row.get(key) is not None) for row in rows}
        if kinds == {("image_features",)}:
            return {"image_features": torch.stack([torch.as_tensor(row["image_features"]) for row in rows])}
        if kinds != {("image",)}:
            raise ValueError(
                f"`rows` must all have an `image` or all have `image_features`, got {sorted(kinds)}; leave out those "
                "without."
            )
        return {
            "pixel_values": self.processor.image_processor([row["image"] for row in rows], return_tensors="pt")[
                "pixel_values"
            ]
        }


__all__ = [
    "CAPTIONING_FEATURES",
    "ENTAILMENT_FEATURES",
    "CaptionPairs",
    "MuEDataCollator",
    "load_captioning",
    "load_entailment",
]
