"""The promise: candidates tested in order on images that the search never saw, until one fails."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bounds import (
    expected_loss_bound,
    fixed_sequence,
    risk_pvalue,
    risk_upper_bound,
    rounded_up,
    smallest_budget,
)
from .goal import Goal
from .search import Candidate


@dataclass(frozen=True)
class Outcome:
    """What real runs of one candidate gave: `losses` [images], and FLOPs, seconds and layer calls as shares of full
    depth."""

    losses: NDArray
    flops: float
    seconds: float
    calls: float


@dataclass(frozen=True)
class Tested:
    """A candidate on the held-out split: exit options, mean loss, the p-value of the hypothesis that the true loss is
    above the budget (None without one, and for an expectation), the upper bound of the true loss, had only this
    candidate been tested, or of its expectation, and FLOPs, seconds and layer calls as shares of full depth."""

    options: dict[str, Any]
    loss: float
    pvalue: float | None
    bound: float
    flops: float
    seconds: float
    calls: float


def cost(of: Outcome | Tested, objective: str) -> float:
    """What is to be saved, as a share of full depth."""
    return {"flops": of.flops, "time": of.seconds, "calls": of.calls}[objective]


def certify(
    path: Sequence[Candidate], measure: Callable[[dict[str, Any]], Outcome], budget: float, delta: float, method: str
) -> tuple[list[Tested], int]:
    """Runs candidates on the held-out split, which did not choose them, until one fails to keep `budget`: what was
    run, and how many of them, from the first, are certified. `measure` takes exit options; `delta` is the probability
    that any certificate is false."""
    tested: list[Tested] = []

    def pvalues() -> Iterator[float]:
        for candidate in path:
            outcome = measure(candidate.options)
            pvalue = risk_pvalue(outcome.losses, budget, delta, method)
            tested.append(summarize(candidate, outcome, pvalue, delta, method))
            yield pvalue

    return tested, fixed_sequence(pvalues(), delta)


def control(
    path: Sequence[Candidate], measure: Callable[[dict[str, Any]], Outcome], budget: float
) -> tuple[list[Tested], int]:
    """Like [`certify`], for the expected loss over draws of the held-out split in place of confidence ("Conformal Risk
    Control", see [`expected_loss_bound`]): the candidates that were run, and how many of them keep `budget`.

    Losses there must not fall from candidate to candidate. An image's loss counts as the largest one up to the
    candidate, which is never below its own; full depth, without a loss, stands before the first.
    """
    tested: list[Tested] = []
    largest: Any = 0.0
    for kept, candidate in enumerate(path):
        outcome = measure(candidate.options)
        largest = np.maximum(largest, outcome.losses)
        bound, mean = expected_loss_bound(largest), float(np.mean(outcome.losses))
        tested.append(Tested(candidate.options, mean, None, bound, outcome.flops, outcome.seconds, outcome.calls))
        if bound > budget:
            return tested, kept
    return tested, len(path)


def summarize(candidate: Candidate, outcome: Outcome, pvalue: float | None, delta: float, method: str) -> Tested:
    """What the held-out split says of a candidate."""
    bound = risk_upper_bound(outcome.losses, delta, method)
    mean = float(np.mean(outcome.losses))
    return Tested(candidate.options, mean, pvalue, bound, outcome.flops, outcome.seconds, outcome.calls)


def split_images(image_ids: Sequence[str], share: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """The rows of each image in the search split (a `share` of all) and in the held-out split; both shuffled."""
    images: dict[str, list[int]] = {}
    for row, image in enumerate(image_ids):
        images.setdefault(image, []).append(row)
    rows = list(images.values())
    random.Random(seed).shuffle(rows)
    cut = min(max(round(share * len(rows)), 1), len(rows) - 1)
    return rows[:cut], rows[cut:]


def check_size(images: int, goal: Goal) -> None:
    """Raises a ValueError if so many held-out images cannot keep the goal's budget even without a loss."""

    def smallest(count: int) -> float:
        if goal.guarantee == "expectation":
            return expected_loss_bound(np.zeros(count))
        return smallest_budget(count, goal.delta, goal.method)

    if goal.budget is None or smallest(images) <= goal.budget:
        return
    needed = images
    while smallest(needed) > goal.budget:
        needed += max(1, needed // 50)
    at = "in expectation" if goal.guarantee == "expectation" else f"at delta {goal.delta}"
    raise ValueError(
        f"`budget` must be at least {rounded_up(smallest(images))} for the {images} images of the held-out split "
        f"{at}, got {goal.budget}; allow that much, or take more images (the test needs about {needed})."
    )


__all__ = ["Outcome", "Tested", "certify", "check_size", "control", "cost", "split_images", "summarize"]
