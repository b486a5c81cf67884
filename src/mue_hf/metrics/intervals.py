"""Intervals of scores by resampling images: outputs about one image are not independent, images are."""

from collections.abc import Hashable, Sequence
from math import ceil, floor, log10
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def resampling_weights(units: int, resamples: int, seed: int) -> NDArray:
    """How often each of `units` images occurs in each draw with replacement, as floats [resamples, units]; equal for
    equal arguments, so that two systems are compared on the same draws."""
    counts = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
    return counts.astype(np.float64)


def percentile_interval(resampled: ArrayLike, confidence: float) -> tuple[float, float]:
    """The middle `confidence` of the values [resamples]."""
    low, high = np.quantile(np.asarray(resampled), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def flat_intervals(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores for a log, which holds numbers alone: the ends of an interval as "<score>_low" and "<score>_high"."""
    flat = {name: value for name, value in scores.items() if name != "intervals"}
    for name, (low, high) in scores.get("intervals", {}).items():
        flat |= {f"{name}_low": low, f"{name}_high": high}
    return flat


def group_sums(values: NDArray, groups: Sequence[Hashable] | None) -> NDArray:
    """Sums of `values` [outputs, ...] over the outputs of each image: [images, ...], in order of appearance."""
    if groups is None:
        return values
    if len(groups) != len(values):
        raise ValueError(
            f"`image_ids` must name the image of each output, got {len(groups)} for {len(values)} outputs; pass one "
            "per output."
        )
    places: dict[Hashable, int] = {}
    rows = [places.setdefault(group, len(places)) for group in groups]
    sums = np.zeros((len(places), *values.shape[1:]))
    np.add.at(sums, rows, values)
    return sums


def bootstrap_interval(
    values: ArrayLike,
    image_ids: Sequence[Hashable] | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Both ends of an interval of the mean of `values`, by the percentile bootstrap over images.

    For the difference of two systems on the same images pass the differences of their scores.

    Args:
        values (array [outputs]): a score per output, such as the CIDEr of a caption or whether an answer is right.
        image_ids (sequence [outputs], *optional*): the image of each output. Without it each has its own.
        resamples, seed (`int`): how many draws of as many images as there are, and their seed.
        confidence (`float`, defaults to 0.95): share of the draws inside.

    Raises:
        ValueError: if an argument is out of its range.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"`values` must be one number per output, got shape {values.shape}; pass at least one.")
    check_resampling(resamples, confidence)
    if not resamples:
        raise ValueError("`resamples` must be at least 1, got 0; 1000 is usual.")
    sums = group_sums(np.stack([values, np.ones_like(values)], axis=1), image_ids)
    totals = resampling_weights(len(sums), resamples, seed) @ sums
    return percentile_interval(totals[:, 0] / totals[:, 1], confidence)


def check_resampling(resamples: Any, confidence: float) -> None:
    """Refuses a negative number of draws and a confidence outside (0, 1)."""
    if resamples < 0:
        raise ValueError(f"`resamples` must be 0 (no intervals) or more, got {resamples}; 1000 is usual.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must be above 0 and below 1, got {confidence}; 0.95 is usual.")


def rounded_up(value: float) -> float:
    """A bound in (0, 1] to three digits, never smaller than it is."""
    digits = 2 - floor(log10(value))
    # a product such as 0.07 * 10,000 is a little too large
    return ceil(round(value * 10**digits, 6)) / 10**digits


__all__ = ["bootstrap_interval", "percentile_interval", "resampling_weights", "rounded_up"]
