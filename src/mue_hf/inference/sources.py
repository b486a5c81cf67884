"""Where the rows of bulk work come from: images, folders, lists, tables and data sets, one row at a time."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..files import json_lines

T = TypeVar("T")
Record = dict[str, Any] | str

#: Files of a folder that count as images; a damaged one is a bad row, other files are passed over.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
#: Tables, and lists of one image per line.
TABLE_SUFFIXES = frozenset({".csv", ".jsonl", ".parquet"})
LIST_SUFFIXES = frozenset({".lst", ".txt"})
# The first that a table has.
IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "url", "image_url")
# Rows that a parquet file hands over at once; with images inside they are large.
PARQUET_ROWS = 64


@dataclass(frozen=True)
class Row:
    """
    One piece of bulk work.

    Args:
        number (`int`): its place in the source, from 0.
        image (`str`, `bytes` or None): a path, a URL, or an image file's bytes; None with a `fault`.
        name (`str` or None): what the source calls the image.
        texts (`dict`): what [`MuEProcessor`] is given besides the image: "text", or "hypothesis" and "premise".
        fields (`dict`): columns of the source that the result keeps.
        fault (`str`, *optional*): why the row cannot be used, where reading it has shown that.
    """

    number: int
    image: Any
    name: str | None = None
    texts: dict[str, str | None] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


class _Part(NamedTuple):
    """One thing that was named; a record that is a `str` says what is wrong with it."""

    columns: Sequence[str]
    records: Callable[[Sequence[str]], Iterator[Record]]
    # where relative paths start
    root: Path | None = None
    # number of records, where that is cheap to know
    total: int | None = None


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one maybe of fewer."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def printable(text: str) -> str:
    """`text` in which bytes of a file name that are no UTF-8 are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def parquet_library() -> Any:
    """`pyarrow.parquet`, which only those who have such files need.

    Raises:
        ImportError: without the extra `train`.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"parquet needs the extra `train` ({error}): pip install 'mue-hf[train]'") from error
    return pyarrow.parquet


class Source:
    """
    Images and what goes with them, by the names of files, folders and data sets.

    Args:
        names (sequence of `str`): in any number and mixture: an image file or an http(s) URL; a folder, of whose
            subfolders all images count, in the order of their names; a .txt or .lst file with one path or URL per
            line; a .jsonl, .csv or .parquet table; a data set of the Hub.
        split (`str`, *optional*, defaults to `"train"`): of a data set.
        image_root (`str`, *optional*): where relative paths in a list or table start; default: its folder.

    Raises:
        ValueError: if one of them does not exist, or is empty, or cannot be read.
    """

    def __init__(self, names: Sequence[str], split: str = "train", image_root: str | None = None) -> None:
        root = None if image_root is None else Path(image_root)
        self.names = list(names)
        self.parts = [_part(name, split, root) for name in self.names]
        first, *others = [part.columns for part in self.parts]
        #: Names of the columns that all parts have; a list or a folder has "image" alone.
        self.columns = [name for name in first if all(name in columns for columns in others)]

    @property
    def total(self) -> int | None:
        """Number of rows, None where one has to read everything to know."""
        totals = [part.total for part in self.parts if part.total is not None]
        return sum(totals) if len(totals) == len(self.parts) else None

    def column(self, argument: str, given: str | None, candidates: Sequence[str]) -> str | None:
        """`given`, which must be a column, or the first of `candidates` that is one, or None."""
        if given is None:
            return next((name for name in candidates if name in self.columns), None)
        if given not in self.columns:
            raise ValueError(f"`{argument}` must name a column, got {given!r} among {self.columns}; check the name.")
        return given

    def rows(
        self, image_column: str | None = None, texts: Mapping[str, str] | None = None, keep: Sequence[str] = ()
    ) -> Iterator[Row]:
        """
        The rows in their order; each is read when it is asked for.

        Args:
            image_column (`str`, *optional*): default: the first that exists of `IMAGE_COLUMNS`.
            texts (`dict`, *optional*): argument of the processor -> column.
            keep (sequence of `str`, *optional*): columns that the results keep.

        Raises:
            ValueError: before the first row, if a column does not exist.
        """
        image_column = self.column("image_column", image_column, IMAGE_COLUMNS)
        if image_column is None:
            raise ValueError(
                f"`image_column` must be given, got none of {list(IMAGE_COLUMNS)} among {self.columns}; name it."
            )
        texts = texts or {}
        for name in (*texts.values(), *keep):
            self.column("columns", name, ())
        needed = list(dict.fromkeys([image_column, *texts.values(), *keep]))
        records = ((part.root, record) for part in self.parts for record in part.records(needed))
        return (_row(number, record, root, image_column, texts, keep) for number, (root, record) in enumerate(records))


def _row(
    number: int, record: Record, root: Path | None, image_column: str, texts: Mapping[str, str], keep: Sequence[str]
) -> Row:
    if isinstance(record, str):
        return Row(number, None, fields=dict.fromkeys(keep), fault=printable(record))
    fields = {name: _plain(record.get(name)) for name in keep}
    words = {argument: record.get(column) for argument, column in texts.items()}
    image = path = record.get(image_column)
    if isinstance(image, Mapping):
        path, image = image.get("path"), image.get("bytes") or image.get("path")
    name = printable(path) if isinstance(path, str) else None
    if image is None or image == "":
        return Row(number, None, name, words, fields, f"`{image_column}` must hold an image, got none.")
    if isinstance(image, str) and root is not None and "://" not in image:
        image = os.path.join(root, image)
    return Row(number, image, name, words, fields)


def _plain(value: Any) -> Any:
    """A value of a column as JSON and parquet can hold it."""
    if isinstance(value, str):
        return printable(value)
    # parquet's integers have 64 bits.
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    return value if value is None or isinstance(value, float) else json.dumps(value, default=str)


def _part(name: str, split: str, root: Path | None) -> _Part:
    path, suffix = Path(name), Path(name).suffix.lower()
    if path.is_dir():
        total = sum(1 for _ in _images(name))
        if not total:
            raise ValueError(
                f"`source` must be a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none in {name}; "
                "a table or a list is named itself, not its folder."
            )
        return _Part(["image"], lambda _: ({"image": path} for path in _images(name)), None, total)
    if path.is_file():
        root = root or path.parent
        if suffix in LIST_SUFFIXES:
            return _Part(["image"], lambda _: _lines(path), root, sum(1 for _ in _lines(path)))
        if suffix == ".parquet":
            return _parquet(path, root)
        if suffix in TABLE_SUFFIXES:
            read = _csv if suffix == ".csv" else json_lines
            first = next((record for record in read(path) if isinstance(record, dict)), None)
            if first is None:
                fault = next(read(path), "it has no lines.")
                raise ValueError(f"`source` must be a table with rows, got none in {name}: {fault} Fix the file.")
            return _Part(list(first), lambda _: read(path), root, sum(1 for _ in read(path)))
    if path.is_file() or "://" in name or suffix in IMAGE_SUFFIXES:
        return _Part(["image"], lambda _: iter([{"image": name}]), None, 1)
    if path.is_absolute() or suffix in TABLE_SUFFIXES | LIST_SUFFIXES:
        raise ValueError(f"`source` must exist, got {name!r}; check the path.")
    return _hub(name, split)


def _images(folder: str) -> Iterator[str]:
    """Paths of the images, sorted within each folder; only one folder's names are in memory at a time."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"`source` must be a folder that can be read, got an error: {error}; fix it.") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.join(place, file)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    # File names need not be UTF-8.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            if line := line.rstrip("\r\n"):
                yield {"image": line}


def _csv(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
        reader = csv.DictReader(file)
        while True:
            try:
                # Cells beyond the header stand under None.
                yield {name: value for name, value in next(reader).items() if name is not None}
            except csv.Error as error:
                yield f"line {reader.line_num} must be CSV, got an error: {error}."
            except StopIteration:
                return


def _parquet(path: Path, root: Path) -> _Part:
    parquet = parquet_library()

    def read(needed: Sequence[str]) -> Iterator[dict[str, Any]]:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(needed)):
                yield from batch.to_pylist()

    try:
        with parquet.ParquetFile(path) as file:
            return _Part(file.schema_arrow.names, read, root, file.metadata.num_rows)
    except OSError as error:
        raise ValueError(f"`source` must be a parquet file, got an error in {path}: {error}; fix it.") from error


def _hub(name: str, split: str) -> _Part:
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"`source` must be an image, a folder, a list, a table or a data set of the Hub, got {name!r} with the "
            f"split {split!r}: {error}"
        ) from error
    for column, kind in (rows.features or {}).items():
        if isinstance(kind, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return _Part(columns, lambda needed: iter(rows.select_columns(list(needed))))


__all__ = ["LIST_SUFFIXES", "TABLE_SUFFIXES", "Row", "Source", "batches", "parquet_library", "printable"]
