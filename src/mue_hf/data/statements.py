"""Statements about photos, made from captions by rule so that words alone do not tell the true from the false."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from datasets import Image

from ..files import write_whole
from .captioning import load_captioning
from .reader import has_words
from .statement_words import KINDS, Slot, excludes, find_slots, put, words_of

# Captions that are looked at as partners of one, so that time stays linear in their number.
MOST_TRIED = 400
# What a statement can be false by: the caption of another image is the coarsest.
STATEMENT_KINDS = (*KINDS, "caption")
# Of the words of a caption at most this part may be in the captions of the image that it is false of.
MOST_SHARED = 1 / 3


def changed_caption(
    caption: str,
    kind: str,
    rng: random.Random,
    *,
    references: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
) -> str | None:
    """A caption with one word, or one phrase, exchanged for another one of its kind.

    Args:
        caption (`str`): what is changed.
        kind (`str`): "object", "count", "colour" or "place".
        rng (`random.Random`): draws what is exchanged, and for what.
        references (sequence of `str`, *optional*): all captions of the image: what they may be speaking of is not put
            in. The caption itself always counts.
        weights (`dict` of `str` to `float`, *optional*): how often words and phrases are drawn, such as their numbers
            in the captions of a data set; one that is left out never is. Default: all alike.

    Returns:
        `str` or None: None where the caption has nothing of the kind, or nothing that can stand in its place.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, got {kind!r}; check the spelling.")
    words = words_of([caption, *references])
    slots = find_slots(caption, kind)
    for slot in rng.sample(slots, len(slots)):
        forms = [form for one in slot.group.concepts if excludes(slot, one, words) for form in one.forms]
        chances = [1.0 if weights is None else weights.get(form, 0.0) for form in forms]
        if any(chances):
            return put(caption, slot, rng.choices(forms, chances)[0])
    return None


@dataclass(eq=False, slots=True)
class _Place:
    """A slot of a caption, of the row with the number `row`."""

    row: int
    caption: str
    slot: Slot
    words: frozenset[str]


def statements_from_captions(
    rows: Iterable[Mapping[str, Any]], *, seed: int, per_image: int = 2, kinds: Sequence[str] = KINDS
) -> list[dict[str, Any]]:
    """Statements about images, half of them captions as they are, half of them captions with one thing changed.

    Captions of two images trade places of one kind: "a dog runs in the snow" and "a cat runs by a tree" become "a cat
    runs in the snow" and "a dog runs by a tree", each false of its own image. Both captions are used as they are, too.
    Captions trade that have the same word on the left and on the right of what is exchanged: all words and pairs of
    neighbours are then as frequent in true as in false statements. Only when these are used up do captions trade that
    share the right word alone. Of several partners the one with most words in common is taken, and nothing is put in
    that a caption of the image may be speaking of. Captions with nothing to exchange, or without a partner, make no
    statements; kinds are as equally frequent as the captions allow.

    The kind "caption" is the easiest to learn: two images trade whole captions, which share few words with those of
    the image that they are false of. What other kinds leave of `per_image` goes to it.

    Args:
        rows (iterable of `dict`): one per image: "references", its captions, and anything else, such as "image".
        seed (`int`): of all draws; the same rows and seed give the same statements.
        per_image (`int`, *optional*, defaults to 2): statements about one image at most, an even number.
        kinds (sequence of `str`, *optional*): what is exchanged: of "object", "count", "colour" and "place", and of
            "caption".

    Returns:
        `list` of `dict`: what the row has beside its captions, and "hypothesis", "label" ("entailment" or
        "contradiction"), "kind" ("matched", or what was exchanged), and "about": what was exchanged in this or, in a
        matched one, in its counterpart, so that half of the statements about each are true. In the order of rows.

    Raises:
        ValueError: if a row has no captions, or an argument is out of range.
    """
    if per_image < 2 or per_image % 2:
        raise ValueError(f"`per_image` must be even and at least 2, got {per_image}; half of them are changed.")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(STATEMENT_KINDS):
        raise ValueError(
            f"`kinds` must be a list of some of {list(STATEMENT_KINDS)}, got {kinds!r}; check the spelling."
        )
    rows = list(rows)
    words = [words_of(_references(row, number)) for number, row in enumerate(rows)]
    rng = random.Random(seed)
    made: list[list[dict[str, Any]]] = [[] for _ in rows]

    def add(row: int, true: str, false: str, kind: str) -> None:
        rest = {name: value for name, value in rows[row].items() if name != "references"}
        for text, label, name in ((true, "entailment", "matched"), (false, "contradiction", kind)):
            made[row].append({**rest, "hypothesis": text, "label": label, "kind": name, "about": kind})

    for pair in _trades(rows, words, rng, per_image // 2, [kind for kind in kinds if kind in KINDS]):
        for own, other in (pair, pair[::-1]):
            changed = put(own.caption, own.slot, other.slot.form)
            add(own.row, own.caption, changed, own.slot.group.kind)
    if "caption" in kinds:
        left = [per_image // 2 - len(some) // 2 for some in made]
        used = {(number, row["hypothesis"]) for number, some in enumerate(made) for row in some}
        for (row, own_caption), (partner, other_caption) in _whole_trades(rows, words, rng, left, used):
            add(row, own_caption, other_caption, "caption")
            add(partner, other_caption, own_caption, "caption")
    return [statement for some in made for statement in some]


def write_statements(
    source: str | PathLike,
    file: str | PathLike,
    split: str = "train",
    *,
    seed: int = 0,
    per_image: int = 2,
    kinds: Sequence[str] = KINDS,
    **options: Any,
) -> int:
    """Writes the statements of a data set of captions to a JSONL file for [`load_entailment`], whole or not at all.

    Args:
        source, split, options: as of [`load_captioning`]; its images are files.
        file (`str` or `PathLike`): gets a row per statement: "image" (an absolute path), "image_id", "split",
            "hypothesis", "label", "kind" and "about".
        seed, per_image, kinds: see [`statements_from_captions`].

    Returns:
        `int`: how many statements there are.

    Raises:
        ValueError: as [`load_captioning`] and [`statements_from_captions`], and before anything is written for images
            that are no files, and captions of which no statement can be made.
    """
    loaded = load_captioning(source, split, **options | {"streaming": False}).cast_column("image", Image(decode=False))
    rows = []
    for row in loaded.select_columns(["image", "image_id", "references"]):
        path = row["image"]["path"]
        if row["image"]["bytes"] or path is None:
            raise ValueError(
                f"`source` must name image files, got an embedded one in {source}; save the images first."
            )
        rows.append({"image": path, "image_id": row["image_id"], "split": split, "references": row["references"]})
    made = statements_from_captions(rows, seed=seed, per_image=per_image, kinds=kinds)
    if not made:
        raise ValueError(
            f"`source` must have captions that can trade words, got none among {len(rows)} images of {source}; add "
            "captions."
        )
    write_whole(file, "".join(json.dumps(row) + "\n" for row in made))
    return len(made)


def _references(row: Mapping[str, Any], number: int) -> Sequence[str]:
    captions = row.get("references")
    if not isinstance(captions, list | tuple) or not captions or not all(map(has_words, captions)):
        raise ValueError(
            f"`rows[{number}]` must have a list of captions with words as `references`, got {captions!r}; load them "
            "with `load_captioning`."
        )
    return captions


def _trades(
    rows: Sequence[Mapping[str, Any]],
    words: Sequence[frozenset[str]],
    rng: random.Random,
    most: int,
    kinds: Sequence[str],
) -> list[tuple[_Place, _Place]]:
    """Pairs of places whose words trade; at most `most` places of a row."""
    places = [
        _Place(number, caption, slot, words_of([caption]))
        for number, row in enumerate(rows)
        for caption in dict.fromkeys(row["references"])
        for slot in find_slots(caption)
        if slot.group.kind in kinds
    ]
    rng.shuffle(places)
    left = [most] * len(rows)
    used: set[tuple[int, str]] = set()
    found: list[tuple[_Place, _Place]] = []
    counts = dict.fromkeys(kinds, 0)

    def free(place: _Place) -> bool:
        return left[place.row] > 0 and (place.row, place.caption) not in used

    def fits(place: _Place, other: _Place) -> bool:
        there = other.row != place.row and excludes(place.slot, other.slot.concept, words[place.row])
        return there and free(other) and excludes(other.slot, place.slot.concept, words[other.row])

    for strictness in range(2):
        places = [place for place in places if free(place)]
        alike: dict[tuple[str, ...], list[_Place]] = defaultdict(list)
        waiting: dict[str, list[_Place]] = {kind: [] for kind in kinds}
        for place in places:
            alike[_contexts(place)[strictness]].append(place)
            waiting[place.slot.group.kind].append(place)
        while any(waiting.values()):
            kind = min((kind for kind in kinds if waiting[kind]), key=counts.__getitem__)
            place = waiting[kind].pop()
            if not free(place):
                continue
            near = alike[_contexts(place)[strictness]]
            start = rng.randrange(len(near))
            looked_at = (near[(start + step) % len(near)] for step in range(min(len(near), MOST_TRIED)))
            fitting = [other for other in looked_at if fits(place, other)]
            if not fitting:
                continue
            other = max(fitting, key=lambda other: _likeness(place, other))
            found.append((place, other))
            counts[kind] += 1
            for one in (place, other):
                left[one.row] -= 1
                used.add((one.row, one.caption))
    return found


def _whole_trades(
    rows: Sequence[Mapping[str, Any]],
    words: Sequence[frozenset[str]],
    rng: random.Random,
    left: list[int],
    used: set[tuple[int, str]],
) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    """Pairs of (row, caption) that trade as a whole; of each row as many as are `left`, none of those `used`."""
    free = [(number, text) for number, row in enumerate(rows) for text in dict.fromkeys(row["references"])]
    free = [place for place in free if place not in used]
    rng.shuffle(free)
    waiting: list[tuple[int, str, frozenset[str]]] = []
    found = []
    for row, caption in free:
        if not left[row]:
            continue
        own = words_of([caption])
        for place in range(len(waiting) - 1, max(-1, len(waiting) - 1 - MOST_TRIED), -1):
            partner, other_caption, other = waiting[place]
            if partner == row or max(_shared(own, words[partner]), _shared(other, words[row])) > MOST_SHARED:
                continue
            waiting.pop(place)
            found.append(((row, caption), (partner, other_caption)))
            break
        else:
            waiting.append((row, caption, own))
        # a row that is full, counting what waits, takes no more
        left[row] -= 1
    return found


def _shared(caption: frozenset[str], references: frozenset[str]) -> float:
    return len(caption & references) / len(caption)


def _contexts(place: _Place) -> tuple[tuple[str, ...], ...]:
    """What partners share: both neighbours, or else the right one."""
    slot = place.slot
    return (slot.group.name, slot.left, slot.right), (slot.group.name, slot.right)


def _likeness(one: _Place, other: _Place) -> float:
    return len(one.words & other.words) / len(one.words | other.words)


__all__ = ["STATEMENT_KINDS", "changed_caption", "statements_from_captions", "write_statements"]
