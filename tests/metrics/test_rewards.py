"""The CIDEr-D reward against pycocoevalcap's scorer."""

import pytest

from mue_hf.metrics.rewards import CiderDReward

END = 2
REFERENCES = [
    [[5, 6, 7, 8, 9, 10, END], [5, 11, 6, 12, 13, END], [9, 6, 7, END]],
    [[14, 15, 16, 8, 5, 17, END], [15, 18, 8, 5, 19, 17, END]],
    [[5, 20, 21, END], [5, 21, 8, 9, 10, END], [22, 23, 20, 21, 24, 8, 9, 10, END]],
]
CAPTIONS = [[5, 6, 7, 8, 10, END], [5, 6, 16, 8, 5, 17, 8, 5, 17], [21]]


def test_scores_are_those_of_pycocoevalcap():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer()
    for caption, references in zip(CAPTIONS, REFERENCES, strict=True):
        scorer += (" ".join(map(str, caption)), [" ".join(map(str, reference)) for reference in references])
    expected = scorer.compute_score()[1]
    assert CiderDReward(REFERENCES)(CAPTIONS, REFERENCES) == pytest.approx(expected.tolist())


def test_frequencies_are_those_of_the_training_references():
    reward = CiderDReward(REFERENCES)
    # 5 is in every training image and carries no weight, 99 in none and carries the most
    assert reward([[5]], [[[5]]]) == [0.0]
    assert reward([[5, 99]], [[[5, 99]]]) == pytest.approx([5.0])


def test_caption_that_breaks_off_scores_less():
    reward = CiderDReward(REFERENCES)
    whole = REFERENCES[0][0]
    assert reward([whole], REFERENCES[:1]) > reward([whole[:-1]], REFERENCES[:1])


@pytest.mark.parametrize("caption", [[], [99]], ids=["empty", "unknown"])
def test_nothing_in_common_scores_nothing(caption):
    assert CiderDReward(REFERENCES)([caption], REFERENCES[:1]) == [0.0]


@pytest.mark.parametrize("references", [[[[5]]], [[[5]], []]], ids=["one-image", "no-reference"])
def test_bad_references(references):
    with pytest.raises(ValueError, match="`references` must hold at least two images, each with a reference"):
        CiderDReward(references)
