"""One cell of the benchmark, a batch size and a number of beams: all arms in turns, and what each of them ran."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from ..metrics.intervals import percentile_interval
from .probes import component_seconds, count_flops, decode_peak, encoder_clock, synchronize
from .variants import Arm

# Rounds that are run whatever time they take.
FEWEST_ROUNDS = 3
# Passes for the components of one arm end after this many seconds.
COMPONENT_SECONDS = 1.0


def measure_cell(
    arms: Sequence[Arm],
    decoding: Mapping[str, Any],
    *,
    repeats: int,
    max_seconds: float | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """
    Times the arms of a cell.

    Each arm is run once to warm up, whatever it prepares for later runs, and once to count operations, memory and
    layers. Then the arms take turns, in another order in each round. Last come the passes with a clock at every
    component.

    Args:
        arms: the arms; those named "lossless" and "stock" are what the others are compared with.
        decoding (`dict`): options of `generate` that all share, `return_dict_in_generate` and `max_new_tokens` among
            them.
        repeats (`int`): rounds.
        max_seconds (`float`, *optional*): no further round begins after this time, but for the first three.
        advance (`Callable`): called after each run of an arm, at most `repeats` + 3 times for each.

    Returns:
        `dict`: "rounds", "load_average" (before and after the rounds) and "arms": name -> figures.
    """
    figures: dict[str, dict[str, Any]] = {}
    sequences: dict[str, Tensor] = {}
    for arm in arms:
        arm.run(decoding)
        advance()
        figures[arm.name], sequences[arm.name] = examine(arm, decoding)
        advance()
    load, started = os.getloadavg()[0], time.perf_counter()
    runs: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
    for number in range(repeats):
        if number >= FEWEST_ROUNDS and max_seconds and time.perf_counter() - started > max_seconds:
            break
        first = number % len(arms)
        turn = [*arms[first:], *arms[:first]]
        for arm in turn if number % 2 else reversed(turn):
            runs[arm.name].append(timed(arm, decoding))
            advance()
    after = os.getloadavg()[0]
    for arm in arms:
        figures[arm.name] |= summary(runs[arm.name])
        figures[arm.name]["components"] = components(arm, decoding)
        advance()
    for name, one in figures.items():
        _compare(one, figures, sequences, name)
    return {"rounds": len(runs[arms[0].name]), "load_average": [load, after], "arms": figures}


def examine(arm: Arm, decoding: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """
    One run of an arm.

    Returns:
        `tuple[dict, Tensor]`: "flops" of the whole run, "decode_peak_bytes", "layers" (mean layers of a sample or
        token for each stream, "of" what there is, and their "ratio"; None for a peer); and the new tokens.
    """
    device = arm.model.device
    encoder = encoder_of(arm)
    (output, flops), peak = decode_peak(lambda: count_flops(lambda: arm.run(decoding)), encoder, device)
    layers = None
    if arm.model.config.model_type == "mue":
        layers = _layers(arm, output, decoding)
    new_tokens = output.sequences[:, -decoding["max_new_tokens"] :]
    return {"flops": flops, "decode_peak_bytes": peak, "layers": layers}, new_tokens


def encoder_of(arm: Arm) -> Any:
    """The module whose end is the beginning of the decode."""
    # BLIP's vision model feeds a decoder, there is no encoder-decoder around them.
    return arm.model.vision_model if arm.model.config.model_type == "blip" else arm.model.get_encoder()


def _layers(arm: Arm, output: Any, decoding: Mapping[str, Any]) -> dict[str, float]:
    config = arm.model.config
    of = {"image": config.encoder_layers, "text": config.encoder_layers, "decoder": config.decoder_layers}
    mean = {name: float(layers) for name, layers in of.items()}
    if "executed_layers" in output:
        tokens = arm.inputs["input_ids"].shape[0] * decoding["num_beams"] * decoding["max_new_tokens"]
        mean = {name: output[f"{name}_exit_layers"].double().mean().item() for name in ("image", "text")}
        # Of all beams, not only of those that came out.
        mean["decoder"] = output.executed_layers["decoder"] / tokens
    return {**mean, "of": of, "ratio": sum(mean.values()) / sum(of.values())}


def timed(arm: Arm, decoding: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of one run of an arm and, of these, of its encoder with the trunk."""
    device = arm.model.device
    with encoder_clock(encoder_of(arm), device) as encoder:
        synchronize(device)
        start = time.perf_counter()
        arm.run(decoding)
        synchronize(device)
        return time.perf_counter() - start, sum(encoder)


def summary(runs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The "seconds" of runs (whole, encoder), their "p50", "p95" and "quartiles", and the median "encoder_seconds"."""
    whole, encoder = zip(*runs, strict=True)
    low, middle, high, most = np.quantile(whole, [0.25, 0.5, 0.75, 0.95]).tolist()
    return {
        "seconds": list(whole),
        "p50": middle,
        "p95": most,
        "quartiles": [low, high],
        "encoder_seconds": median(encoder),
    }


def components(arm: Arm, decoding: Mapping[str, Any]) -> dict[str, float] | None:
    """Median seconds by component (see [`component_seconds`]); None for a peer."""
    if arm.model.config.model_type != "mue":
        return None
    passes: list[dict[str, float]] = []
    while len(passes) < 3 and sum(sum(one.values()) for one in passes) < COMPONENT_SECONDS:
        passes.append(component_seconds(arm.model, lambda: arm.run(decoding)))
    return {name: median(one[name] for one in passes) for name in passes[0]}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """The ratio of the medians of two arms that took turns, with the 95 % interval over rounds drawn anew."""
    pairs = np.array([above, below])
    rounds = np.random.default_rng(0).integers(pairs.shape[1], size=(1000, pairs.shape[1]))
    one, other = np.median(pairs[:, rounds], axis=-1)
    value = float(np.median(above) / np.median(below))
    return {"value": value, "interval": percentile_interval(one / other, 0.95)}


def _compare(
    one: dict[str, Any], figures: Mapping[str, dict[str, Any]], sequences: Mapping[str, Tensor], name: str
) -> None:
    """Adds what an arm is beside full depth without exits ("lossless") and beside the stock reference."""
    if (stock := figures.get("stock")) is not None:
        one["speedup_over_stock"] = ratio(stock["seconds"], one["seconds"])
        one["encoder_passes"] = one["p50"] / stock["encoder_seconds"]
    if (full := figures.get("lossless")) is None:
        return
    one["time_ratio"] = ratio(one["seconds"], full["seconds"])
    one["flop_ratio"] = one["flops"] / full["flops"]
    if one["layers"] is None:
        return
    same = (sequences[name] == sequences["lossless"]).all(dim=1)
    one["identical"] = same.double().mean().item()
    saved = 1 - one["flop_ratio"]
    if one["layers"]["ratio"] < full["layers"]["ratio"] and saved > 0:
        one["saving_kept"] = (1 - one["time_ratio"]["value"]) / saved


__all__ = ["components", "encoder_of", "examine", "measure_cell", "ratio", "summary", "timed"]
