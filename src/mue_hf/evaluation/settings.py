"""Which exit settings are compared: presets, thresholds, sweeps of every criterion, and shuffled depths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..model.criteria_mue import CRITERIA, LAYER_OPTIONS, Criterion, Similarity
from ..model.exit_options_mue import KV_POLICIES, ExitOptions
from .signals import stream_layers


@dataclass(frozen=True)
class Sweep:
    """A curve of settings: the `criterion` that varies, in the encoder, the decoder or both (`parts`), and the policy
    `exit_kv`."""

    criterion: type[Criterion]
    parts: tuple[str, ...]
    exit_kv: str | None = None


def known_sweeps() -> dict[str, Sweep]:
    """Every sweep by name: each criterion, its encoder and decoder alone where it is for both, and the policies for
    keys and values of skipped layers."""
    sweeps = {}
    for name, criterion in CRITERIA.items():
        if criterion.sweep_options:
            parts = ("encoder", "decoder") if criterion.in_encoder else ("decoder",)
            sweeps[name] = Sweep(criterion, parts)
            if criterion.in_encoder and not sets_depths(criterion):
                sweeps |= {f"{name}-{part}": Sweep(criterion, (part,)) for part in parts}
    others = [policy for policy in KV_POLICIES if policy != ExitOptions().exit_kv]
    return sweeps | {f"kv-{policy}": Sweep(Similarity, ("decoder",), policy) for policy in others}


def _needs_fit(criterion: type[Criterion]) -> bool:
    return "exit_fit" in criterion.needed


def sets_depths(criterion: type[Criterion]) -> bool:
    """Whether a criterion is told the depths instead of finding them."""
    return set(criterion.sweep_options.values()) == set(LAYER_OPTIONS.values())


@dataclass(frozen=True)
class Setting:
    """One point: its `name`, the `criterion` whose curve it belongs to, its exit options, and for a shuffled-depth
    baseline the name of the point whose depths are shuffled (`shuffled`)."""

    name: str
    criterion: str
    exits: dict[str, Any]
    shuffled: str | None = None


def make_settings(
    config: PreTrainedConfig,
    *,
    presets: Sequence[str] = (),
    sweeps: Sequence[tuple[str, Sequence[float] | None]] = (),
    chosen: Mapping[str, dict[str, Any]] | None = None,
    base: Mapping[str, Any] | None = None,
    thresholds: Mapping[str, Any] | None = None,
    shuffled_depths: Sequence[str] = (),
    fit: Mapping[str, Any] | None = None,
) -> list[Setting]:
    """
    Every point of a comparison, full depth first.

    Args:
        config (`MuEConfig`): of the model.
        presets (sequence of `str`): names.
        sweeps (sequence of (`str`, values or None)): names of [`known_sweeps`]; values in place of the usual. "all" is
            all of them that need no fit or have one, and shuffled depths of the points of "similarity".
        chosen (`dict`): exit options by name.
        base (`dict`): exit options of all points of sweeps but fixed depths; without sweeps one point.
        thresholds (`dict`): those of similarity, see [`stream_thresholds`]; the usual ones by default.
        shuffled_depths (sequence of `str`): points that get a shuffled-depth baseline.
        fit (`dict`): what criteria that need a fit go by.

    Raises:
        ValueError: if two points have one name, or `shuffled_depths` names none of them.
    """
    base = dict(base or {})
    fits = {} if fit is None else {"exit_fit": dict(fit)}
    points = [Setting("full depth", "full", {"exit_criterion": "never"})]
    points += [Setting(name, "presets", {"exit_preset": name}) for name in presets]
    if everything := any(name == "all" for name, _ in sweeps):
        usable = {name: sweep for name, sweep in known_sweeps().items() if fits or not _needs_fit(sweep.criterion)}
        sweeps = [(name, None) for name in usable]
    for name, values in sweeps:
        fitted = base | fits if _needs_fit(known_sweeps()[name].criterion) else base
        points += _sweep(name, values, fitted, config, thresholds, base)
    if everything:
        found = [point.name for point in points if point.criterion == Similarity.name]
        shuffled_depths = list(dict.fromkeys([*shuffled_depths, *found]))
    points += [Setting(label, "chosen", exits) for label, exits in (chosen or {}).items()]
    if base and not sweeps:
        points.append(Setting("given", "given", base))
    names = [point.name for point in points]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Points must differ in name, got {repeated} more than once; drop the copies.")
    by_name = {point.name: point for point in points}
    for name in shuffled_depths:
        if name not in by_name:
            raise ValueError(f"`shuffled_depths` must name points of this run, got {name!r}; the points are {names}.")
        points.append(Setting(f"shuffled depths of {name}", "shuffled depths", by_name[name].exits, name))
    return points


def _sweep(
    name: str,
    values: Sequence[float] | None,
    base: dict[str, Any],
    config: PreTrainedConfig,
    thresholds: Mapping[str, Any] | None,
    named: dict[str, Any],
) -> list[Setting]:
    """The points of a sweep, with the options `base`; their names tell those that are `named`."""
    sweep, layers = known_sweeps()[name], stream_layers(config)
    criterion = sweep.criterion
    if sets_depths(criterion):
        return _depths(criterion, layers, {"exit_kv": base["exit_kv"]} if "exit_kv" in base else {})
    note = "".join(f", {option} {value}" for option, value in named.items())
    exits = base if criterion is Similarity else base | {"exit_criterion": criterion.name}
    if sweep.exit_kv is not None:
        exits = exits | {"exit_kv": sweep.exit_kv}
    # Encoder thresholds that are given stay as they are.
    options = {
        stream: option
        for stream, option in criterion.sweep_options.items()
        if stream in layers
        and ("decoder" if stream == "decoder" else "encoder") in sweep.parts
        and (stream == "decoder" or option not in base)
    }
    if not options:
        return []
    if thresholds is None or values or criterion is not Similarity:
        return [
            Setting(f"{name} {value:g}{note}", name, exits | dict.fromkeys(options.values(), value))
            for value in values or criterion.sweep(layers["decoder"])
        ]
    points = []
    for label, of in ((name, thresholds), (f"{name} per layer", thresholds["per layer"])):
        found = {option: of[stream] for stream, option in options.items() if of[stream]}
        for index in range(max(map(len, found.values()), default=0)):
            # A stream with fewer of them keeps its last.
            some = {option: values[: index + 1][-1] for option, values in found.items()}
            points.append(Setting(f"{label}, thresholds {index + 1}{note}", label, exits | some))
    return points


def _depths(criterion: type[Criterion], layers: Mapping[str, int], others: dict[str, Any]) -> list[Setting]:
    """Depths that are given: all streams alike, and each alone."""
    points = []
    for streams in (layers, *({stream: count} for stream, count in layers.items())):
        label = criterion.name if len(streams) > 1 else " ".join([criterion.name, *streams])
        for depth in criterion.sweep(max(streams.values())):
            depths = {criterion.sweep_options[stream]: min(depth, most) for stream, most in streams.items()}
            points.append(Setting(f"{label} {depth}", label, {"exit_criterion": criterion.name} | depths | others))
    return points


__all__ = ["Setting", "Sweep", "known_sweeps", "make_settings", "sets_depths"]
