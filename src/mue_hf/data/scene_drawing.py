"""Scenes and their pictures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

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
GRID, SEPARATION = 64, 3
RADIUS = {"small": 4, "large": 7}
MOST_VISIBLE, MOST_HIDDEN, PANEL_SHARE = 6, 3, 0.35
# The quadrant as (column, row), 0 or 1 each.
Panel = tuple[int, int] | None


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
    """What a picture shows: `visible` objects, the `hidden` ones under the panel, the quadrant of the `panel` if there
    is one, as (column, row) of 0 or 1, and the colours of background and panel."""

    visible: tuple[SceneObject, ...]
    hidden: tuple[SceneObject, ...]
    panel: Panel
    background: tuple[int, int, int]
    panel_rgb: tuple[int, int, int]


def check_split(split: str) -> None:
    """Raises ValueError for a split that is none of "train", "dev" and "test"."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}; choose one of them.")


def seeded(seed: int, split: str, index: int, purpose: str) -> random.Random:
    """Random numbers for one purpose in one scene: seeded with a string, they are the same on every machine."""
    return random.Random(f"{seed}/{split}/{index}/{purpose}")


def _jitter(rng: random.Random, rgb: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    return tuple(min(max(level + rng.randint(-by, by), 0), 255) for level in rgb)


def _panel_box(panel: tuple[int, int]) -> tuple[int, int, int, int]:
    half = GRID // 2
    left, top = panel[0] * half, panel[1] * half
    return left, top, left + half - 1, top + half - 1


def _place(rng: random.Random, others: Sequence[SceneObject], panel: Panel, hidden: bool) -> SceneObject | None:
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


def _objects(rng: random.Random, count: int, panel: Panel, hidden: bool) -> list[SceneObject] | None:
    """So many objects; None if one found no place."""
    objects: list[SceneObject] = []
    while len(objects) < count:
        placed = _place(rng, objects, panel, hidden)
        if placed is None:
            return None
        objects.append(placed)
    return objects


def make_scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """The scene number `index`, from 0, of a seed and split: always the same, however many are drawn.

    Args:
        index, seed (`int`): another seed, other scenes.
        split (`str`, *optional*, defaults to `"train"`): "train", "dev" or "test", which share no random numbers;
            ValueError for others.
    """
    check_split(split)
    rng = seeded(seed, split, index, "scene")
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


__all__ = ["COLORS", "GRID", "RADIUS", "SHAPES", "Scene", "SceneObject", "check_split", "draw_scene", "make_scene"]
