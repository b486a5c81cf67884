"""Images that an export in 8 bits is calibrated and measured on: any source of rows, but no test split."""

import random
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..inference.sources import Row, Source, batches
from ..model.images_mue import load_image

SPLIT_COLUMN = "split"
# Rows among which images are drawn: of a data set without end, or on the Hub, the others are not read.
MOST_ROWS = 10_000
# "test", "test2015", "test-dev", "testA"; but not the folder "test_of_my_camera".
TEST_SPLIT = re.compile(r"test(ing)?([-_]?(\d+|a|b|dev|std))*")


class CalibrationImages:
    """Images drawn from sources, the same ones in each call; decoded when they are needed.

    Args:
        image_processor (`Callable`): of the checkpoint.
        names (sequence of `str`): see [`Source`]; a folder with a metadata.jsonl is read as that table.
        count (`int`): images to draw, all where there are fewer.
        split (`str`): of a data set, and of tables with a column "split"; "a+b" for both.
        size ((height, width), *optional*): in pixels; default: the processor's.

    Raises:
        ValueError: if a source cannot be read, is or names a test split, has no image of this split, or if an image
            cannot be decoded.
    """

    def __init__(
        self,
        image_processor: Any,
        names: Sequence[str],
        *,
        count: int = 64,
        split: str = "train",
        size: Sequence[int] | None = None,
    ):
        if count < 1:
            raise ValueError(f"`calibration_images` must be at least 1, got {count}; pass more.")
        self.processor = image_processor
        self.options: dict[str, Any] = {"return_tensors": "pt"}
        if size is not None:
            self.options["size"] = dict(zip(("height", "width"), size, strict=True))
        _refuse_test("split", split.split("+"))
        rows = chain.from_iterable(_rows(name, split) for name in names)
        numbered = enumerate(islice(rows, MOST_ROWS))
        unique = {row.image if isinstance(row.image, str) else number: row for number, row in numbered}
        drawn = list(unique.values())
        if len(drawn) > count:
            drawn = random.Random(0).sample(drawn, count)
        self.rows, digest = drawn, sha256()
        for batch in self.batches(1):
            digest.update(batch.numpy().tobytes())
        #: What a manifest says of them; the digest is that of all pixels.
        self.record = {"images": len(drawn), "split": split, "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Pixels [up to `size`, 3, height, width]."""
        return (torch.cat([self._pixels(row) for row in rows]) for rows in batches(self.rows, size))

    def _pixels(self, row: Row) -> Tensor:
        try:
            if row.fault is not None:
                raise ValueError(row.fault)
            return self.processor(load_image(row.image), **self.options)["pixel_values"]
        # Pillow's decoders raise many kinds of errors
        except Exception as error:
            name = row.name or f"of row {row.number}"
            raise ValueError(
                f"calibration images must be whole, got the image {name}: {error}; fix it or leave it out."
            ) from error


def _rows(name: str, split: str) -> Iterator[Row]:
    """The rows of one source that may be used."""
    table, wanted = Path(name, "metadata.jsonl"), split.split("+")
    source = Source([str(table) if table.is_file() else name], split=split)
    if SPLIT_COLUMN not in source.columns:
        if Path(name).is_dir():
            _refuse_test("folder", [Path(name).absolute().name])
        for row in source.rows():
            if isinstance(row.image, str) and Path(name).is_dir() and not table.is_file():
                _refuse_test("folder", Path(row.image).relative_to(name).parts[:-1])
            yield row
        return
    seen, found = set(), False
    for row in source.rows(keep=[SPLIT_COLUMN]):
        seen.add(str(row.fields[SPLIT_COLUMN]))
        if row.fault is not None or row.fields[SPLIT_COLUMN] in wanted:
            found = True
            yield row
    if not found:
        raise ValueError(
            f"`calibrate_on` must have rows of the split {split!r}, got {sorted(seen)} in {name}; pass another "
            "`--split`, which must be no test split."
        )


def _refuse_test(what: str, names: Sequence[str]) -> None:
    """Raises a ValueError if one of the names is that of a test split."""
    if test := [name for name in names if TEST_SPLIT.fullmatch(name.lower())]:
        raise ValueError(
            f"calibration images must be of no test split, got the {what} {test[0]!r}: what is measured there later "
            "would count for nothing; pass images of another split."
        )


__all__ = ["CalibrationImages"]
