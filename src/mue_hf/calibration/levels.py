"""Ways for one stream to leave, for each criterion, from careful to fast."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.settings import GRIDS
from ..signals import Signals, threshold_levels, without_decay
from .runner import Runner


def fixed_levels(runner: Runner, stream: str) -> list[dict[str, Any]]:
    """A stream's fixed depths, deepest first."""
    config = runner.model.config
    layers = config.decoder_layers if stream == "decoder" else config.encoder_layers
    depths = range(layers - 1, runner.shared["exit_min_layers"] - 1, -1)
    return [{"exit_criterion": "fixed", f"{stream}_exit_layer": depth} for depth in depths]


def decoder_levels(runner: Runner, criterion: str, betas: Sequence[float], count: int) -> list[dict[str, Any]]:
    """Exit options of the decoder by what a layer would answer, careful to fast."""
    if criterion == "patience":
        counts = range(runner.model.config.decoder_layers - 1, 0, -1)
        return [{"exit_criterion": criterion, "exit_patience": patience} for patience in counts][-count:]
    # careful first
    grid = sorted(GRIDS[criterion], reverse=criterion != "entropy")
    kept = sorted({round(place) for place in np.linspace(0, len(grid) - 1, min(count, len(grid)))})
    return [
        {"exit_criterion": criterion, "decoder_exit_threshold": grid[place]} | _decay(beta)
        for beta in betas
        for place in kept
    ]


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
