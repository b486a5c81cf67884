"""pycocoevalcap's scorers: each gives the score of the corpus, of every image, and of resampled corpora."""

import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.spice import Spice

from .java import Meteor

# BLEU-1 to BLEU-4.
ORDERS = 4


class Score(NamedTuple):
    """`value` of the corpus, `per_image` [images] and `resampled` [resamples]."""

    value: float
    per_image: NDArray
    resampled: NDArray


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], weights: NDArray) -> dict[str, Score]:
    """BLEU-1 to 4 of the corpus, against the reference of the closest length."""
    scorer = BleuScorer(n=ORDERS)
    for prediction, candidates in zip(predictions, references, strict=True):
        scorer += (prediction, candidates)
    values, per_image = scorer.compute_score(option="closest", verbose=0)
    statistics = np.array([_bleu_statistics(counts) for counts in scorer.ctest], dtype=np.float64)
    resampled = bleu_of(weights @ statistics)
    return {f"bleu_{n + 1}": Score(values[n], np.array(per_image[n]), resampled[:, n]) for n in range(ORDERS)}


def _bleu_statistics(counts: dict) -> list[int]:
    length = counts["testlen"]
    closest = min((abs(other - length), other) for other in counts["reflen"])[1]
    return [length, closest, *counts["guess"], *counts["correct"]]


def bleu_of(statistics: NDArray) -> NDArray:
    """BLEU-1 to 4 [corpora, 4] from summed counts, with pycocoevalcap's guards against division by zero.

    Args:
        statistics (float array [corpora, 10]): words, words of the closest references, n-grams for n = 1..4, and how
            many of these are in a reference.
    """
    lengths, closest = statistics[:, :1], statistics[:, 1:2]
    guesses, correct = np.split(statistics[:, 2:], 2, axis=1)
    precisions = np.cumprod((correct + 1e-15) / (guesses + 1e-9), axis=1)
    ratios = (lengths + 1e-15) / (closest + 1e-9)
    # Far below the smallest double already at a ratio of 1/800; an empty corpus would overflow.
    brevity = np.exp(np.clip(1 - 1 / ratios, -800.0, 0.0))
    return precisions ** (1 / np.arange(1, ORDERS + 1)) * brevity


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]], weights: NDArray) -> dict[str, Score]:
    """METEOR 1.5 of the corpus, whose score comes from the summed statistics of its images."""
    with Meteor() as program:
        statistics = program.statistics(predictions, references)
        per_image, value = program.scores(statistics)
        resampled = program.scores(weights @ statistics)[0] if len(weights) else np.empty(0)
    return {"meteor": Score(value, per_image, resampled)}


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]], weights: NDArray) -> dict[str, Score]:
    """Mean ROUGE-L of the images."""
    return {"rouge_l": _mean_score(_per_image(Rouge(), predictions, references), weights)}


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]], weights: NDArray) -> dict[str, Score]:
    """Mean CIDEr-D of the images, with document frequencies of all references, in resampled corpora too."""
    return {"cider": _mean_score(_per_image(Cider(), predictions, references), weights)}


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]], weights: NDArray) -> dict[str, Score]:
    """Mean SPICE of the images."""
    try:
        categories = _per_image(Spice(), predictions, references)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"SPICE ended with exit status {error.returncode}; its messages are above. It was made for Java 8, with "
            '8 GB of memory: put such a `java` first on PATH, or leave "spice" out of `metrics`.'
        ) from error
    return {"spice": _mean_score(np.array([image["All"]["f"] for image in categories]), weights)}


def _per_image(scorer: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Any:
    """What one of pycocoevalcap's scorers says of each image."""
    truths = dict(enumerate(map(list, references)))
    return scorer.compute_score(truths, {i: [text] for i, text in enumerate(predictions)})[1]


def _mean_score(per_image: NDArray, weights: NDArray) -> Score:
    return Score(float(np.mean(per_image)), per_image, weights @ per_image / len(per_image))


__all__ = ["Score", "bleu", "bleu_of", "cider", "meteor", "rouge_l", "spice"]
