"""The exit settings that a person can choose on the page: presets, and sliders that move parts of them."""

import math
from collections.abc import Mapping
from contextlib import suppress
from statistics import median
from typing import Any

from ..model.criteria_mue import THRESHOLD_OPTIONS, Similarity
from ..model.exit_options_mue import SHIPPED_PRESETS, ExitOptions, resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration

FULL_DEPTH = "full depth"
# Greatest value and step. At 1 a threshold is never passed, and beta means no decay.
SLIDERS = {
    **dict.fromkeys(THRESHOLD_OPTIONS.values(), (1.0, 0.001)),
    "exit_decay_beta": (1.0, 0.01),
    "exit_decay_tau": (5.0, 0.05),
}


def resolved_preset(model: MuEForConditionalGeneration, preset: str) -> ExitOptions:
    """The options of a preset, or of `FULL_DEPTH`."""
    call = {"exit_criterion": "never"} if preset == FULL_DEPTH else {"exit_preset": preset}
    return resolve_options(call, {}, model.generation_config.to_dict(), model.config)


def preset_names(model: MuEForConditionalGeneration) -> list[str]:
    """`FULL_DEPTH`, the presets of the checkpoint, and the shipped ones that its encoder can follow."""
    own = getattr(model.generation_config, "exit_presets", None) or {}
    fitting = [FULL_DEPTH]
    for name in dict.fromkeys([*own, *SHIPPED_PRESETS]):
        with suppress(ValueError):
            resolved_preset(model, name)
            fitting.append(name)
    return fitting


def slider_values(model: MuEForConditionalGeneration, preset: str) -> dict[str, float]:
    """Where the sliders stand for a preset, in their steps: option -> value, for the options of this model."""
    options = resolved_preset(model, preset)
    other_mode = ("encoder",) if model.config.modality_decomposition else ("image", "text")
    values = {}
    for name, (greatest, step) in SLIDERS.items():
        if name in [THRESHOLD_OPTIONS[stream] for stream in other_mode]:
            continue
        value = getattr(options, name)
        if isinstance(value, tuple):
            value = median([x for x in value if x is not None] or [1.0])
        value = 1.0 if value is None else min(max(value, 0.0), greatest)
        values[name] = round(round(value / step) * step, 3)
    return values


def exit_choice(model: MuEForConditionalGeneration, preset: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The exit options of `generate`: the preset's, but for sliders that do not stand where it puts them."""
    shown = slider_values(model, preset)
    moved = {name: float(values[name]) for name in shown if not math.isclose(values[name], shown[name], abs_tol=1e-6)}
    if preset != FULL_DEPTH:
        return {"exit_preset": preset} | moved
    # All sliders, so that no option saved with the checkpoint takes part.
    return {"exit_criterion": Similarity.name} | shown | moved if moved else {"exit_criterion": "never"}


__all__ = ["FULL_DEPTH", "SLIDERS", "exit_choice", "preset_names", "slider_values"]
