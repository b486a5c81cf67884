"""Which combinations of exits are worth testing: the candidates of each stream, and their Pareto front."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .goal import Goal


@dataclass(frozen=True)
class StreamExit:
    """
    One way for one stream to exit.

    Args:
        options (`dict`): its exit options.
        saving (`float`): share of the full-depth cost that it saves.
        risk (`float`): [`expected_risk`] on the search split while the other streams run in full.
    """

    options: dict[str, Any]
    saving: float
    risk: float


@dataclass(frozen=True)
class Candidate:
    """Exit options of all streams, with the cost (1 is full depth) and the risk that the search split lets expect."""

    options: dict[str, Any]
    cost: float
    risk: float


def expected_risk(losses: NDArray) -> float:
    """The mean of `losses` [images], drawn a little to one half: of settings without a loss, each exit more counts."""
    return (float(np.sum(losses)) + 0.5) / (len(losses) + 1)


def pareto_path(streams: Sequence[Sequence[StreamExit]]) -> list[Candidate]:
    """
    Candidates from safest to fastest: the [`front`] of all combinations of an exit per stream or none, if savings and
    risks of the streams add up.
    """
    combined = []
    for exits in product(*([None, *stream] for stream in streams)):
        chosen = [one for one in exits if one is not None]
        if chosen:
            options = {name: value for one in chosen for name, value in one.options.items()}
            cost = 1.0 - sum(one.saving for one in chosen)
            combined.append(Candidate(options, cost, min(1.0, sum(one.risk for one in chosen))))
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
    kept = {min(range(len(path)), key=lambda i: abs(path[i].cost - target)) for target in targets}
    return [path[i] for i in sorted(kept)]


def within(path: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """The candidates of a path whose cost is within `compute`, if there is such a goal."""
    affordable = [candidate for candidate in path if goal.compute is None or candidate.cost <= goal.compute]
    if not affordable:
        reached = min(candidate.cost for candidate in path)
        raise ValueError(
            f"`compute` must be reachable, got {goal.compute}, but the candidates reach {reached:.3g} of the "
            f"{goal.objective} of full depth; allow more, raise `num_thresholds`, use `per_layer`, or try other "
            "`criteria`."
        )
    return affordable


__all__ = ["Candidate", "StreamExit", "expected_risk", "front", "pareto_path", "thinned", "within"]
