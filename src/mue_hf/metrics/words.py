"""The baseline of words alone: what statements give away to whoever reads them and does not look at the image."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag

WORD = re.compile(r"[\w'-]+")


def _terms(text: str) -> list[str]:
    """The words of a text and its pairs of neighbours, with both ends, each once."""
    words = WORD.findall(text.lower())
    pairs = zip(["^", *words], [*words, "$"], strict=True)
    return list(dict.fromkeys([*words, *map(" ".join, pairs)]))


def words_baseline(
    train_texts: Sequence[str],
    train_labels: Sequence[str],
    texts: Sequence[str],
    *,
    penalty: float = 1.0,
    fewest: int = 2,
) -> list[str]:
    """Labels of texts by a bag of words: multinomial logistic regression on which words and pairs of neighbours occur.

    For how far a model is above it, see [`bootstrap_interval`] of the differences of right answers.

    Args:
        train_texts, train_labels (sequences [statements] of `str`): what it learns from, such as hypotheses.
        texts (sequence [texts] of `str`): what it gives labels to.
        penalty (`float`, *optional*, defaults to 1.0): of the squared weights, as 1 / C of scikit-learn.
        fewest (`int`, *optional*, defaults to 2): texts in which a word or pair must occur to be looked at.

    Returns:
        `list` [texts] of `str`: a label of `train_labels` for each.

    Raises:
        ValueError: for lists of different lengths, fewer than two labels, and options out of range.
    """
    if len(train_texts) != len(train_labels):
        raise ValueError(
            f"`train_texts` and `train_labels` must have one entry per statement, got {len(train_texts)} and "
            f"{len(train_labels)}; pass as many labels as texts."
        )
    if penalty <= 0 or fewest < 1:
        raise ValueError(
            f"`penalty` must be above 0 and `fewest` at least 1, got {penalty} and {fewest}; leave them out."
        )
    labels = sorted(set(train_labels))
    if len(labels) < 2:
        raise ValueError(f"`train_labels` must hold at least two labels, got {labels}; pass more statements.")
    seen = [_terms(text) for text in train_texts]
    counts = Counter(term for terms in seen for term in terms)
    # The number 0 stands for nothing: no text is then empty.
    numbers = {term: 1 + index for index, term in enumerate(term for term, n in counts.items() if n >= fewest)}
    weights = torch.zeros(1 + len(numbers), len(labels), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(labels), dtype=torch.float64, requires_grad=True)
    inputs, targets = _bags(seen, numbers), torch.tensor([labels.index(label) for label in train_labels])
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(_logits(inputs, weights, bias), targets, reduction="sum")
        loss = (loss + penalty / 2 * weights.square().sum()) / len(targets)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    if not len(texts):
        return []
    with torch.no_grad():
        best = _logits(_bags([_terms(text) for text in texts], numbers), weights, bias).argmax(-1)
    return [labels[index] for index in best.tolist()]


def _bags(texts: Sequence[Sequence[str]], numbers: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The numbers of all terms that are known, one text after another, and where each text starts."""
    bags = [[0, *(numbers[term] for term in terms if term in numbers)] for terms in texts]
    starts = torch.tensor([0, *map(len, bags)][:-1]).cumsum(0)
    return torch.tensor([number for bag in bags for number in bag]), starts


def _logits(bags: tuple[Tensor, Tensor], weights: Tensor, bias: Tensor) -> Tensor:
    # The bias holds what term 0 would: its row is empty.
    return embedding_bag(bags[0], weights, bags[1], mode="sum", padding_idx=0) + bias


__all__ = ["words_baseline"]
