"""Statements out of captions: what is exchanged, what never is, balance of words, and the file."""

import random
from collections import Counter

import pytest
from PIL import Image

from mue_hf.data import load_entailment
from mue_hf.data.statement_words import GROUPS, KINDS, find_slots, words_of
from mue_hf.data.statements import changed_caption, statements_from_captions, write_statements


def change(caption, kind, references=(), **weights):
    """All that a caption can become."""
    options = {"references": references, "weights": weights or None}
    return {changed_caption(caption, kind, random.Random(seed), **options) for seed in range(200)}


def rows_of(*captions):
    return [{"image": number, "references": list(some)} for number, some in enumerate(captions)]


def test_one_word_of_the_kind_is_exchanged():
    assert change("A bus waits .", "object", bus=1, truck=1) == {"A truck waits ."}
    assert change("Two ladies talk", "object", men=1) == {"Two men talk"}
    assert change("Two dogs run .", "count", three=1) == {"Three dogs run ."}
    assert change("a red coat", "colour", green=1) == {"a green coat"}
    assert change("A dog runs in the snow .", "place", **{"on the beach": 1}) == {"A dog runs on the beach ."}


def test_ways_and_places_differ():
    changed = change("a dog runs down the street", "place")
    assert len(changed) > 3 and all(set(text.split()) & {"through", "across", "along", "down"} for text in changed)


def test_the_article_follows():
    assert change("A cow stands", "object", elephant=1) == {"An elephant stands"}
    assert change("by an elephant", "object", bear=1) == {"by a bear"}
    assert change("in an orange hat", "colour", blue=1) == {"in a blue hat"}


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("a hot dog", "object"),
        ("a teddy bear", "object"),
        ("a man and his bag", "object"),
        ("a black man", "object"),
        ("green grass", "colour"),
        ("a black and white photo of a red car", "colour"),
        ("a two story house", "count"),
        ("two people, one with a hat", "count"),
        ("on the beach towel", "place"),
        ("a yellow line on the road ahead", "place"),
        ("a lamp", "object"),
        ("İ two dogs", "count"),
    ],
)
def test_what_means_something_else_stays(caption, kind):
    assert change(caption, kind) == {None}


def test_what_the_image_may_show_is_not_put_in():
    assert change("a man sits", "object", ["a man and a lady"]) == {None}
    assert change("a man sits", "object", ["people in a park"]) == {None}
    assert change("a bus stops", "object", ["a bus among other vehicles"], truck=1, train=1) == {"a train stops"}
    assert change("two dogs", "count", ["several dogs"], three=1) == {None}
    assert change("a red coat", "colour", ["a multi-colored coat"]) == {None}
    assert change("a cat sits on the couch", "place", ["a cat in a bedroom"], **{"on a bed": 1}) == {None}
    # colours that may be taken for one another
    assert change("a red coat", "colour", orange=1, pink=1) == {None}


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="`kind` must be one of"):
        changed_caption("a dog", "colours", random.Random(0))


def test_nothing_blocks_itself_away():
    """Each form is found as what it is, and its own captions block it."""
    for group in GROUPS:
        assert group.kind in KINDS and len({form for one in group.concepts for form in one.forms}) >= 2
        for concept in group.concepts:
            for form in concept.forms:
                found = [slot for slot in find_slots(f"{form} with", group.kind) if slot.group is group]
                assert [slot.concept for slot in found] == [concept], form
                assert words_of([form]) & concept.blockers, form


CATS, DOGS = ["a cat runs by a tree", "a small cat"], ["a dog runs in a hall", "the dog is grey"]


def test_captions_trade():
    made = statements_from_captions(rows_of(CATS, DOGS), seed=0, kinds=["object"])
    told = [(one["image"], one["hypothesis"], one["label"], one["kind"], one["about"]) for one in made]
    assert told == [
        (0, "a cat runs by a tree", "entailment", "matched", "object"),
        (0, "a dog runs by a tree", "contradiction", "object", "object"),
        (1, "a dog runs in a hall", "entailment", "matched", "object"),
        (1, "a cat runs in a hall", "contradiction", "object", "object"),
    ]
    assert not statements_from_captions(rows_of(CATS, ["a dog sits", "a kitten"]), seed=0)


def many_rows():
    rng = random.Random(0)
    beasts, colours, places = ["dog", "cat", "horse"], ["red", "blue"], ["in the snow", "in a kitchen"]
    texts = ["a {} with a {} bag {} .", "the {} and the {} hat {}"]
    return rows_of(*([rng.choice(texts).format(*map(rng.choice, (beasts, colours, places)))] for _ in range(60)))


def test_words_are_as_frequent_in_true_as_in_false_statements():
    made = statements_from_captions(many_rows(), seed=1, per_image=2)
    assert len(made) > 60 and {one["about"] for one in made} == {"object", "colour", "place"}
    words = {label: Counter() for label in ("entailment", "contradiction")}
    for one in made:
        tokens = one["hypothesis"].split()
        words[one["label"]].update([*tokens, *zip(tokens, tokens[1:], strict=False)])
    assert words["entailment"] == words["contradiction"]
    images = Counter(one["image"] for one in made)
    assert set(images.values()) == {2}
    assert [one["image"] for one in made] == sorted(one["image"] for one in made)


def test_whole_captions_trade():
    rows = rows_of(["two dogs run", "a wet dog"], ["one blue kite"], ["green pears lie here"], ["a kite above dogs"])
    made = statements_from_captions(rows, seed=0, per_image=4, kinds=["caption"])
    pairs = list(zip(made[::2], made[1::2], strict=True))
    assert len(pairs) >= 4 and {one["about"] for one in made} == {"caption"}
    for true, false in pairs:
        own = rows[true["image"]]["references"]
        assert true["image"] == false["image"] and (true["kind"], false["kind"]) == ("matched", "caption")
        assert true["hypothesis"] in own and false["label"] == "contradiction"
        words = set(false["hypothesis"].split())
        assert 3 * len(words & set(" ".join(own).split())) <= len(words)
    texts = [Counter(one["hypothesis"] for one in side) for side in zip(*pairs, strict=True)]
    assert texts[0] == texts[1]


def test_whole_captions_fill_what_other_kinds_leave():
    rows = rows_of(CATS, DOGS, ["two blue kites", "high up"], ["green pears", "food on wood"])
    made = statements_from_captions(rows, seed=0, per_image=4, kinds=["object", "caption"])
    assert Counter(one["about"] for one in made)["object"] == 4
    assert {one["image"] for one in made if one["about"] == "caption"} & {2, 3}
    assert len({(one["image"], one["hypothesis"]) for one in made}) == len(made)


def test_the_seed_decides():
    one, same, other = (statements_from_captions(many_rows(), seed=seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_image": 3}, "`per_image` must be even"),
        ({"kinds": "object"}, "`kinds` must be a list"),
        ({"kinds": ["size"]}, "`kinds` must be a list"),
        ({"rows": [{"image": 1, "captions": ["a dog"]}]}, r"`rows\[0\]` must have a list of captions"),
        ({"rows": [{"references": [" . "]}]}, r"`rows\[0\]` must have a list of captions"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        statements_from_captions(**{"rows": rows_of(CATS), "seed": 0} | change)


def test_the_file_is_read_as_entailment(tmp_path):
    (tmp_path / "photos").mkdir()
    lines = []
    for number, captions in enumerate([CATS, DOGS]):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"{number}.png")
        lines.append({"image": f"{number}.png", "split": "test", "captions": captions})
    source, file = tmp_path / "captions.jsonl", tmp_path / "elsewhere" / "statements.jsonl"
    source.write_text("".join(f"{line}\n" for line in lines).replace("'", '"'))
    options = {"image_root": tmp_path / "photos", "cache_dir": str(tmp_path / "cache")}
    assert write_statements(source, file, "test", **options) == 4
    rows = load_entailment(file, "test", keep_columns=["about"], cache_dir=str(tmp_path / "cache"))
    assert rows["image_id"] == ["0.png", "0.png", "1.png", "1.png"] and set(rows["about"]) == {"object"}
    assert rows["label"] == ["entailment", "contradiction"] * 2
    file.unlink()
    with pytest.raises(ValueError, match="must have captions that can trade"):
        write_statements(source, file, "test", kinds=["count"], **options)
    assert not file.exists()
