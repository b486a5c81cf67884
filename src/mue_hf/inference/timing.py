"""The clock, and runs that take turns so that a drifting machine is fair to all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def timed(model: torch.nn.Module, call: Callable[[], Any]) -> tuple[Any, float]:
    """Result of a call that runs the model, and its seconds."""
    device = next(model.parameters()).device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    output = call()
    synchronize()
    return output, time.perf_counter() - start


def in_turns(
    model: torch.nn.Module, ways: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs each way once to warm up and then `repeats` times, in turns; results and median seconds by way."""
    results = {way: call() for way, call in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            seconds[way].append(timed(model, call)[1])
    return results, {way: median(times) for way, times in seconds.items()}


__all__ = ["in_turns", "timed"]
