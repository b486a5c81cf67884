"""Ways for one stream to leave, for each criterion, from careful to fast."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.settings import GRIDS
from ..evaluation.signals import Signals, threshold_levels, without_decay
from .runner import Runner, layers


def fixed_levels(runner: Runner, stream: str) -> list[dict[str, Any]]:
    """A stream's fixed depths, deepest first."""
    depths = range(layers(runner.model.config, stream) - 1, runner.shared["exit_min_layers"] - 1, -1)
    return [{"exit_criterion": "fixed", f"{stream}_exit_layer": depth} for depth in depths]


def decoder_levels(runner: Runner, criterion: str, betas: Sequence[float], count: int) -> list[dict[str, Any]]:
    """Exit options of the decoder by what a layer would answer, careful to fast."""
    if criterion == "patience":
        counts = range(runner.model.config.decoder_layers - 1, 0, -1)
        return [{"exit_criterion": criterion, "exit_patience": patience} for patience in _spread(counts, count)]
    grid = _spread(sorted(GRIDS[criterion], reverse=criterion != "entropy"), count)
    return [
        {"exit_criterion": criterion, "decoder_exit_threshold": threshold} | _decay(beta)
        for beta in betas
        for threshold in grid
    ]


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spaced, the first and the last among them; of one, the last."""
    places = np.linspace(len(values) - 1, 0, min(count, len(values)))
    return [values[place] for place in sorted({round(place) for place in places})]


def similarity_levels(
    runner: Runner, signals: Signals, stream: str, betas: Sequence[float], count: int, per_layer: bool
) -> list[dict[str, Any]]:
    """Exit options of one stream by similarity, careful to fast."""
    min_layers, tau = runner.shared["exit_min_layers"], runner.shared["exit_decay_tau"]
    found = []
    for beta in betas if stream == "decoder" else (1.0,):
        if stream == "decoder":
            # Answers are decided at step 0, whatever N is.
            cosines = without_decay(signals.decoder, signals.steps, runner.num_steps, beta, tau)
            agreeing = signals.agreeing
        else:
            cosines, agreeing = signals.encoder[stream], None
        levels = threshold_levels(cosines, count, agreeing=agreeing, per_layer=per_layer, min_layers=min_layers)
        found += [{f"{stream}_exit_threshold": thresholds} | _decay(beta) for thresholds in levels]
    return found


def _decay(beta: float) -> dict[str, Any]:
    return {} if beta == 1.0 else {"exit_decay_beta": beta}


__all__ = ["decoder_levels", "fixed_levels", "similarity_levels"]
