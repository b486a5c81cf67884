"""Candidate thresholds of similarity, taken from recorded cosines: from careful to fast, and far enough apart."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .signals import Signals, replay

# Every cosine is above it.
ALWAYS = -1.01
# How finely thresholds are tried before a few of them are kept.
GRID = 64


def candidate_thresholds(
    cosines: Tensor, count: int, *, agreeing: Tensor | None = None, per_layer: bool = False, min_layers: int = 1
) -> list[float | list[float | None]]:
    """
    Thresholds of one stream from careful to fast, whose mean depths are spread evenly; no two give the same depths.

    One for all layers is a quantile of all cosines. With one per layer, an encoder stream lets the same share of the
    remaining rows exit after every layer; the decoder lets as many tokens exit as have the same share of disagreement
    with the last layer, and none where even the surest disagree more often.

    Args:
        cosines (`Tensor` [rows, layers]): recorded ones; rows without the stream are ignored.
        count (`int`): how many are wanted at most.
        agreeing (`BoolTensor` [rows, layers]): whether a layer's output is the last one's, for a decoder.
        per_layer (`bool`): a list of one entry per layer in place of each number.
        min_layers (`int`): no row exits before this many layers.
    """
    present = ~cosines.isnan().all(dim=1)
    # Without noise of the last bits, which other batches would change.
    cosines = cosines[present].double().round(decimals=6)
    layers = cosines.shape[1]
    open_layers = range(min_layers - 1, layers - 1)
    if not len(cosines) or not len(open_layers):
        return []
    shares = [step / GRID for step in range(1, GRID + 1)]
    values = cosines[:, open_layers.start : open_layers.stop].flatten().sort(descending=True).values
    tried: list[Any] = [_threshold_below(values, round(share * len(values))) for share in shares]
    # Rows that are all the same, such as a constant prompt, leave no choice but one threshold for all layers.
    if per_layer and (cosines == cosines[0]).all():
        tried = [[threshold] * layers for threshold in tried]
    elif per_layer:
        if agreeing is None:
            exiting = [lambda order, _, s=s: round(s * len(order)) for s in shares]
        else:
            right = agreeing[present]
            # Small shares matter most: squares are denser there.
            exiting = [lambda order, layer, s=s: _purest(right[order, layer], s * s) for s in [0.0, *shares]]
        tried = [_layer_thresholds(cosines, open_layers, count_exits) for count_exits in exiting]
    return _spread_by_depth(cosines, tried, count, min_layers)


def depth_thresholds(depth: int, layers: int) -> list[float | None]:
    """Thresholds of similarity, one per layer, by which all rows exit after `depth` of them."""
    return [ALWAYS if layer == depth else None for layer in range(1, layers + 1)]


def _spread_by_depth(cosines: Tensor, tried: Sequence[Any], count: int, min_layers: int) -> list[Any]:
    """At most `count` of the thresholds, whose mean depths are spread evenly between full depth and the fastest."""
    layers = cosines.shape[1]
    reached: dict[tuple[int, ...], tuple[float, Any]] = {}
    for thresholds in tried:
        every = thresholds if isinstance(thresholds, list) else [thresholds] * layers
        depths = replay(cosines, every, min_layers)
        # Where nothing exits, there is nothing to try.
        if (depths < layers).any():
            reached.setdefault(tuple(depths.tolist()), (depths.double().mean().item(), thresholds))
    found = sorted(reached.values(), key=lambda one: -one[0])
    means = [mean for mean, _ in found]
    return [found[i][1] for i in nearest(means, np.linspace(layers, min(means, default=1), count + 1)[1:])]


def nearest(values: Sequence[float], targets: Iterable[float]) -> list[int]:
    """The places of the values that are nearest to the targets, each once, in their order."""
    if not values:
        return []
    return sorted({int(np.argmin(np.abs(np.subtract(values, target)))) for target in targets})


def _threshold_below(values: Tensor, count: int) -> float | None:
    """A threshold that `count` of `values` (descending), and those that equal the last of them, are above, halfway to
    the next; None for none of them, `ALWAYS` for all."""
    if count == 0:
        return None
    last = values[count - 1].item()
    count = int((values >= last).sum())
    return ALWAYS if count == len(values) else (last + values[count].item()) / 2


def _layer_thresholds(
    cosines: Tensor, open_layers: range, exiting: Callable[[Tensor, int], int]
) -> list[float | None]:
    """Layer by layer a threshold that lets the `exiting` surest of the remaining rows exit."""
    thresholds: list[float | None] = [None] * cosines.shape[1]
    running = torch.arange(len(cosines))
    for layer in open_layers:
        order = running[cosines[running, layer].argsort(descending=True)]
        if not len(order):
            # No row came this far; those that do in other data have waited long enough.
            thresholds[layer] = thresholds[layer - 1]
            continue
        thresholds[layer] = limit = _threshold_below(cosines[order, layer], exiting(order, layer))
        running = order if limit is None else order[cosines[order, layer] <= limit]
    return thresholds


def _purest(agreeing: Tensor, share: float) -> int:
    """The longest beginning of `agreeing` in which at most `share` is False."""
    wrong = (~agreeing).double().cumsum(0) / torch.arange(1, len(agreeing) + 1)
    within = (wrong <= share).nonzero()
    return int(within[-1]) + 1 if len(within) else 0


def stream_thresholds(signals: Signals, count: int) -> dict[str, Any]:
    """[`candidate_thresholds`] of each stream, and under "per layer" the same with one for each layer, to six digits
    so that noise in the last bits does not make other points of them."""

    def rounded(threshold: Any) -> Any:
        if isinstance(threshold, list):
            return [rounded(one) for one in threshold]
        return None if threshold is None else round(threshold, 6)

    found: dict[str, Any] = {"per layer": {}}
    for per_layer, place in ((False, found), (True, found["per layer"])):
        for stream, cosines in {**signals.encoder, "decoder": signals.decoder}.items():
            agreeing = signals.agreeing if stream == "decoder" else None
            place[stream] = rounded(candidate_thresholds(cosines, count, agreeing=agreeing, per_layer=per_layer))
    return found


__all__ = ["candidate_thresholds", "depth_thresholds", "nearest", "stream_thresholds"]
