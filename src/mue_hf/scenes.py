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
* "counting": "there are at least three squares" or "... two red shapes", with 2 to 4. False ones miss by one where
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

from .data import CAPTIONING_FEATURES, ENTAILMENT_FEATURES

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (205, 45, 45),
    "green": (45, 150, 65),
    "blue": (50, 80, 205),
    "yellow": (225, 185, 35),
    "purple": (135, 55, 160),
}
KINDS = ("existence", "counting", "relation", "two_relations")
SPLITS = ("train", "dev", "test")

# Lengths are in units of which a picture has GRID, whatever its size in pixels.
GRID = 64
RADIUS = {"small": 4, "large": 7}
SEPARATION = 3
MOST_VISIBLE, MOST_HIDDEN = 6, 3
PANEL_SHARE = 0.35

NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# (colour, shape): what a statement says of an object
Kind = tuple[str, str]


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
    """A statement on a scene: `text`, `kind` of `KINDS`, and `label` "entailment", "contradiction" or "neutral"."""

    text: str
    kind: str
    label: str


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
    _check_split(split)
    rng = _random(seed, split, index, "scene")
    panel = (rng.randint(0, 1), rng.randint(0, 1)) if rng.random() < PANEL_SHARE else None
    count = rng.randint(2, MOST_VISIBLE)
    visible = None
    # Relations need two kinds of objects.
    while visible is None or len({(one.color, one.shape) for one in visible}) < 2:
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


def _existence(rng: random.Random, scene: Scene) -> tuple[list[str], list[str]]:
    present = {(one.color, one.shape) for one in scene.visible}
    colors, shapes = ({one.color for one in scene.visible}, {one.shape for one in scene.visible})
    absent = [pair for pair in product(COLORS, SHAPES) if pair not in present]
    near = [(color, shape) for color, shape in absent if color in colors and shape in shapes]
    return _existence_texts(sorted(present)), _existence_texts(near or absent)


def _existence_texts(pairs: Sequence[Kind]) -> list[str]:
    return [f"there is a {color} {shape}" for color, shape in pairs]


def _counting(rng: random.Random, scene: Scene) -> tuple[list[str], list[str]]:
    nouns = {f"{shape}{'es' if shape == 'cross' else 's'}": "shape" for shape in SHAPES}
    counts = dict.fromkeys(nouns, 0)
    if rng.random() < 0.5:
        for one in scene.visible:
            counts[f"{one.shape}{'es' if one.shape == 'cross' else 's'}"] += 1
    else:
        counts = {f"{color} shapes": sum(one.color == color for one in scene.visible) for color in COLORS}
    possible = [number for number in NUMBERS if number <= max(counts.values())]
    if not possible:
        return [], []
    number = rng.choice(possible)
    reached = [noun for noun, count in counts.items() if count >= number]
    most = max((count for count in counts.values() if count < number), default=0)
    missed = [noun for noun, count in counts.items() if count == most]
    texts = [[f"there are at least {NUMBERS[number]} {noun}" for noun in nouns] for nouns in (reached, missed)]
    return texts[0], texts[1]
