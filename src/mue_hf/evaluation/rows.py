"""Rows to evaluate on: from files, folders, the Hub or generated scenes, whole or with something taken away."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from ..data import CAPTIONING_FEATURES, ENTAILMENT_FEATURES, load_captioning, load_entailment
from ..data.features import image_digest
from ..data.scenes import SceneDataset

LOADERS = {"captioning": load_captioning, "entailment": load_entailment}


@dataclass(frozen=True)
class ControlledRows(TorchDataset):
    """Rows without premises, or with the images of others or none; `donors` are the rows whose images are shown."""

    rows: Any
    premise: bool
    donors: Sequence[int] | None
    images: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = dict(self.rows[index])
        if not self.premise:
            row["premise"] = None
        if self.donors is not None:
            other = self.rows[self.donors[index]]
            row |= {name: other[name] for name in ("image", "image_features") if name in other}
        if not self.images:
            row.pop("image_features", None)
            row["image"] = None
        return row


@dataclass(frozen=True)
class EvaluationData:
    """Rows to evaluate: `rows` with images, `fields` without, and the `fingerprint` of both."""

    rows: Any
    fields: list[dict[str, Any]]
    fingerprint: str


def load_rows(
    task: str, source: str, split: str, *, limit: int | None = None, kind_column: str | None = None, **options: Any
) -> Any:
    """
    Rows of a task; statements on one image are neighbours.

    Args:
        task (`str`): "captioning" or "entailment".
        source (`str`): what [`load_captioning`] and [`load_entailment`] take, or "scenes:SEED:COUNT" for COUNT
            generated scenes, with eight statements each.
        split (`str`), limit (`int`): which rows, "all" for every one; the first so many of them.
        kind_column (`str`): a column to keep as "kind"; scenes have it.
        options: of the loader; streamed rows keep the order of the source.

    Raises:
        ValueError: if the source cannot be read, or is not of its form, or if scenes are given options of files.
    """
    if source.startswith("scenes:"):
        return _load_scenes(task, source, split, limit, **options)
    if kind_column is not None:
        options["keep_columns"] = [kind_column]
    rows = LOADERS[task](source, None if split == "all" else split, **options)
    if kind_column not in (None, "kind"):
        rows = rows.rename_column(kind_column, "kind")
    if isinstance(rows, IterableDataset):
        return rows if limit is None else rows.take(limit)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if task == "entailment":
        ids = list(rows["image_id"])
        rows = rows.select(sorted(range(len(ids)), key=ids.__getitem__))
    return rows


def _load_scenes(
    task: str, source: str, split: str, limit: int | None, *, streaming: bool = False, **options: Any
) -> list[dict[str, Any]] | IterableDataset:
    # no row of theirs is bad
    if unknown := sorted(options.keys() - {"skip_bad", "skipped"}):
        raise ValueError(
            f"options of `source` must be those it has, got {unknown} for {source!r}: generated scenes have no "
            "columns or files to choose; leave them out."
        )
    try:
        seed, count = map(int, source.split(":")[1:])
    except ValueError as error:
        raise ValueError(
            f"`source` must be scenes:SEED:COUNT with two integers, got {source!r}; try scenes:0:1250."
        ) from error
    captioning = task == "captioning"
    scenes = SceneDataset(count, seed, split, captions=captioning, statements=0 if captioning else 8)
    draw = partial(_draw, scenes, captioning, limit)
    if not streaming:
        return list(draw())
    features = CAPTIONING_FEATURES if captioning else ENTAILMENT_FEATURES | {"kind": Value("string")}
    return IterableDataset.from_generator(draw, features=Features(features))


def _draw(scenes: SceneDataset, captioning: bool, limit: int | None) -> Iterator[dict[str, Any]]:
    drawn = (scenes[index] for index in range(len(scenes)))
    return islice(drawn if captioning else chain.from_iterable(map(_statements, drawn)), limit)


def _statements(scene: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each statement about a scene."""
    common = {"image": scene["image"], "image_id": scene["image_id"], "premise": None}
    for text, label, kind in zip(scene["hypothesis"], scene["label"], scene["kind"], strict=True):
        yield common | {"hypothesis": text, "label": label, "kind": kind}


def row_fields(rows: Any) -> list[dict[str, Any]]:
    """`rows` without their images, none of which is read."""
    if isinstance(rows, Dataset):
        return rows.remove_columns("image").to_list()
    return [{name: value for name, value in row.items() if name != "image"} for row in rows]


def describe_rows(rows: Any) -> EvaluationData:
    """`rows` with their texts and fingerprint: another text, label or picture, another fingerprint."""
    fields, images = row_fields(rows), rows
    if isinstance(rows, Dataset):
        images = rows.select_columns(["image"]).cast_column("image", Image(decode=False))
    digest, last = sha256(), None
    for index, row in enumerate(tqdm(fields, desc="fingerprint", unit="row", delay=2, leave=None)):
        digest.update(json.dumps(row, sort_keys=True).encode())
        if row["image_id"] != last:
            digest.update(image_digest(images[index]["image"]).encode())
        last = row["image_id"]
    return EvaluationData(rows, fields, digest.hexdigest())


def donors(image_ids: Sequence[str], seed: int = 0) -> list[int]:
    """For each row a row with another image, the same one for rows of one image; a ValueError if there is no other."""
    first = {image_id: index for index, image_id in reversed([*enumerate(image_ids)])}
    names = list(dict.fromkeys(image_ids))
    if len(names) < 2:
        raise ValueError("Shuffled images need at least two images, got one; evaluate more rows.")
    random.Random(seed).shuffle(names)
    other = {name: first[names[index - 1]] for index, name in enumerate(names)}
    return [other[image_id] for image_id in image_ids]


__all__ = ["ControlledRows", "EvaluationData", "describe_rows", "donors", "load_rows", "row_fields"]
