"""Generated scenes: seeded drawings of simple shapes, with captions and yes / no / maybe statements, free of licence.

A scene shows 2 to 6 objects that do not overlap: one of 4 shapes, 5 colours (jittered) and 2 sizes each, on a pale
background. In 35 % of the scenes a grey panel hides one quadrant, with up to 3 further objects under it.

What a statement means. Its label is settled by the visible objects and the panel alone: "entailment" (yes) if it holds
whatever the panel hides, "contradiction" (no) if it fails whatever the panel hides, "neutral" (maybe) otherwise, where
a panel may hide 0 to 3 objects of any kind. Every statement is of the form "there are objects such that ...", and up
to 3 hidden objects can always make it true. So it is yes if visible objects alone make it true, else no without a
panel and maybe with one. "a red circle" is any red circle, of either size; positions are those of centres, and visible
centres differ by at least 3 of 64 units in both directions. The kinds, by difficulty:

* "existence": "there is a red circle". False ones name a colour and a shape that are both visible, wherever such a
  pair is missing.
* "counting": "there are at least three squares" or "... two red shapes", with 2 or 3. False ones miss by one where
  possible.
* "relation": "a red circle is left of a blue square" (right of, above, below): some red circle and some blue square
  are so placed, however far apart and whatever their other coordinate. False ones name visible objects too.
* "two_relations": "a red circle is left of a blue square that is above a green cross": one blue square serves both.
  False ones name visible objects too, and fail though at least one of the two relations holds for itself.

Labels are evened out: given the wording up to shapes and colours, and given whether there is a panel, half of the
statements are yes. So half is what the statement alone, the panel alone, or both of them can give.
"""

import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from itertools import islice, permutations, product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from datasets import Features, Value
from PIL import Image, ImageDraw
from pyarrow import Table
from pyarrow.parquet import ParquetWriter
from torch.utils.data import Dataset
from tqdm import tqdm

from .captioning import CAPTIONING_FEATURES
from .entailment import ENTAILMENT_FEATURES

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (205, 45, 45),
    "green": (45, 150, 65),
    "blue": (50, 80, 205),
    "yellow": (225, 185, 35),
    "purple": (135, 55, 160),
}
SPLITS = ("train", "dev", "test")

# Lengths are in units of which a picture has GRID, whatever its size in pixels.
GRID = 64
RADIUS = {"small": 4, "large": 7}
SEPARATION = 3
MOST_VISIBLE, MOST_HIDDEN = 6, 3
PANEL_SHARE = 0.35

# Not above MOST_HIDDEN: hidden objects alone must be able to make a statement true.
NUMBERS = {"two": 2, "three": 3}
RELATIONS = ("left of", "right of", "above", "below")
# The wordings of each kind up to colours and shapes.
FORMS = {
    "existence": ("there is a {}",),
    "counting": tuple(product(("shape", "color"), NUMBERS)),
    "relation": RELATIONS,
    "two_relations": tuple(product(RELATIONS, RELATIONS)),
}
# What a scene cannot serve gives way to this.
EASIER = {"counting": "existence", "relation": "existence", "two_relations": "relation"}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: `shape` of `SHAPES`, `color` of `COLORS`, `size` "small" or "large", centre (`x`, `y`) in units of
    1/64 of the picture from its top left corner, and the jittered colour `rgb`."""

    shape: str
    color: str
    size: str
    x: int
    y: int
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def radius(self) -> int:
        return RADIUS[self.size]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: `visible` objects, the `hidden` ones under the panel, the `panel`'s quadrant as (column,
    row) of 0 or 1, or None without a panel, and the colours of background and panel."""

    visible: tuple[SceneObject, ...]
    hidden: tuple[SceneObject, ...]
    panel: tuple[int, int] | None
    background: tuple[int, int, int]
    panel_rgb: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement on a scene: `text`, `kind` (a key of `FORMS`), and `label` "entailment", "contradiction" or
    "neutral"."""

    text: str
    kind: str
    label: str


def _check_names(split: str, kinds: Sequence[str]) -> None:
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}; choose one of them.")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(FORMS):
        raise ValueError(f"`kinds` must be a list of some of {list(FORMS)}, got {kinds!r}; check the spelling.")


def _random(seed: int, split: str, index: int, purpose: str) -> random.Random:
    # Seeding with a string is the same on every machine and version of Python.
    return random.Random(f"{seed}/{split}/{index}/{purpose}")


def _jitter(rng: random.Random, rgb: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    return tuple(min(max(level + rng.randint(-by, by), 0), 255) for level in rgb)


def _panel_box(panel: tuple[int, int]) -> tuple[int, int, int, int]:
    half = GRID // 2
    left, top = panel[0] * half, panel[1] * half
    return left, top, left + half - 1, top + half - 1


def _place(rng: random.Random, others: Sequence[SceneObject], panel: tuple[int, int] | None, hidden: bool) -> Any:
    """An object that overlaps none of `others`, wholly under the panel or wholly beside it; None if none was found."""
    size = rng.choice(tuple(RADIUS))
    radius = RADIUS[size]
    for _ in range(50):
        x, y = (rng.randint(radius + 1, GRID - 2 - radius) for _ in range(2))
        if panel is not None:
            left, top, right, bottom = _panel_box(panel)
            if hidden:
                if not (left + radius <= x <= right - radius and top + radius <= y <= bottom - radius):
                    continue
            elif left - radius <= x <= right + radius and top - radius <= y <= bottom + radius:
                continue
        if any(max(abs(x - other.x), abs(y - other.y)) <= radius + other.radius + 1 for other in others):
            continue
        if not hidden and any(min(abs(x - other.x), abs(y - other.y)) < SEPARATION for other in others):
            continue
        color = rng.choice(tuple(COLORS))
        return SceneObject(rng.choice(SHAPES), color, size, x, y, _jitter(rng, COLORS[color], 25))
    return None


def _objects(rng: random.Random, count: int, panel: tuple[int, int] | None, hidden: bool) -> list[SceneObject] | None:
    objects: list[SceneObject] = []
    for _ in range(count):
        placed = _place(rng, objects, panel, hidden)
        if placed is None:
            return None
        objects.append(placed)
    return objects


def make_scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """
    The scene number `index` of a seed and split: always the same, however many are drawn.

    Args:
        index (`int`): from 0.
        seed (`int`, *optional*, defaults to 0): another seed, other scenes.
        split (`str`, *optional*, defaults to `"train"`): "train", "dev" or "test"; they share no random numbers.

    Raises:
        ValueError: if the split has another name.
    """
    _check_names(split, tuple(FORMS))
    rng = _random(seed, split, index, "scene")
    panel = (rng.randint(0, 1), rng.randint(0, 1)) if rng.random() < PANEL_SHARE else None
    count = rng.randint(2, MOST_VISIBLE)
    visible = None
    # Relations need two kinds of objects.
    while visible is None or len({one.name for one in visible}) < 2:
        visible = _objects(rng, count, panel, hidden=False)
    hidden, count = None, rng.randint(0, MOST_HIDDEN) if panel else 0
    while hidden is None:
        hidden = _objects(rng, count, panel, hidden=True)
    background = _jitter(rng, (233, 233, 228), 15)
    return Scene(tuple(visible), tuple(hidden), panel, background, _jitter(rng, (128, 128, 128), 12))


def draw_scene(scene: Scene, image_size: int = 64) -> Image.Image:
    """The picture of a scene: RGB, `image_size` x `image_size` pixels, without anti-aliasing."""
    scale = image_size / GRID
    image = Image.new("RGB", (image_size, image_size), scene.background)
    draw = ImageDraw.Draw(image)
    for one in (*scene.hidden, *scene.visible):
        x, y, radius = ((value + shift) * scale for value, shift in ((one.x, 0.5), (one.y, 0.5), (one.radius, 0)))
        if one.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), one.rgb)
        elif one.shape == "square":
            side = 0.85 * radius
            draw.rectangle((x - side, y - side, x + side, y + side), one.rgb)
        elif one.shape == "triangle":
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], one.rgb)
        else:
            arm = 0.3 * radius
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), one.rgb)
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), one.rgb)
    if scene.panel is not None:
        left, top, right, bottom = _panel_box(scene.panel)
        draw.rectangle((left * scale, top * scale, (right + 1) * scale - 1, (bottom + 1) * scale - 1), scene.panel_rgb)
    return image


def scene_captions(scene: Scene) -> list[str]:
    """
    The two references of a scene: all visible objects in order, "from left small red circle large blue square" and
    "from top ..."; at most 20 words, so that nothing of them is cut in training.
    """
    orders = {"from left": lambda one: one.x, "from top": lambda one: one.y}
    return [
        " ".join([name, *(f"{one.size} {one.color} {one.shape}" for one in sorted(scene.visible, key=key))])
        for name, key in orders.items()
    ]


def _is(one: SceneObject, relation: str, other: SceneObject) -> bool:
    if relation in ("left of", "right of"):
        return one.x < other.x if relation == "left of" else one.x > other.x
    return one.y < other.y if relation == "above" else one.y > other.y


def _names(objects: Sequence[SceneObject]) -> list[str]:
    # Sorted, because the order of a set of strings differs between processes.
    return sorted({one.name for one in objects})


def _existence(scene: Scene, form: str) -> tuple[list[str], list[str]]:
    present = _names(scene.visible)
    absent = [name for name in map(" ".join, product(COLORS, SHAPES)) if name not in present]
    near = [name for name in absent if set(name.split()) <= set(" ".join(present).split())]
    return [form.format(name) for name in present], [form.format(name) for name in near or absent]


def _counting(scene: Scene, form: tuple[str, str]) -> tuple[list[str], list[str]]:
    attribute, word = form
    if attribute == "shape":
        nouns = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
    else:
        nouns = {color: f"{color} shapes" for color in COLORS}
    values = [getattr(one, attribute) for one in scene.visible]
    counts = {f"there are at least {word} {noun}": values.count(value) for value, noun in nouns.items()}
    most = max((count for count in counts.values() if count < NUMBERS[word]), default=0)
    reached = [text for text, count in counts.items() if count >= NUMBERS[word]]
    return reached, [text for text, count in counts.items() if count == most < NUMBERS[word]]


def _relation(scene: Scene, form: str) -> tuple[list[str], list[str]]:
    holding = {(one.name, other.name) for one, other in permutations(scene.visible, 2) if _is(one, form, other)}
    texts: tuple[list[str], list[str]] = [], []
    for pair in permutations(_names(scene.visible), 2):
        texts[pair not in holding].append(f"a {pair[0]} is {form} a {pair[1]}")
    return texts


def _two_relations(scene: Scene, form: tuple[str, str]) -> tuple[list[str], list[str]]:
    first, second = form
    joint, held_first, held_second = set(), set(), set()
    for middle in scene.visible:
        before = {one.name for one in scene.visible if _is(one, first, middle)}
        after = {one.name for one in scene.visible if _is(middle, second, one)}
        joint |= {(one, middle.name, other) for one, other in product(before, after)}
        held_first |= {(one, middle.name) for one in before}
        held_second |= {(middle.name, other) for other in after}
    texts: tuple[list[str], list[str]] = [], []
    for triple in permutations(_names(scene.visible), 3):
        text = f"a {triple[0]} is {first} a {triple[1]} that is {second} a {triple[2]}"
        if triple in joint:
            texts[0].append(text)
        elif triple[:2] in held_first or triple[1:] in held_second:
            texts[1].append(text)
    return texts


TEXTS = {"existence": _existence, "counting": _counting, "relation": _relation, "two_relations": _two_relations}


def _statement(scene: Scene, kind: str, rng: random.Random) -> Statement:
    forms = FORMS[kind]
    for form in rng.sample(forms, len(forms)):
        holding, failing = TEXTS[kind](scene, form)
        # A wording that could have one answer only would give it away.
        if holding and failing:
            if rng.random() < 0.5:
                return Statement(rng.choice(holding), kind, "entailment")
            return Statement(rng.choice(failing), kind, "contradiction" if scene.panel is None else "neutral")
    return _statement(scene, EASIER[kind], rng)


def scene_statements(
    index: int, count: int, seed: int = 0, split: str = "train", kinds: Sequence[str] = tuple(FORMS)
) -> list[Statement]:
    """
    Statements on the scene number `index`, whose kinds are drawn evenly from `kinds`; fewer are the first of more.

    A kind that the scene cannot serve, such as two relations of two objects, gives way to the next easier one; some
    statements of a scene may be the same.

    Args:
        index, seed, split: see [`make_scene`].
        count (`int`): how many.
        kinds (sequence of `str`, *optional*): of "existence", "counting", "relation" and "two_relations".

    Raises:
        ValueError: if a kind or the split has another name.
    """
    _check_names(split, kinds)
    scene = make_scene(index, seed, split)
    rng = _random(seed, split, index, "statements")
    return [_statement(scene, rng.choice(kinds), rng) for _ in range(count)]


class SceneDataset(Dataset):
    """
    Scenes drawn on demand, as rows for [`MuEDataCollator`]. A mirrored picture would belie its texts.

    Each row holds "image" (PIL), "image_id", "references" (two captions), and lists of `statements` entries
    "hypothesis", "label" and "kind": the statements share the picture, which is then encoded once for all of them.

    Args:
        scenes (`int`): number of scenes, from index 0 on.
        seed, split: see [`make_scene`].
        statements (`int`, *optional*, defaults to 8): statements per scene; 0 for captions alone.
        captions (`bool`, *optional*, defaults to `True`): whether rows have "references".
        kinds (sequence of `str`, *optional*): see [`scene_statements`].
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
        _check_names(split, kinds)
        for name, value, least in (
            ("scenes", scenes, 1),
            ("statements", statements, 0),
            ("image_size", image_size, 32),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}; pass more.")
        if not (statements or captions):
            raise ValueError("`statements` must be at least 1 without `captions`, got 0; there would be no text.")
        self.scenes, self.seed, self.split = scenes, seed, split
        self.statements, self.captions, self.kinds, self.image_size = statements, captions, tuple(kinds), image_size

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.scenes:
            raise IndexError(f"`index` must be in 0..{self.scenes - 1}, got {index}.")
        scene = make_scene(index, self.seed, self.split)
        row: dict[str, Any] = {
            "image": draw_scene(scene, self.image_size),
            "image_id": f"{self.split}-{self.seed}-{index:07d}",
        }
        if self.captions:
            row["references"] = scene_captions(scene)
        if self.statements:
            made = scene_statements(index, self.statements, self.seed, self.split, self.kinds)
            row["hypothesis"] = [statement.text for statement in made]
            row["label"] = [statement.label for statement in made]
            row["kind"] = [statement.kind for statement in made]
        return row


def write_scenes(
    folder: str | os.PathLike,
    scenes: dict[str, int],
    seed: int = 0,
    *,
    statements: int = 8,
    kinds: Sequence[str] = tuple(FORMS),
    image_size: int = 64,
    file_format: str = "jsonl",
) -> None:
    """
    Writes scenes as data that [`load_captioning`] and [`load_entailment`] read, whole or not at all.

    "jsonl" gives images/*.png, captions.jsonl and entailment.jsonl, "parquet" captions.parquet and entailment.parquet,
    which hold the pictures. Both have a column "split"; entailment has one row per statement and a column "kind".

    Args:
        folder (`str` or `os.PathLike`): must not exist.
        scenes (`dict[str, int]`): number of scenes by split, such as `{"train": 1000, "test": 100}`.
        seed, statements, kinds, image_size: see [`SceneDataset`].
        file_format (`str`, *optional*, defaults to `"jsonl"`): "jsonl" or "parquet".

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
    options = {"statements": statements, "kinds": kinds, "image_size": image_size}
    parts = [SceneDataset(count, seed, split, **options) for split, count in scenes.items()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        rows = (part_[index] | {"split": part_.split} for part_ in parts for index in range(len(part_)))
        writers[file_format](part, iter(tqdm(rows, total=sum(scenes.values()), desc="scenes", unit="scene")))
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tables(row: dict[str, Any], image: Any) -> dict[str, list[dict[str, Any]]]:
    """The rows of one scene for captions and entailment, with `image` as the reference to its picture."""
    common = {"image": image, "image_id": row["image_id"], "split": row["split"]}
    statements = zip(row["hypothesis"], row["label"], row["kind"], strict=True)
    return {
        "captions": [common | {"references": row["references"]}],
        "entailment": [
            common | {"premise": None, "hypothesis": text, "label": label, "kind": kind}
            for text, label, kind in statements
        ],
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
    strings = {"split": Value("string"), "kind": Value("string")}
    features = {
        "captions": Features(CAPTIONING_FEATURES | {"split": strings["split"]}),
        "entailment": Features(ENTAILMENT_FEATURES | strings),
    }
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(ParquetWriter(folder / f"{name}.parquet", schema.arrow_schema))
            for name, schema in features.items()
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
                files[name].write_table(Table.from_pylist(table, features[name].arrow_schema))


__all__ = [
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
