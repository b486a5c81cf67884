"""Whether it pays to take rows that left out of a batch, by what layer calls take on a device."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

COSTS = ("fixed", "per_row", "shrink")

# Without measured costs: on a CPU every row takes time. Elsewhere small batches take no less time than a row alone, so
# that many row-tokens in the layers to come must be saved to pay for a few small launches.
WORTH_A_SHRINK = 512


def device_key(device: torch.device) -> str:
    """The name under which costs of a device are kept: a GPU's model, a CPU's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def shrinking_pays(
    costs: Mapping[str, Mapping[str, float]] | None, device: torch.device, rows: int, positions: int, layers: int
) -> bool:
    """Whether to take `rows` rows of `positions` tokens out of a batch that has `layers` layers before it.

    Args:
        costs (`dict`, *optional*): by device key, seconds of a stack: a layer call takes "fixed" + rows x "per_row",
            taking rows out takes "shrink".
    """
    measured = (costs or {}).get(device_key(device)) if costs else None
    if measured is not None:
        return rows * measured["per_row"] * layers > measured["shrink"]
    return device.type == "cpu" or rows * positions * layers >= WORTH_A_SHRINK


def check_costs(costs: Any) -> None:
    """Raises a ValueError unless costs are {device: {stream: {"fixed", "per_row", "shrink": seconds}}}."""
    devices = costs.values() if isinstance(costs, Mapping) else [None]
    for streams in devices:
        for entry in streams.values() if isinstance(streams, Mapping) else [None]:
            if (
                not isinstance(entry, Mapping)
                or set(entry) != set(COSTS)
                or not all(isinstance(x, int | float) and abs(x) <= sys.float_info.max for x in entry.values())
            ):
                raise ValueError(
                    "`exit_costs` must hold finite seconds, as {device: {stream: {'fixed': ..., 'per_row': ..., "
                    f"'shrink': ...}}}}}}, got {costs!r}; take what `mue_hf.benchmarking.costs.measure_costs` returns."
                )


__all__ = ["check_costs", "device_key", "shrinking_pays"]
