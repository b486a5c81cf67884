"""One cell of the benchmark, a batch size and a number of beams: all variants in turns, and what each of them ran."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from ..inference.timing import in_turns
from ..metrics.intervals import percentile_interval
from .probes import Stopwatch, component_seconds, count_flops, peak_bytes
from .variants import Variant, row_name

# Passes for the components of one variant end after this many seconds.
COMPONENT_SECONDS = 1.0


def measure_cell(
    variants: Sequence[Variant],
    decoding: Mapping[str, Any],
    *,
    repeats: int,
    max_seconds: float | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Times the variants of a cell: each is run once to warm up, and once to count operations, memory and layers; then
    they take turns (see [`in_turns`]); last come the passes with a clock at every component.

    Args:
        variants: those named "lossless" and "stock" are what the others are compared with, and one on an export with
            the same in torch, which must come before it.
        decoding (`dict`): options of `generate` that all share, `return_dict_in_generate` and `max_new_tokens` too.
        repeats, max_seconds: rounds, and seconds after which none but the first three begins.
        advance (`Callable`): called after each run of a variant, at most `repeats` + 3 times for each.

    Returns:
        `dict`: "rounds", "load_average" (before and after the rounds; None where the system has none) and "variants":
        row (see [`Variant`]) -> figures.
    """
    figures: dict[str, dict[str, Any]] = {}
    sequences: dict[str, Tensor] = {}
    for variant in variants:
        variant.run(decoding)
        advance()
        examined, sequences[variant.row] = examine(variant, decoding)
        if variant.export is not None:
            examined["flops"] = figures[variant.name]["flops"]
        figures[variant.row] = variant.place | examined
        advance()

    def clocked(variant: Variant) -> tuple[float, float]:
        """Seconds of a run and, of these, of its encoder with the trunk."""
        watch = Stopwatch(variant.model.device)
        seconds = watch.time(partial(variant.run, decoding), watch.hooks(variant.encoder, "encoder"))
        advance()
        return sum(seconds.values()), seconds["encoder"]

    load = [load_average()]
    turns = {variant.row: partial(clocked, variant) for variant in variants}
    runs = in_turns(turns, repeats, max_seconds=max_seconds)
    load.append(load_average())
    for variant in variants:
        figures[variant.row] |= summary(runs[variant.row]) | {"components": components(variant, decoding)}
        advance()
    for variant in variants:
        one, other = figures[variant.row], "lossless" if variant.export is None else variant.name
        one |= comparison(one, figures)
        if one["layers"] is not None and other in figures:
            one["identical"] = (sequences[variant.row] == sequences[other]).all(dim=1).double().mean().item()
    return {"rounds": len(runs[variants[0].row]), "load_average": load, "variants": figures}


def load_average() -> float | None:
    """How many processes wanted to run in the last minute; None where the system does not say (Windows)."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def examine(variant: Variant, decoding: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """ "flops" of one run of a variant, "decode_peak_bytes" and "layers" (see [`mean_layers`]); and the new tokens.
    The first two are None on an export: what counts them sees torch alone."""
    run, flops, peak = partial(variant.run, decoding), None, None
    if variant.export is None:
        (output, flops), peak = peak_bytes(partial(count_flops, run), variant.model.device, after=variant.encoder)
    else:
        output = run()
    new_tokens = output.sequences[:, -decoding["max_new_tokens"] :]
    return {"flops": flops, "decode_peak_bytes": peak, "layers": mean_layers(variant, output, decoding)}, new_tokens


def mean_layers(variant: Variant, output: Any, decoding: Mapping[str, Any]) -> dict[str, Any] | None:
    """Mean layers of a sample or token for each stream, "of" what there is, and their "ratio"; None for a peer."""
    config = variant.model.config
    if config.model_type != "mue":
        return None
    of = {stream: config.layers_of(stream) for stream in ("image", "text", "decoder")}
    mean = {stream: float(layers) for stream, layers in of.items()}
    if "executed_layers" in output:
        tokens = variant.inputs["input_ids"].shape[0] * decoding["num_beams"] * decoding["max_new_tokens"]
        mean = {
            "image": output.image_exit_layers.double().mean().item(),
            "text": output.text_exit_layers.double().mean().item(),
            # Of all beams, not only of those that came out.
            "decoder": output.executed_layers["decoder"] / tokens,
        }
    return {**mean, "of": of, "ratio": sum(mean.values()) / sum(of.values())}


def summary(runs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The "seconds" of runs (whole, encoder), their "p50", "p95" and "quartiles", and the median "encoder_seconds"."""
    whole, encoder = zip(*runs, strict=True)
    low, middle, high, most = np.quantile(whole, [0.25, 0.5, 0.75, 0.95]).tolist()
    spread = {"p50": middle, "p95": most, "quartiles": [low, high]}
    return {"seconds": list(whole), **spread, "encoder_seconds": median(encoder)}


def components(variant: Variant, decoding: Mapping[str, Any]) -> dict[str, float] | None:
    """Median seconds by component (see [`component_seconds`]); None for a peer."""
    if variant.model.config.model_type != "mue":
        return None
    passes: list[dict[str, float]] = []
    while len(passes) < 3 and sum(sum(one.values()) for one in passes) < COMPONENT_SECONDS:
        passes.append(component_seconds(variant.model, partial(variant.run, decoding)))
    return {name: median(one[name] for one in passes) for name in passes[0]}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """The ratio of the medians of two variants that took turns, with its 95 % bootstrap interval over rounds."""
    pairs = np.array([above, below])
    rounds = np.random.default_rng(0).integers(pairs.shape[1], size=(1000, pairs.shape[1]))
    one, other = np.median(pairs[:, rounds], axis=-1)
    value = float(np.median(above) / np.median(below))
    return {"value": value, "interval": percentile_interval(one / other, 0.95)}


def comparison(one: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a variant is beside full depth without exits ("lossless"), in torch and where it runs itself, and beside
    the stock reference."""
    found: dict[str, Any] = {}
    if (stock := figures.get("stock")) is not None:
        found["speedup_over_stock"] = ratio(stock["seconds"], one["seconds"])
        found["encoder_passes"] = one["p50"] / stock["encoder_seconds"]
    if (full := figures.get("lossless")) is not None:
        found["time_ratio"] = ratio(one["seconds"], full["seconds"])
        found["flop_ratio"] = one["flops"] / full["flops"]
    if full is not None and (own := figures.get(row_name("lossless", one.get("export")))) is not None:
        found["speedup_over_full_depth"] = ratio(own["seconds"], one["seconds"])
        saved = 1 - found["flop_ratio"]
        if one["layers"] is not None and one["layers"]["ratio"] < own["layers"]["ratio"] and saved > 0:
            found["realised_saving"] = (1 - one["p50"] / own["p50"]) / saved
    return found


__all__ = ["load_average", "measure_cell", "ratio", "summary"]
