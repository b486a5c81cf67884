"""Ways for one stream to exit, for each criterion, from careful to fast."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.settings import sets_depths
from ..evaluation.signals import Signals, without_decay
from ..evaluation.thresholds import candidate_thresholds
from ..model.criteria_mue import CRITERIA, Similarity
from .runner import Runner


def stream_candidates(
    runner: Runner, signals: Signals, name: str, stream: str, betas: Sequence[float], count: int, per_layer: bool
) -> list[dict[str, Any]]:
    """Exit options of one stream under the criterion `name`, careful to fast: at most `count` for each of the `betas`
    that the stream takes; of depths that are given, all."""
    criterion = CRITERIA[name]
    if stream != "decoder" and not criterion.in_encoder:
        criterion = Similarity
    option, layers = criterion.sweep_options[stream], runner.layers[stream]
    min_layers = runner.shared["exit_min_layers"]
    named = {} if criterion is Similarity else {"exit_criterion": name}
    if sets_depths(criterion):
        return [named | {option: depth} for depth in criterion.sweep(layers) if depth >= min_layers]
    found = []
    for beta in betas if stream == "decoder" and "exit_decay_beta" in criterion.options else (1.0,):
        if criterion is not Similarity:
            values = _spread(criterion.sweep(layers), count)
        else:
            cosines, agreeing = signals.encoder.get(stream, signals.decoder), None
            if stream == "decoder":
                # Answers are decided at step 0, whatever N is.
                decay = (signals.steps, runner.num_steps, beta, runner.shared["exit_decay_tau"])
                cosines, agreeing = without_decay(cosines, *decay), signals.agreeing
            places = {"agreeing": agreeing, "per_layer": per_layer, "min_layers": min_layers}
            values = candidate_thresholds(cosines, count, **places)
        decayed = {} if beta == 1.0 else {"exit_decay_beta": beta}
        found += [named | {option: value} | decayed for value in values]
    return found


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spaced, the first and the last among them; of one, the last."""
    places = np.linspace(len(values) - 1, 0, min(count, len(values)))
    return [values[place] for place in sorted({round(place) for place in places})]


__all__ = ["stream_candidates"]
