"""Generated scenes: seeded drawings of simple shapes, with captions and yes / no / maybe statements, free of licence.

A scene shows 2 to 6 objects that do not overlap: one of 4 shapes, 5 colours (jittered) and 2 sizes each, on a pale
background. In 35 % of the scenes a grey panel hides one quadrant, with up to 3 further objects under it.

The label of a statement depends on the visible objects and the panel alone: "entailment" (yes) if it holds whatever
the panel hides, "contradiction" (no) if it fails whatever the panel hides, "neutral" (maybe) otherwise, where a panel
may hide 0 to 3 objects of any kind. Every statement has the form "there are objects such that ...", and up to 3 hidden
objects can always make it true. So it is yes if visible objects alone make it true, else no without a panel and maybe
with one. "a red circle" is any red circle, of either size; positions are those of centres, and visible centres differ
by at least 3 of 64 units in both directions. The kinds, by difficulty:

* "existence": "there is a red circle". False ones name a colour and a shape that are both visible, wherever such a
  pair is missing.
* "counting": "there are at least three squares" or "... two red shapes", with 2 or 3. False ones miss by one where
  possible.
* "relation": "a red circle is left of a blue square" (right of, above, below): some red circle and some blue square
  are so placed, however far apart and whatever their other coordinate. False ones name visible objects too.
* "two_relations": "a red circle is left of a blue square that is above a green cross": one blue square serves both.
  False ones name visible objects too, and fail though at least one of the two relations holds by itself.

Labels are balanced: given the wording up to shapes and colours, and whether there is a panel, half of the statements
are yes. So the statement alone, the panel alone, or both predict the answer no better than chance.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Features, Value
from pyarrow import Table
from pyarrow.parquet import ParquetWriter
from torch.utils.data import Dataset
from tqdm import tqdm

from ..files import whole_folder
from .captioning import CAPTIONING_FEATURES
from .entailment import ENTAILMENT_FEATURES
from .scene_drawing import COLORS, GRID, RADIUS, SHAPES, Scene, SceneObject, check_split, draw_scene, make_scene
from .scene_texts import FORMS, RELATIONS, Statement, check_kinds, scene_captions, scene_statements


class SceneDataset(Dataset):
    """Scenes drawn on demand, as rows for [`MuEDataCollator`]. The texts do not hold for mirrored pictures.

    Each row holds "image" (PIL), "image_id", "references" (two captions), and lists of `statements` entries
    "hypothesis", "label" and "kind": the statements share the picture, which is then encoded once for all of them.

    Args:
        scenes (`int`): number of scenes, from index 0 on.
        seed, split, kinds: see [`make_scene`] and [`scene_statements`].
        statements (`int`, *optional*, defaults to 8): statements per scene; 0 for captions alone.
        captions (`bool`, *optional*, defaults to `True`): whether rows have "references".
        image_size (`int`, *optional*, defaults to 64): pixels; better a multiple of 64.

    Raises:
        ValueError: if a number is too small, or a split or kind has another name.
    """

    def __init__(
        self,
        scenes: int,
        seed: int = 0,
        split: str = "train",
        *,
        statements: int = 8,
        captions: bool = True,
        kinds: Sequence[str] = tuple(FORMS),
        image_size: int = 64,
    ) -> None:
        check_split(split)
        check_kinds(kinds)
        self.scenes, self.seed, self.split = scenes, seed, split
        self.statements, self.captions, self.kinds, self.image_size = statements, captions, tuple(kinds), image_size
        for name, least in {"scenes": 1, "statements": 0, "image_size": 32}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}; pass more.")
        if not (statements or captions):
            raise ValueError("`statements` must be at least 1 without `captions`, got 0; there would be no text.")

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.scenes:
            raise IndexError(f"`index` must be in 0..{self.scenes - 1}, got {index}.")
        scene = make_scene(index, self.seed, self.split)
        row: dict[str, Any] = {"image": draw_scene(scene, self.image_size)}
        row["image_id"] = f"{self.split}-{self.seed}-{index:07d}"
        if self.captions:
            row["references"] = scene_captions(scene)
        if self.statements:
            drawn = scene_statements(index, self.statements, self.seed, self.split, self.kinds)
            fields = {"hypothesis": "text", "label": "label", "kind": "kind"}
            row |= {name: [getattr(one, field) for one in drawn] for name, field in fields.items()}
        return row


def write_scenes(
    folder: str | os.PathLike,
    scenes: dict[str, int],
    seed: int = 0,
    *,
    statements: int = 8,
    file_format: str = "jsonl",
    **options: Any,
) -> None:
    """Writes scenes as data that [`load_captioning`] and [`load_entailment`] read, whole or not at all.

    "jsonl" gives images/*.png, captions.jsonl and entailment.jsonl, "parquet" captions.parquet and entailment.parquet,
    which hold the pictures. Both have a column "split"; entailment has one row per statement and a column "kind".

    Args:
        folder (`str` or `os.PathLike`): must not exist.
        scenes (`dict[str, int]`): number of scenes by split, such as `{"train": 1000, "test": 100}`.
        seed, statements, options: of [`SceneDataset`]; options are `kinds` and `image_size`.
        file_format (`str`): "jsonl" or "parquet".

    Raises:
        ValueError: if the folder exists, or an argument is out of range.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"`folder` must not exist, got {str(folder)!r}; pass a new one, or remove it.")
    writers = {"jsonl": _write_jsonl, "parquet": _write_parquet}
    if file_format not in writers:
        raise ValueError(f"`file_format` must be one of {sorted(writers)}, got {file_format!r}; choose one of them.")
    if not scenes or statements < 1:
        raise ValueError(f"`scenes` and `statements` must not be empty, got {scenes} and {statements}; ask for some.")
    splits = [SceneDataset(count, seed, split, statements=statements, **options) for split, count in scenes.items()]
    rows = (drawn[index] | {"split": drawn.split} for drawn in splits for index in range(len(drawn)))
    with whole_folder(folder) as part:
        writers[file_format](part, iter(tqdm(rows, total=sum(scenes.values()), desc="scenes", unit="scene")))


def _tables(row: dict[str, Any], image: Any) -> dict[str, list[dict[str, Any]]]:
    """The rows of one scene for captions and entailment, with `image` as the reference to its picture."""
    common = {"image": image, "image_id": row["image_id"], "split": row["split"]}
    names = ("hypothesis", "label", "kind")
    statements = [dict(zip(names, values, strict=True)) for values in zip(*(row[name] for name in names), strict=True)]
    return {
        "captions": [common | {"references": row["references"]}],
        "entailment": [common | {"premise": None} | statement for statement in statements],
    }


def _write_jsonl(folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    (folder / "images").mkdir()
    with ExitStack() as stack:
        names = ("captions", "entailment")
        files = {name: stack.enter_context(open(folder / f"{name}.jsonl", "w", encoding="utf-8")) for name in names}
        for row in rows:
            path = f"images/{row['image_id']}.png"
            row["image"].save(folder / path)
            for name, table in _tables(row, path).items():
                files[name].writelines(json.dumps(one) + "\n" for one in table)


def _write_parquet(folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    split, kind = {"split": Value("string")}, {"kind": Value("string")}
    schemas = {
        "captions": Features(CAPTIONING_FEATURES | split).arrow_schema,
        "entailment": Features(ENTAILMENT_FEATURES | split | kind).arrow_schema,
    }
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(ParquetWriter(folder / f"{name}.parquet", schema))
            for name, schema in schemas.items()
        }
        # A thousand scenes at a time bound the memory.
        while chunk := list(islice(rows, 1000)):
            tables = defaultdict(list)
            for row in chunk:
                file = BytesIO()
                row["image"].save(file, "PNG")
                picture = {"bytes": file.getvalue(), "path": f"{row['image_id']}.png"}
                for name, table in _tables(row, picture).items():
                    tables[name] += table
            for name, table in tables.items():
                files[name].write_table(Table.from_pylist(table, schemas[name]))


__all__ = [
    "COLORS",
    "FORMS",
    "GRID",
    "RADIUS",
    "RELATIONS",
    "SHAPES",
    "Scene",
    "SceneDataset",
    "SceneObject",
    "Statement",
    "draw_scene",
    "make_scene",
    "scene_captions",
    "scene_statements",
    "write_scenes",
]
