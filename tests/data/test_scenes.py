"""Generated scenes: always the same, laid out and labelled as the module says, without a hint in the wording."""

import re
from collections import Counter, defaultdict
from hashlib import sha256
from itertools import combinations, product

import numpy as np
import pytest

from mue_hf.data import load_captioning, load_entailment
from mue_hf.data.scene_drawing import MOST_HIDDEN, SEPARATION
from mue_hf.data.scenes import (
    COLORS,
    FORMS,
    GRID,
    SHAPES,
    Scene,
    SceneDataset,
    SceneObject,
    draw_scene,
    make_scene,
    scene_captions,
    scene_statements,
    write_scenes,
)

OBJECT = r"an? (\w+) (\w+)"
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
PLACED = {
    "left of": lambda one, other: one.x < other.x,
    "right of": lambda one, other: one.x > other.x,
    "above": lambda one, other: one.y < other.y,
    "below": lambda one, other: one.y > other.y,
}
PLACES = "|".join(PLACED)


def kind_of(one: SceneObject) -> tuple[str, str]:
    return one.color, one.shape


def holds(text: str, objects: tuple[SceneObject, ...]) -> bool:
    """The truth of a statement about objects that are all known, read from its words."""
    if match := re.fullmatch(rf"there is {OBJECT}", text):
        return any(kind_of(one) == match.groups() for one in objects)
    if match := re.fullmatch(r"there are at least (two|three) (?:(\w+) shapes|(\w+))", text):
        number, color, plural = match.groups()
        same = [one for one in objects if one.color == color or one.shape == PLURALS.get(plural)]
        return len(same) >= {"two": 2, "three": 3}[number]
    if match := re.fullmatch(rf"{OBJECT} is ({PLACES}) {OBJECT}", text):
        groups = match.groups()
        return any(
            kind_of(one) == groups[:2] and kind_of(other) == groups[3:] and PLACED[groups[2]](one, other)
            for one, other in product(objects, repeat=2)
        )
    match = re.fullmatch(rf"{OBJECT} is ({PLACES}) {OBJECT} that is ({PLACES}) {OBJECT}", text)
    groups = match.groups()
    named = ([one for one in objects if kind_of(one) == kind] for kind in (groups[:2], groups[3:5], groups[6:]))
    return any(
        PLACED[groups[2]](one, other) and PLACED[groups[5]](other, third) for one, other, third in product(*named)
    )


def worlds(text: str, scene: Scene):
    """What the picture may be as a whole: the panel hides 0 to 3 small objects of the kinds that the text names, on
    nine places of its quadrant where they do not overlap."""
    yield scene.visible
    if scene.panel is None:
        return
    colors, shapes = ([name for name in names if re.search(rf"\b{name}", text)] for names in (COLORS, SHAPES))
    left, top = (index * GRID // 2 for index in scene.panel)
    places = list(product((left + 5, left + 15, left + 26), (top + 5, top + 15, top + 26)))
    kinds = list(product(colors or ["red"], shapes or ["circle"]))
    for count in range(1, MOST_HIDDEN + 1):
        for chosen in combinations(places, count):
            for hidden in product(kinds, repeat=count):
                pairs = zip(hidden, chosen, strict=True)
                added = (SceneObject(shape, color, "small", x, y, (0, 0, 0)) for (color, shape), (x, y) in pairs)
                yield (*scene.visible, *added)


def slow_label(text: str, scene: Scene) -> str:
    truths = set()
    for objects in worlds(text, scene):
        truths.add(holds(text, objects))
        if len(truths) == 2:
            return "neutral"
    return "entailment" if truths == {True} else "contradiction"


class TestLabels:
    @pytest.mark.parametrize("kind", FORMS)
    def test_agree_with_slow_checker(self, kind):
        seen, searched = Counter(), 0
        for index in range(60):
            scene = make_scene(index, seed=3)
            for statement in scene_statements(index, 3, seed=3, kinds=[kind]):
                # A yes is settled by every world alone, of which there are thousands: three times is enough.
                searched += statement.label == "entailment" and scene.panel is not None
                if statement.label == "entailment" and scene.panel is not None and searched > 3:
                    continue
                assert slow_label(statement.text, scene) == statement.label, statement
                seen[statement.label] += 1
        assert min(seen[label] for label in ("entailment", "contradiction", "neutral")) > 5

    def test_agree_with_what_is_hidden(self):
        for index in range(200):
            scene = make_scene(index)
            for statement in scene_statements(index, 4):
                truth = holds(statement.text, (*scene.visible, *scene.hidden))
                assert statement.label == "neutral" or truth == (statement.label == "entailment")

    def test_neither_wording_nor_panel_gives_them_away(self):
        counts = defaultdict(Counter)
        names = re.compile("|".join([*PLURALS, *COLORS, *SHAPES]))
        for index in range(1500):
            panel = make_scene(index).panel is not None
            for statement in scene_statements(index, 8):
                yes = statement.label == "entailment"
                assert statement.label != ("contradiction" if panel else "neutral")
                counts[statement.kind, panel][yes] += 1
                counts[names.sub("_", statement.text)][yes] += 1
        assert len(counts) == 2 * len(FORMS) + 1 + 4 + 4 + 16
        for key, count in counts.items():
            share = count[True] / count.total()
            # Five standard deviations of a fair coin.
            assert abs(share - 0.5) < 2.5 / count.total() ** 0.5, (key, count)

    def test_hard_negatives_name_what_is_there(self):
        for index in range(100):
            names = {one.name for one in make_scene(index).visible}
            for statement in scene_statements(index, 4, kinds=["relation", "two_relations"]):
                # Two objects of the same kind on both sides of the only other one serve no relation.
                if statement.kind == "existence":
                    continue
                assert set(map(" ".join, re.findall(OBJECT, statement.text))) <= names


class TestScenes:
    def test_layout(self):
        panels = 0
        for index in range(1000):
            scene = make_scene(index, seed=1)
            panels += scene.panel is not None
            assert 2 <= len(scene.visible) <= 6
            assert len(scene.hidden) <= (0 if scene.panel is None else MOST_HIDDEN)
            for one, other in combinations(scene.visible, 2):
                assert max(abs(one.x - other.x), abs(one.y - other.y)) > one.radius + other.radius
                assert min(abs(one.x - other.x), abs(one.y - other.y)) >= SEPARATION
            for one in (*scene.visible, *scene.hidden):
                box = product((one.x - one.radius, one.x + one.radius), (one.y - one.radius, one.y + one.radius))
                corners = list(box)
                assert all(0 <= value < GRID for corner in corners for value in corner)
                under = {(x * 2 // GRID, y * 2 // GRID) == scene.panel for x, y in corners}
                assert under == {one in scene.hidden}
        assert 0.3 < panels / 1000 < 0.4

    def test_same_whatever_is_drawn_before(self):
        expected = [(make_scene(index), scene_statements(index, 5)) for index in range(5)]
        assert make_scene(4) == expected[4][0]
        assert scene_statements(4, 2) == expected[4][1][:2]
        assert len({make_scene(0), make_scene(0, seed=1), make_scene(0, split="test"), make_scene(1)}) == 4

    def test_same_on_every_machine(self):
        text = repr([(make_scene(index, 7, "test"), scene_statements(index, 8, 7, "test")) for index in range(50)])
        assert sha256(text.encode()).hexdigest()[:16] == "6af83d29cbc958bc"

    @pytest.mark.parametrize("size", [64, 128, 100])
    def test_picture(self, size):
        for index in range(20):
            scene = make_scene(index)
            picture = np.asarray(draw_scene(scene, size))
            assert picture.shape == (size, size, 3)
            for one in scene.visible:
                # All shapes cover their centre.
                at = picture[int((one.y + 0.5) * size / GRID), int((one.x + 0.5) * size / GRID)]
                assert tuple(at) == one.rgb
            if scene.panel is not None:
                column, row = (int(round(value * size / 2)) for value in scene.panel)
                panel = picture[row : row + size // 2, column : column + size // 2].reshape(-1, 3)
                assert np.unique(panel, axis=0).tolist() == [list(scene.panel_rgb)]

    def test_captions(self):
        for index in range(100):
            scene = make_scene(index)
            left, top = scene_captions(scene)
            by_x = sorted(scene.visible, key=lambda one: one.x)
            assert left == "from left " + " ".join(f"{one.size} {one.color} {one.shape}" for one in by_x)
            assert top.startswith("from top ") and sorted(top.split()[2:]) == sorted(left.split()[2:])
            assert max(len(left.split()), len(top.split())) <= 20


class TestDataset:
    def test_rows(self):
        dataset = SceneDataset(3, seed=2, split="dev", statements=4)
        row = dataset[2]
        assert len(dataset) == len(list(dataset)) == 3
        assert row["image_id"] == "dev-2-0000002" and row["image"].size == (64, 64)
        assert row["references"] == scene_captions(make_scene(2, 2, "dev"))
        assert row["hypothesis"] == [one.text for one in scene_statements(2, 4, 2, "dev")]
        assert "hypothesis" not in SceneDataset(1, statements=0)[0]
        assert "references" not in SceneDataset(1, captions=False)[0]

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"scenes": 0}, "`scenes` must be at least 1"),
            ({"scenes": 1, "statements": -1}, "`statements` must be at least 0"),
            ({"scenes": 1, "image_size": 8}, "`image_size` must be at least 32"),
            ({"scenes": 1, "statements": 0, "captions": False}, "there would be no text"),
            ({"scenes": 1, "split": "validation"}, "`split` must be one of .*'dev'"),
            ({"scenes": 1, "kinds": ["colour"]}, "`kinds` must be a list of some of"),
            ({"scenes": 1, "kinds": "existence"}, "`kinds` must be a list of some of"),
        ],
    )
    def test_bad_arguments(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            SceneDataset(**arguments)

    @pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
    def test_written_and_read(self, tmp_path, file_format):
        folder, cache = tmp_path / "scenes", str(tmp_path / "cache")
        write_scenes(folder, {"train": 4, "test": 2}, seed=5, statements=3, file_format=file_format)
        assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
        captions = load_captioning(folder / f"captions.{file_format}", "test", cache_dir=cache)
        pairs = load_entailment(folder / f"entailment.{file_format}", "train", keep_columns=["kind"], cache_dir=cache)
        expected = SceneDataset(4, 5, "train", statements=3)
        assert (len(captions), len(pairs)) == (2, 12)
        assert captions[1]["references"] == scene_captions(make_scene(1, 5, "test"))
        for number, row in enumerate(pairs):
            scene = expected[number // 3]
            assert np.array_equal(row["image"], scene["image"]) and row["image_id"] == scene["image_id"]
            assert row["premise"] is None
            assert all(row[name] == scene[name][number % 3] for name in ("hypothesis", "label", "kind"))

    def test_written_whole_or_not_at_all(self, tmp_path):
        with pytest.raises(ValueError, match="`split` must be one of"):
            write_scenes(tmp_path / "scenes", {"train": 1, "validation": 1})
        with pytest.raises(ValueError, match="`folder` must not exist"):
            write_scenes(tmp_path, {"train": 1})
        with pytest.raises(ValueError, match="`file_format` must be one of"):
            write_scenes(tmp_path / "scenes", {"train": 1}, file_format="csv")
        with pytest.raises(ValueError, match="must not be empty"):
            write_scenes(tmp_path / "scenes", {})
        assert not list(tmp_path.iterdir())
