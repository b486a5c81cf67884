"""Which exit settings are compared: presets, thresholds, sweeps of every criterion, and random depths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .signals import Signals, threshold_levels

SWEEPS = (
    *("similarity", "similarity-encoder", "similarity-decoder"),
    *("confidence", "margin", "entropy", "patience", "fixed"),
    # Those of "similarity-decoder" with another policy for keys and values of skipped layers.
    *("kv-copy", "kv-exact"),
)
GRIDS: dict[str, tuple[float, ...]] = {
    "similarity": (0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995),
    "confidence": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "margin": (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    "entropy": (0.5, 0.3, 0.2, 0.1, 0.05, 0.02),
}


@dataclass(frozen=True)
class Setting:
    """One point: its `name`, the `criterion` whose curve it belongs to, its exit options, and for random depths the
    name of the point whose depths are dealt anew (`like`)."""

    name: str
    criterion: str
    exits: dict[str, Any]
    like: str | None = None


def make_settings(
    config: Any,
    *,
    presets: Sequence[str] = (),
    sweeps: Sequence[tuple[str, Sequence[float] | None]] = (),
    chosen: Mapping[str, dict[str, Any]] | None = None,
    base: Mapping[str, Any] | None = None,
    levels: Mapping[str, Any] | None = None,
    random_like: Sequence[str] = (),
) -> list[Setting]:
    """
    Every point of a comparison, full depth first.

    Args:
        config (`MuEConfig`): of the model.
        presets (sequence of `str`): names.
        sweeps (sequence of (`str`, values or None)): names of `SWEEPS`; thresholds in place of the usual. "all" is all
            of them, and random depths like those of the points of "similarity".
        chosen (`dict`, *optional*): exit options by name.
        base (`dict`, *optional*): exit options of all points of sweeps but fixed depths; without sweeps one point.
        levels (`dict`, *optional*): see [`similarity_levels`].
        random_like (sequence of `str`): names of other points, whose depths are dealt anew.

    Raises:
        ValueError: if two points have one name, or `random_like` names none of them.
    """
    base, chosen = dict(base or {}), chosen or {}
    points = [Setting("full depth", "full", {"exit_criterion": "never"})]
    points += [Setting(name, "presets", {"exit_preset": name}) for name in presets]
    everything = any(name == "all" for name, _ in sweeps)
    if everything:
        sweeps = [(name, None) for name in SWEEPS]
    for name, values in sweeps:
        points += _sweep(name, values, base, config, levels)
    if everything:
        dealt = [point.name for point in points if point.criterion == "similarity"]
        random_like = list(dict.fromkeys([*random_like, *dealt]))
    points += [Setting(label, "chosen", exits) for label, exits in chosen.items()]
    if base and not sweeps:
        points.append(Setting("given", "given", base))
    names = [point.name for point in points]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Points must differ in name, got {repeated} more than once; drop the copies.")
    by_name = {point.name: point for point in points}
    for name in random_like:
        if name not in by_name:
            raise ValueError(f"`random_like` must name points of this run, got {name!r}; the points are {names}.")
        points.append(Setting(f"random like {name}", "random", by_name[name].exits, name))
    return points


def _sweep(
    name: str, values: Sequence[float] | None, base: dict[str, Any], config: Any, levels: Mapping[str, Any] | None
) -> list[Setting]:
    encoder = ("image", "text") if config.modality_decomposition else ("encoder",)
    if name == "fixed":
        return _fixed(encoder, config, {"exit_kv": base["exit_kv"]} if "exit_kv" in base else {})
    note = "".join(f", {option} {value}" for option, value in base.items())
    if name == "patience":
        counts = [int(value) for value in values or range(1, config.decoder_layers)]
        options = base | {"exit_criterion": "patience"}
        return [Setting(f"patience {count}{note}", name, options | {"exit_patience": count}) for count in counts]
    if name.startswith("kv-"):
        base = base | {"exit_kv": name.removeprefix("kv-")}
    elif not name.startswith("similarity"):
        options = base | {"exit_criterion": name}
        return [
            Setting(f"{name} {value:g}{note}", name, options | {"decoder_exit_threshold": value})
            for value in values or GRIDS[name]
        ]
    parts = {"similarity": (*encoder, "decoder"), "similarity-encoder": encoder}
    # Encoder thresholds that are given stay as they are.
    streams = [
        stream
        for stream in parts.get(name, ("decoder",))
        if stream == "decoder" or f"{stream}_exit_threshold" not in base
    ]
    if levels is None or values:
        return [
            Setting(f"{name} {value:g}{note}", name, base | {f"{stream}_exit_threshold": value for stream in streams})
            for value in values or GRIDS["similarity"]
        ]
    points = []
    for suffix, chosen in (("", levels), (" per layer", levels["per layer"])):
        for level in range(max(len(chosen[stream]) for stream in streams)):
            exits = {
                f"{stream}_exit_threshold": chosen[stream][min(level, len(chosen[stream]) - 1)]
                for stream in streams
                if chosen[stream]
            }
            points.append(Setting(f"{name}{suffix}, level {level + 1}{note}", f"{name}{suffix}", base | exits))
    return points


def _fixed(encoder: Sequence[str], config: Any, kv: dict[str, Any]) -> list[Setting]:
    """Fixed depths: all streams alike, and each alone."""
    layers = dict.fromkeys(encoder, config.encoder_layers) | {"decoder": config.decoder_layers}
    points = []
    for depth in range(1, max(layers.values())):
        options = {f"{stream}_exit_layer": min(depth, most) for stream, most in layers.items()}
        points.append(Setting(f"fixed {depth}", "fixed", {"exit_criterion": "fixed"} | options | kv))
    for stream, most in layers.items():
        for depth in range(1, most):
            options = {"exit_criterion": "fixed", f"{stream}_exit_layer": depth}
            points.append(Setting(f"fixed {stream} {depth}", f"fixed {stream}", options | kv))
    return points


def similarity_levels(signals: Signals, count: int) -> dict[str, Any]:
    """At most `count` thresholds from careful to fast for each stream, and under "per layer" the same with one for
    each layer; see [`threshold_levels`]."""
    levels: dict[str, Any] = {"per layer": {}}
    for per_layer, place in ((False, levels), (True, levels["per layer"])):
        for stream, cosines in signals.encoder.items():
            place[stream] = _rounded(threshold_levels(cosines, count, per_layer=per_layer))
        place["decoder"] = _rounded(
            threshold_levels(signals.decoder, count, agreeing=signals.agreeing, per_layer=per_layer)
        )
    return levels


def _rounded(levels: Sequence[Any]) -> list[Any]:
    """Thresholds to six digits, so that noise in the last bits does not make other points of them."""
    return [
        [None if one is None else round(one, 6) for one in level] if isinstance(level, list) else round(level, 6)
        for level in levels
    ]


__all__ = ["SWEEPS", "Setting", "make_settings", "similarity_levels"]
