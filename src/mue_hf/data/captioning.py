"""Captioning data: images with their captions, from the Hub, folders, JSONL, JSON, CSV or parquet."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from torch.utils.data import Dataset as TorchDataset

from ..files import json_lines
from .reader import Fault, Reader, has_words

CAPTIONING_FEATURES = Features({"image": Image(), "image_id": Value("string"), "references": List(Value("string"))})
# The first that the source has.
CAPTION_COLUMNS = ("references", "captions", "sentences", "caption", "text")


def load_captioning(
    source: str | PathLike,
    split: str | None = "train",
    *,
    caption_column: str | Sequence[str] | None = None,
    **options: Any,
) -> Dataset | IterableDataset:
    """Images with their captions, one row per image, checked.

    Args:
        source (`str` or `os.PathLike`): a JSONL, JSON, CSV or parquet file, whose images are paths relative to it or
            embedded; a folder, such as an `imagefolder` with metadata.jsonl; or a dataset of the Hub.
        split (`str`, *optional*, defaults to `"train"`): which rows; "a+b" for both, None for all.
        caption_column (`str` or sequence of `str`, *optional*): column or columns with a caption, a list of captions,
            or a list of `{"raw": caption}` as in COCO Karpathy. Default: the first that exists of "references",
            "captions", "sentences", "caption", "text". Rows of the same image are joined, unless streamed.
        image_column (`str`, *optional*): column of the images or their paths, or a path made from columns such as
            "{filepath}/{filename}". Default: the first that exists of "image", "file_name", "{filepath}/{filename}",
            "filename", "{Flickr30K_ID}.jpg".
        id_column (`str`, *optional*): column that identifies the image. Default: "image_id" if there is one, else the
            image's path, else the row's number.
        split_column (`str`, *optional*): column with each row's split. Default: "split" for files; none for folders
            and the Hub, which have splits of their own. Where it is named, `split` chooses by it among all of those.
        image_root (`str` or `os.PathLike`, *optional*): folder of relative paths. Default: that of the file.
        keep_columns (sequence of `str`, *optional*): further columns to keep as they are.
        streaming (`bool`, *optional*, defaults to `False`): whether rows are read, and checked, only when they are
            needed. Only that each line of a JSONL file is a JSON object is checked before.
        skip_bad (`bool`, *optional*, defaults to `False`): whether bad captions and rows are left out and counted in a
            warning.
        skipped (`Counter`, *optional*): where to add how many are bad, by reason.
        options (*optional*): further arguments of `datasets.load_dataset`: `name`, `revision`, `field="images"` for
            Karpathy's JSON.

    Returns:
        `Dataset`, or `IterableDataset` if streamed: "image", "image_id", "references" (list of `str`, as written), and
        `keep_columns`.

    Raises:
        ValueError: if the source or the split does not exist, a line of a JSONL file is no JSON object, a column is
            missing, or rows are bad: an image that is missing or not an image, a caption without words, no caption.
    """
    reader = Reader(source, split, **options)
    columns = [caption_column] if caption_column is None or isinstance(caption_column, str) else caption_column
    columns = [reader.column("caption_column", name, CAPTION_COLUMNS) for name in columns]

    def captions(row: dict[str, Any], fault: Fault) -> dict[str, Any] | None:
        good = []
        for name in columns:
            value = row[name]
            for caption in value if isinstance(value, list) else [value]:
                caption = caption.get("raw") if isinstance(caption, dict) else caption
                if has_words(caption):
                    good.append(caption)
                else:
                    fault("caption without words", f"{name} holds {caption!r}")
        if good:
            return {"references": good}
        fault("no caption", f"{list(columns)} hold none")
        return None

    return reader.read(columns, captions, CAPTIONING_FEATURES, gather=True)


class CaptionTexts(TorchDataset):
    """Captions without images, for the decoder to learn words and grammar from: rows with "image" None and
    "references", which [`MuEDataCollator`] batches.

    Args:
        source (`str` or `os.PathLike`): a JSONL file whose objects have captions in a list.

    Raises:
        ValueError: if the file does not exist or is empty, a line is no JSON object, or a line has no captions with
            words.
    """

    def __init__(self, source: str | PathLike) -> None:
        if not Path(source).is_file():
            raise ValueError(f"`source` must be a JSONL file of captions, got {str(source)!r}, which is none.")
        self.references: list[list[str]] = []
        for row in json_lines(source):
            if isinstance(row, str):
                raise ValueError(f"`source` must hold a JSON object in each line: {source}: {row}")
            captions = next((row[name] for name in CAPTION_COLUMNS if name in row), None)
            if not isinstance(captions, list) or not captions or not all(map(has_words, captions)):
                raise ValueError(
                    f"`source` must hold a list of captions with words in one of {list(CAPTION_COLUMNS)} of each "
                    f"line, got {row!r:.200} in {source}; leave such lines out."
                )
            self.references.append(captions)
        if not self.references:
            raise ValueError(f"`source` must hold a line of captions at least, got none in {source}; drop it.")

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": None, "references": self.references[index]}


class CaptionPairs(TorchDataset):
    """One row per caption, as OFA counts its epochs: a row of `rows` for each of its captions, with that one alone.

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


__all__ = ["CAPTIONING_FEATURES", "CaptionPairs", "CaptionTexts", "load_captioning"]
