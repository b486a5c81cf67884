"""Which combinations of exits are worth testing: the candidates of each stream, and their Pareto front."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.thresholds import nearest
from .goal import Goal


@dataclass(frozen=True)
class Candidate:
    """Exit options of one stream or several, with the cost (1 is full depth) and the [`expected_risk`] that the search
    split lets expect while other streams run in full."""

    options: dict[str, Any]
    cost: float
    risk: float


def expected_risk(losses: NDArray) -> float:
    """The mean of `losses` [images], drawn a little to one half: of settings without a loss, each exit more counts."""
    return (float(np.sum(losses)) + 0.5) / (len(losses) + 1)


def pareto_path(streams: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Candidates from safest to fastest: the [`front`] of all combinations of an exit per stream or none, if savings
    and risks of the streams add up."""
    combined = []
    for exits in product(*([Candidate({}, 1.0, 0.0), *stream] for stream in streams)):
        options = {name: value for one in exits for name, value in one.options.items()}
        cost = 1.0 - sum(1.0 - one.cost for one in exits)
        combined.append(Candidate(options, cost, min(1.0, sum(one.risk for one in exits))))
    return front(combined)


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that save something and that no other one beats in both risk and cost, from safest to fastest."""
    path: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.risk, one.cost)):
        # Costs that differ by rounding alone are the same.
        if candidate.cost < (path[-1].cost if path else 1.0) - 1e-9:
            path.append(candidate)
    return path


def thinned(path: Sequence[Candidate], most_risk: float, count: int) -> list[Candidate]:
    """At most `count` of the candidates with an expected risk within `most_risk`, evenly spaced in cost, the first and
    the last among them; the safest one alone if all are above it."""
    path = [candidate for candidate in path if candidate.risk <= most_risk] or list(path[:1])
    if len(path) <= count:
        return path
    targets = np.linspace(path[0].cost, path[-1].cost, count)
    return [path[i] for i in nearest([candidate.cost for candidate in path], targets)]


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


__all__ = ["Candidate", "expected_risk", "front", "pareto_path", "thinned", "within"]
