"""CIDEr-D of single captions, as the reward of self-critical training: plain Python, no Java, fixed frequencies."""

import math
from collections import Counter
from collections.abc import Sequence

MAX_LENGTH = 4
LENGTH_SIGMA = 6.0

# The n-grams of each length 1 to 4 with their weights, and the length of the caption as the scorer counts it.
_Vectors = tuple[list[dict[tuple, float]], int]


class CiderDReward:
    """CIDEr-D (Vedantam et al., 2015) with the document frequencies of the training references.

    Captions are token ids as the model writes them, the end token included, so that captions do not learn to break
    off. Values therefore differ from published CIDEr, which counts PTB words; on the same tokens and frequencies they
    are those of pycocoevalcap's scorer. A call with captions and the references of each gives their scores, from 0 to
    10 (a caption like every reference).

    Args:
        references (sequence of sequences of token ids): the references of every training image, from
            `processor.encode_captions`; they set the frequencies.

    Raises:
        ValueError: if there are fewer than two images, or an image without a reference.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[int]]]):
        empty = [index for index, captions in enumerate(references) if len(captions) == 0]
        if len(references) < 2 or empty:
            raise ValueError(
                f"`references` must hold at least two images, each with a reference, got {len(references)} images, "
                f"without a reference those at {empty[:5]}; leave them out."
            )
        self.frequencies: Counter = Counter()
        for captions in references:
            self.frequencies.update({gram for caption in captions for grams in _counts(caption) for gram in grams})
        self.log_images = math.log(len(references))

    def __call__(
        self, captions: Sequence[Sequence[int]], references: Sequence[Sequence[Sequence[int]]]
    ) -> list[float]:
        scores = []
        for caption, truths in zip(captions, references, strict=True):
            guess = self._vectors(caption)
            scores.append(10.0 * sum(_similarity(guess, self._vectors(truth)) for truth in truths) / len(truths))
        return scores

    def _vectors(self, caption: Sequence[int]) -> _Vectors:
        counts, weights = _counts(caption), []
        for grams in counts:
            rarity = {gram: self.log_images - math.log(max(1, self.frequencies[gram])) for gram in grams}
            weights.append({gram: count * rarity[gram] for gram, count in grams.items()})
        # the scorer of the field takes the number of word pairs for the length
        return weights, sum(counts[1].values())


def _similarity(guess: _Vectors, truth: _Vectors) -> float:
    total = 0.0
    for ours, theirs in zip(guess[0], truth[0], strict=True):
        norms = math.sqrt(sum(x * x for x in ours.values()) * sum(x * x for x in theirs.values()))
        product = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
        total += product / norms if norms else 0.0
    return total / MAX_LENGTH * math.exp(-((guess[1] - truth[1]) ** 2) / (2 * LENGTH_SIGMA**2))


def _counts(caption: Sequence[int]) -> list[Counter]:
    return [
        Counter(tuple(caption[start : start + length]) for start in range(len(caption) - length + 1))
        for length in range(1, MAX_LENGTH + 1)
    ]


__all__ = ["CiderDReward"]
