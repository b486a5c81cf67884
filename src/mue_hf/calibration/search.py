"""Which combinations of exits are worth testing: each stream's levels, and the path that nothing beats."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Level:
    """
    One way for one stream to leave.

    Args:
        options (`dict`): its exit options.
        saving (`float`): share of the full-depth cost that it saves.
        risk (`float`): [`expected_risk`] on part A while the other streams run in full.
    """

    options: dict[str, Any]
    saving: float
    risk: float


@dataclass(frozen=True)
class Candidate:
    """Exit options of all streams, with the cost (1 is full depth) and the risk that part A lets expect."""

    options: dict[str, Any]
    cost: float
    risk: float


def expected_risk(losses: NDArray) -> float:
    """The mean of `losses` [images], drawn a little to one half: of settings without a loss, each exit more counts."""
    return (float(np.sum(losses)) + 0.5) / (len(losses) + 1)


def pareto_path(streams: Sequence[Sequence[Level]]) -> list[Candidate]:
    """
    Candidates from safest to fastest: the [`front`] of all combinations of a level per stream or none, if savings and
    changes of the streams add up.
    """
    combined = []
    for levels in product(*([None, *stream] for stream in streams)):
        chosen = [level for level in levels if level is not None]
        if chosen:
            options = {name: value for level in chosen for name, value in level.options.items()}
            cost = 1.0 - sum(level.saving for level in chosen)
            combined.append(Candidate(options, cost, min(1.0, sum(level.risk for level in chosen))))
    return front(combined)


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that save something and that no other one beats in both risk and cost, from safest to fastest."""
    path: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.risk, one.cost)):
        if candidate.cost < (path[-1].cost if path else 1.0):
            path.append(candidate)
    return path


def thinned(path: Sequence[Candidate], most_risk: float, count: int) -> list[Candidate]:
    """At most `count` of the candidates with an expected risk within `most_risk`, evenly spaced in cost, the first and
    the last among them; the safest one alone if all are above it."""
    path = [candidate for candidate in path if candidate.risk <= most_risk] or list(path[:1])
    if len(path) <= count:
        return path
    targets = np.linspace(path[0].cost, path[-1].cost, count)

    def nearest(target: float) -> int:
        return min(range(len(path)), key=lambda i: abs(path[i].cost - target))

    kept = {nearest(target) for target in targets}
    return [path[i] for i in sorted(kept)]


def within(path: Sequence[Candidate], objective: str, compute: float) -> list[Candidate]:
    """The candidates of a path whose cost is within `compute`."""
    within = [candidate for candidate in path if candidate.cost <= compute]
    if not within:
        reached = min(candidate.cost for candidate in path)
        raise ValueError(
            f"`compute` must be reachable, got {compute}, but the candidates reach {reached:.3g} of the {objective} "
            "of full depth; allow more, raise `levels`, use `per_layer`, or try other `criteria`."
        )
    return within


__all__ = ["Candidate", "Level", "expected_risk", "front", "pareto_path", "thinned", "within"]
