"""What all loaders share: files, folders and data sets of the Hub, opened, their images and columns checked."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from itertools import chain
from os import PathLike
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PilImage
from tqdm import tqdm
from transformers.utils import logging

from ..files import json_lines
from ..model.processing_mue import PUNCTUATION

logger = logging.get_logger(__name__)

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# The first that the source has; in braces a path made from columns (COCO Karpathy, SNLI-VE).
IMAGE_COLUMNS = ("image", "file_name", "{filepath}/{filename}", "filename", "{Flickr30K_ID}.jpg")

#: Takes the reason why a row is bad, and what is there.
Fault = Callable[[str, str], None]
#: The texts of a row in the schema; None for a bad row, of which the fault has been reported.
Fields = Callable[[dict[str, Any], Fault], dict[str, Any] | None]


def has_words(text: Any) -> bool:
    """Whether `text` is a text with more than punctuation."""
    return isinstance(text, str) and bool(text.translate(PUNCTUATION).strip())


def _names(template: str) -> list[str]:
    """The columns that a path such as "{filepath}/{filename}" is made from, or the one column that is named."""
    return [name for _, name, _, _ in Formatter().parse(template) if name] or [template]


class Reader:
    """A source of rows, opened; the arguments are those of [`load_captioning`]."""

    def __init__(
        self,
        source: str | PathLike,
        split: str | None,
        *,
        image_column: str | None = None,
        id_column: str | None = None,
        split_column: str | None = None,
        image_root: str | PathLike | None = None,
        keep_columns: Sequence[str] = (),
        streaming: bool = False,
        skip_bad: bool = False,
        skipped: Counter | None = None,
        **load_options: Any,
    ) -> None:
        path = Path(source)
        is_file = path.is_file()
        if is_file and path.suffix not in FORMATS:
            raise ValueError(f"`source` must be a file of the kinds {list(FORMATS)}, got {str(path)!r}; convert it.")
        if not path.exists() and (path.suffix in FORMATS or path.is_absolute()):
            raise ValueError(f"`source` must exist, got {str(path)!r}; check the path.")
        if is_file and path.suffix == ".jsonl":
            _check_lines(path)
        self.source, self.split, self.keep_columns, self.streaming = str(source), split, keep_columns, streaming
        self.root = Path(image_root or (path.parent if is_file else path)).absolute()
        self.rows = self._open(is_file, split is None or split_column is not None, load_options)
        self.columns = self.rows.column_names or list(next(iter(self.rows), {}))
        if is_file and split is not None and split_column is None:
            split_column = self.column("split_column", None, ("split",), hint="; pass `split=None` for all rows")
        for name in (id_column, split_column, *keep_columns):
            self.column("columns", name, ())
        self.id_column = "image_id" if id_column is None and "image_id" in self.columns else id_column
        self.split_column = split_column
        self.image_column = self.column("image_column", image_column, IMAGE_COLUMNS)
        # Encoded images are passed on as they are: decoding them here would be wasted.
        if isinstance(self._kind(self.image_column), Image | dict):
            self.rows = self.rows.cast_column(self.image_column, Image(decode=False))
        self.embedded = isinstance(self._kind(self.image_column), Image)
        self.checked_paths: dict[str, str | None] = {}
        # What is wrong with rows: number by reason, and the first of each.
        self.faults: Counter = Counter()
        self.first_faults: dict[str, str] = {}
        self.skip_bad, self.skipped = skip_bad, skipped

    def _open(self, is_file: bool, whole: bool, options: dict[str, Any]) -> Dataset | IterableDataset:
        options = options | {"streaming": self.streaming}
        try:
            if is_file:
                return load_dataset(
                    FORMATS[Path(self.source).suffix], data_files=self.source, split="train", **options
                )
            loaded = load_dataset(self.source, split=None if whole else self.split, **options)
        except (DatasetsError, OSError, ValueError) as error:
            raise ValueError(
                "`source` must be a file, a folder or a dataset of the Hub that `datasets` can read, got "
                f"{self.source!r} with split {self.split!r}: {error.__cause__ or error}"
            ) from error
        return concatenate_datasets(list(loaded.values())) if whole else loaded

    def _kind(self, column: str) -> Any:
        return (self.rows.features or {}).get(column)

    def column(self, argument: str, given: str | None, defaults: Sequence[str], hint: str = "") -> str | None:
        """`given`, or the first of `defaults` that the source has; ValueError if it has none of them."""
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

    def read(
        self, columns: Sequence[str], fields: Fields, features: Features, gather: bool
    ) -> Dataset | IterableDataset:
        """All rows in the schema `features`.

        Args:
            columns: those that `fields` needs, which makes the texts of the schema from a row.
            gather: whether "references" of rows with the same image are joined, unless streamed.
        """
        if self.keep_columns:
            features = Features(features | {name: self._kind(name) or Value("string") for name in self.keep_columns})
        if self.streaming:
            return self._stream(fields, features)
        needed = {*columns, *self.keep_columns, *_names(self.image_column), self.id_column, self.split_column} - {None}
        return self._table(sorted(needed), fields, features, gather)

    def _stream(self, fields: Fields, features: Features) -> IterableDataset:
        def batch(columns: dict[str, list], numbers: list[int]) -> dict[str, list]:
            rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            checked = [self._normalized(number, row, fields) for number, row in zip(numbers, rows, strict=True)]
            self._report_faults()
            return {name: [row[name] for row in checked if row is not None] for name in features}

        rows = self.rows.map(batch, with_indices=True, batched=True, batch_size=16, remove_columns=self.columns)
        # `features=` of `map` would leave the images undecoded.
        return rows.cast(features)

    def _table(self, needed: list[str], fields: Fields, features: Features, gather: bool) -> Dataset:
        kept: dict[str, dict[str, Any]] = {}
        seen_splits: set[str] = set()
        for number, row in enumerate(tqdm(self.rows.select_columns(needed), desc="checking", unit="row", delay=2)):
            if self.split_column is not None:
                seen_splits.add(row[self.split_column])
            one = self._normalized(number, row, fields)
            if one is None:
                continue
            key = one["image_id"] if gather else str(number)
            if key in kept:
                kept[key]["references"] += one["references"]
            else:
                kept[key] = one | {"number": number, "image": one["image"]["path"]}
        self._report_faults()
        if not kept:
            raise ValueError(
                f"`source` must hold rows of the split {self.split!r}, got none in {self.source} "
                f"(splits there: {sorted(map(str, seen_splits)) or 'its own'}); check `split`."
            )
        if not self.embedded:
            columns = {name: [row[name] for row in kept.values()] for name in features}
            return Dataset.from_dict(columns, features=features)
        # Texts beside the images as they are, then a choice of rows: no image is copied.
        by_number = {row["number"]: row for row in kept.values()}
        rows = [by_number.get(number, {}) for number in range(len(self.rows))]
        texts = Features({name: kind for name, kind in features.items() if name != "image"})
        columns = {name: [row.get(name) for row in rows] for name in texts}
        pictures = self.rows.select_columns([self.image_column]).cast_column(self.image_column, Image())
        if self.image_column != "image":
            pictures = pictures.rename_column(self.image_column, "image")
        joined = concatenate_datasets([pictures, Dataset.from_dict(columns, features=texts)], axis=1)
        return joined.select(list(by_number))

    def _normalized(self, number: int, row: dict[str, Any], fields: Fields) -> dict[str, Any] | None:
        """One row in the schema, its image as stored; None if it is bad or of another split."""
        if None not in (self.split, self.split_column) and row[self.split_column] not in self.split.split("+"):
            return None
        image = row[self.image_column] if self.embedded else {"bytes": None, "path": self._image_path(row)}
        stored, path = (None, None) if image is None else (image["bytes"], image["path"])
        located = path if stored or path is None or "://" in path else str(self.root / path)
        if fault := self._image_fault(stored, located):
            self._fault(number, "missing or unreadable image", fault)
            return None
        texts = fields(row, partial(self._fault, number))
        if texts is None:
            return None
        image_id = path
        if self.id_column is not None:
            image_id = str(row[self.id_column])
        elif path is None:
            image_id = str(number)
        elif Path(path).is_relative_to(self.root):
            image_id = str(Path(path).relative_to(self.root))
        image = {"bytes": stored, "path": located}
        return {"image": image, "image_id": image_id, **texts, **{name: row[name] for name in self.keep_columns}}

    def _image_path(self, row: dict[str, Any]) -> str | None:
        """The path as the source gives it, None where it gives none."""
        if any(row[name] in (None, "") for name in _names(self.image_column)):
            return None
        return self.image_column.format(**row) if "{" in self.image_column else str(row[self.image_column])

    def _image_fault(self, stored: bytes | None, path: str | None) -> str | None:
        if stored:
            return _decoding_fault(BytesIO(stored))
        if path is None:
            return "there is none"
        if "://" not in path and path not in self.checked_paths:
            self.checked_paths[path] = _decoding_fault(path)
        return self.checked_paths.get(path)

    def _fault(self, row: int, reason: str, detail: str) -> None:
        self.faults[reason] += 1
        self.first_faults.setdefault(reason, f"row {row}: {detail}")

    def _report_faults(self) -> None:
        """An error about the bad rows so far, or a warning where they are to be left out."""
        if not self.faults:
            return
        reasons = self.faults.items()
        what = "; ".join(f"{reason}: {count} (first in {self.first_faults[reason]})" for reason, count in reasons)
        if self.skipped is not None:
            self.skipped.update(self.faults)
        self.faults.clear()
        if not self.skip_bad:
            raise ValueError(
                f"`source` must hold good rows only, got in {self.source}: {what}; "
                "fix them, or pass `skip_bad=True` to leave them out."
            )
        logger.warning(f"Left out of {self.source}: {what}.")


def _check_lines(path: Path) -> None:
    """Refuses a JSONL file that `datasets` cannot read, and names the line, which `datasets` does not."""
    lines = json_lines(path)
    first = next(lines, "no line was found.")
    fault = next((line for line in chain([first], lines) if isinstance(line, str)), None)
    if fault:
        raise ValueError(f"`source` must hold a JSON object in each line; in {path} {fault} Fix or delete that line.")


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


__all__ = ["Fault", "Reader", "has_words"]
