"""Captions of scenes, and statements about them with their labels."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

from .scene_drawing import COLORS, SHAPES, Scene, SceneObject, make_scene, seeded

# Not above MOST_HIDDEN: hidden objects alone must be able to make a statement true.
NUMBERS = {"two": 2, "three": 3}
PLACED: dict[str, Callable[[SceneObject, SceneObject], bool]] = {
    "left of": lambda one, other: one.x < other.x,
    "right of": lambda one, other: one.x > other.x,
    "above": lambda one, other: one.y < other.y,
    "below": lambda one, other: one.y > other.y,
}
RELATIONS = tuple(PLACED)
# The wordings of each kind up to colours and shapes.
FORMS = {
    "existence": ("there is a {}",),
    "counting": tuple(product(("shape", "color"), NUMBERS)),
    "relation": RELATIONS,
    "two_relations": tuple(product(RELATIONS, RELATIONS)),
}
# In place of a kind of which a scene has no statements.
EASIER = {"counting": "existence", "relation": "existence", "two_relations": "relation"}


@dataclass(frozen=True, slots=True)
class Statement:
    """A `text` about a scene, its `kind` (of `FORMS`), and its `label` "entailment", "contradiction" or "neutral"."""

    text: str
    kind: str
    label: str


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises ValueError for what is no list of some kinds of statements."""
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(FORMS):
        raise ValueError(f"`kinds` must be a list of some of {list(FORMS)}, got {kinds!r}; check the spelling.")


def scene_captions(scene: Scene) -> list[str]:
    """The two references of a scene: all visible objects in order, "from left small red circle large blue square" and
    "from top ..."; at most 20 words, so that nothing of them is cut in training."""
    orders = {"from left": lambda one: one.x, "from top": lambda one: one.y}
    return [
        " ".join([name, *(f"{one.size} {one.color} {one.shape}" for one in sorted(scene.visible, key=key))])
        for name, key in orders.items()
    ]


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
    holding = {(one.name, other.name) for one, other in permutations(scene.visible, 2) if PLACED[form](one, other)}
    texts: tuple[list[str], list[str]] = [], []
    for pair in permutations(_names(scene.visible), 2):
        texts[pair not in holding].append(f"a {pair[0]} is {form} a {pair[1]}")
    return texts


def _two_relations(scene: Scene, form: tuple[str, str]) -> tuple[list[str], list[str]]:
    first, second = form
    joint, held_first, held_second = set(), set(), set()
    for middle in scene.visible:
        before = {one.name for one in scene.visible if PLACED[first](one, middle)}
        after = {one.name for one in scene.visible if PLACED[second](middle, one)}
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


# Kind -> (scene, form) -> the true and the false statements of that form.
TEXTS: dict[str, Callable[[Scene, Any], tuple[list[str], list[str]]]] = {
    "existence": _existence,
    "counting": _counting,
    "relation": _relation,
    "two_relations": _two_relations,
}


def _statement(scene: Scene, kind: str, rng: random.Random) -> Statement:
    forms = FORMS[kind]
    for form in rng.sample(forms, len(forms)):
        holding, failing = TEXTS[kind](scene, form)
        # A form that had true or false statements alone would reveal the answer.
        if holding and failing:
            if rng.random() < 0.5:
                return Statement(rng.choice(holding), kind, "entailment")
            return Statement(rng.choice(failing), kind, "contradiction" if scene.panel is None else "neutral")
    return _statement(scene, EASIER[kind], rng)


def scene_statements(
    index: int, count: int, seed: int = 0, split: str = "train", kinds: Sequence[str] = tuple(FORMS)
) -> list[Statement]:
    """`count` statements on the scene of [`make_scene`], whose kinds are drawn evenly; fewer are the first of more.

    In place of a kind of which the scene has none, such as two relations of two objects, comes the next easier one;
    some statements of a scene may be the same.

    Args:
        kinds (sequence of `str`, *optional*): of "existence", "counting", "relation" and "two_relations"; ValueError
            for others.
    """
    check_kinds(kinds)
    scene = make_scene(index, seed, split)
    rng = seeded(seed, split, index, "statements")
    return [_statement(scene, rng.choice(kinds), rng) for _ in range(count)]


__all__ = ["FORMS", "RELATIONS", "Statement", "check_kinds", "scene_captions", "scene_statements"]
