"""The baseline of words alone: what it learns, that it is the regression it says, and what it refuses."""

import pytest
import torch

from mue_hf.metrics.words import words_baseline

TEXTS = ["a red dog", "a red cat", "a blue dog", "a blue cat"] * 2


def test_it_learns_words_and_pairs():
    colours = ["yes" if "red" in text else "no" for text in TEXTS]
    assert words_baseline(TEXTS, colours, ["Red thing!", "the blue dog"]) == ["yes", "no"]
    # neither colour nor animal tells, only both together
    same = ["yes" if text in ("a red dog", "a blue cat") else "no" for text in TEXTS]
    assert words_baseline(TEXTS, same, TEXTS) == same
    assert words_baseline(TEXTS, same, []) == []


def test_words_that_tell_nothing_give_the_most_frequent_label():
    assert words_baseline(TEXTS, ["maybe"] * 6 + ["no"] * 2, ["something else"], penalty=100) == ["maybe"]
    # what occurs once is not looked at
    texts, labels = ["a", "a", "b", "c", "d"], ["no", "no", "no", "no", "yes"]
    assert words_baseline(texts, labels, ["d"], penalty=0.01) == ["no"]
    assert words_baseline(texts, labels, ["d"], penalty=0.01, fewest=1) == ["yes"]


def test_gradients_may_be_off():
    with torch.no_grad():
        assert words_baseline(["a"] * 2 + ["b"] * 2, ["x", "x", "y", "y"], ["a", "b"]) == ["x", "y"]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["yes"], {}, "one entry per statement, got 8 and 1"),
        (["yes"] * 8, {}, "at least two labels"),
        (["yes", "no"] * 4, {"penalty": 0}, "`penalty` must be above 0"),
    ],
)
def test_bad_arguments(labels, options, message):
    with pytest.raises(ValueError, match=message):
        words_baseline(TEXTS, labels, TEXTS, **options)
