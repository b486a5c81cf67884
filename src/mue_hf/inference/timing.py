"""One clock, and one loop in which runs take turns, so that a machine that drifts is fair to all of them."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# Rounds that are run whatever time they take.
FEWEST_ROUNDS = 3


def synchronize(device: torch.device) -> None:
    """Waits for the device's work; the CPU has none waiting."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Result of a call, and its seconds with the work that it left to the device."""
    synchronize(device)
    start = time.perf_counter()
    output = call()
    synchronize(device)
    return output, time.perf_counter() - start


def in_turns(
    runs: Mapping[str, Callable[[], T]], rounds: int, *, max_seconds: float | None = None
) -> dict[str, list[T]]:
    """What each run returned by round: every run once in each, beginning with another one; once each has begun, their
    order turns round. No further round begins after `max_seconds`, but for the first three."""
    measured: dict[str, list[T]] = {name: [] for name in runs}
    names, start = list(runs), time.perf_counter()
    for number in range(rounds):
        if max_seconds is not None and number >= FEWEST_ROUNDS and time.perf_counter() - start > max_seconds:
            break
        cycle, first = divmod(number, len(names))
        turn = [*names[first:], *names[:first]]
        for name in reversed(turn) if cycle % 2 else turn:
            measured[name].append(runs[name]())
    return measured


def compare(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs each call once to warm up and then `repeats` times in turns: results and median seconds by name."""
    results = {name: call() for name, call in calls.items()}
    runs = in_turns({name: partial(timed, call, device) for name, call in calls.items()}, repeats)
    return results, {name: median(seconds for _, seconds in rounds) for name, rounds in runs.items()}


__all__ = ["compare", "in_turns", "synchronize", "timed"]
