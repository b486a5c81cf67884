"""Accuracy of entailment answers, by class and with intervals over images."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction

from .generated import check_options, generated_ids, without_masks
from .intervals import check_resampling, flat_intervals, group_sums, percentile_interval, resampling_weights


def entailment_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    image_ids: Sequence[Hashable] | None = None,
    labels: Sequence[str] | None = None,
    per_image: bool = False,
    resamples: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy, and recall (the accuracy within a class), precision and F1 of each class.

    Args:
        predictions (sequence [pairs] of `str`): the answers. One that is no label is wrong and counts for no class.
        references (sequence [pairs] of `str`): the true labels.
        image_ids (sequence [pairs], *optional*): the image of each pair, for intervals: pairs of one image are drawn
            together. Without it each pair has its own.
        labels (sequence of `str`, *optional*): the classes. Without it those that occur in `references`.
        per_image (`bool`, defaults to False): also return each image's share of right answers.
        resamples, seed (`int`, default to 0): draws of images for bootstrap intervals (0 for none), and their seed.
        confidence (`float`, defaults to 0.95): share of the draws inside an interval.

    Returns:
        `dict`: "accuracy" and, for each label, "recall_<label>", "precision_<label>", "f1_<label>" to `float` (0 where
        there is nothing to count) and "support_<label>", its pairs, to `int`; with `per_image` "per_image", a `dict`
        of "accuracy" to a list [images] in order of appearance; with `resamples` "intervals", a `dict` of the names of
        the `float`s to (low, high).

    Raises:
        ValueError: for options out of range, lists of different lengths, and references that are no label.
    """
    if not len(predictions) or len(predictions) != len(references):
        raise ValueError(
            f"`predictions` and `references` must have one entry per pair, got {len(predictions)} and "
            f"{len(references)}; pass as many answers as labels."
        )
    check_resampling(resamples, confidence)
    labels = sorted(set(references)) if labels is None else list(labels)
    for i, reference in enumerate(references):
        if reference not in labels:
            raise ValueError(f"`references[{i}]` must be one of {labels}, got {reference!r}; fix or drop the pair.")

    predicted, true = (
        np.array([[text == label for label in labels] for text in texts]) for texts in (predictions, references)
    )
    counts = np.stack([predicted & true, predicted, true], axis=1).astype(np.float64)
    by_image = group_sums(counts, image_ids)
    result: dict[str, Any] = {name: float(value) for name, value in _ratios(by_image.sum(0), labels).items()}
    result |= {f"support_{label}": int(n) for label, n in zip(labels, counts[:, 2].sum(0), strict=True)}
    if per_image:
        result["per_image"] = {"accuracy": _ratios(by_image, labels)["accuracy"].tolist()}
    if resamples:
        weights = resampling_weights(len(by_image), resamples, seed)
        resampled = _ratios(np.tensordot(weights, by_image, 1), labels)
        result["intervals"] = {name: percentile_interval(values, confidence) for name, values in resampled.items()}
    return result


def _ratios(counts: NDArray, labels: Sequence[str]) -> dict[str, NDArray]:
    """Scores [...] from counts [..., right / predicted / true, classes]."""
    right, predicted, true = np.moveaxis(counts, -2, 0)
    scores = {"accuracy": _share(right.sum(-1), true.sum(-1))}
    for i, label in enumerate(labels):
        scores[f"recall_{label}"] = _share(right[..., i], true[..., i])
        scores[f"precision_{label}"] = _share(right[..., i], predicted[..., i])
        scores[f"f1_{label}"] = _share(2 * right[..., i], predicted[..., i] + true[..., i])
    return scores


def _share(part: NDArray, whole: NDArray) -> NDArray:
    return part / np.maximum(whole, 1)


def entailment_metrics(processor: Any, **options: Any) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a trainer with `predict_with_generate=True`.

    Args:
        processor (`MuEProcessor`): turns ids into texts, and its `entailment_answers` texts into classes.
        options: `image_ids` (of the evaluation set in its order), `resamples`, `confidence` and `seed` of
            [`entailment_scores`]; TypeError for others.

    Returns:
        `Callable`: from `EvalPrediction` to scores, with `resamples` also the ends of their intervals, "<score>_low"
        and "<score>_high". Its `predictions` [pairs, tokens] are generated ids, which may begin with the decoder
        prompt; its `label_ids` [pairs, tokens] hold the answers, -100 elsewhere.
    """
    check_options(
        "entailment_metrics", entailment_scores, options, {"predictions", "references", "per_image", "labels"}
    )
    classes = {answer: label for label, answer in processor.entailment_answers.items()}

    def named(ids: NDArray) -> list[str]:
        texts = processor.post_process_captions(ids)
        # The answer is the last word: the prompt of the decoder comes first.
        words = [text.split()[-1] if text.split() else "" for text in texts]
        return [classes.get(word, word) for word in words]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        answers = named(generated_ids(prediction, processor))
        true = named(without_masks(prediction.label_ids, processor))
        return flat_intervals(entailment_scores(answers, true, labels=list(classes.values()), **options))

    return compute_metrics


__all__ = ["entailment_metrics", "entailment_scores"]
