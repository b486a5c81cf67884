"""Why a caption stopped where it did: the cosines that decided, drawn with their thresholds, and a map of depths."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.signals import SignalRecorder
from ..model.criteria_mue import CRITERIA, Never, Similarity
from ..model.exit_options_mue import ExitOptions
from ..model.modeling_mue import MuEForConditionalGeneration

# From the shallowest to the deepest exit.
SHADES = ("#a9dbd3", "#7cc4bf", "#4fa9ab", "#2d8a99", "#1b6b80", "#134b60")
THRESHOLD, QUIET = "#d1495b", "#aab3ba"
# Marks of the cosine axis, which is stretched towards 1, where thresholds are.
MARKS, STRETCH = (-1.0, -0.5, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0), 1.01
# The part of an encoder stream's name that says: run without exits.
WHOLE = "{} at full depth"


def shade(depth: int, layers: int) -> str:
    """The colour of what exited after `depth` of `layers` layers."""
    return SHADES[round((depth - 1) / max(layers - 1, 1) * (len(SHADES) - 1))]


def depth_map(columns: Sequence[tuple[str, int, int]]) -> str:
    """An HTML table with a column for each (name, layers run, layers there are), deepest layer on top; layers that ran
    are filled, in a shade of their column's depth."""
    tallest = max(layers for _, _, layers in columns)
    rows = []
    for layer in range(tallest, 0, -1):
        cells = []
        for name, depth, layers in columns:
            color = "transparent" if layer > layers else shade(depth, layers) if layer <= depth else "#8883"
            title = escape(f"{name}: layer {layer} {'ran' if layer <= depth else 'skipped'}")
            cells.append(f'<td title="{title}" style="background-color:{color}"></td>')
        rows.append(f"<tr><th>{layer}</th>{''.join(cells)}</tr>")
    depths = "".join(f"<td>{depth}</td>" for _, depth, _ in columns)
    names = "".join(f"<td>{escape(name)}</td>" for name, _, _ in columns)
    return (
        f'<table class="depths"><tbody>{"".join(rows)}</tbody>'
        f"<tfoot><tr><th></th>{depths}</tr><tr><th></th>{names}</tr></tfoot></table>"
    )


def record_signals(
    model: MuEForConditionalGeneration, inputs: Mapping[str, Tensor], tokens: Sequence[int], exits: Mapping[str, Any]
) -> dict[str, Tensor]:
    """
    The cosines that decided about a caption, from reading it again with the same exits, token by token without beams.

    Args:
        model, inputs: what made the caption, and its inputs of one photo.
        tokens (sequence of `int`): the caption's new tokens.
        exits (`dict`): exit options of `generate`.

    Returns:
        `dict[str, Tensor]`: "image" and "text", or "encoder" in the joint mode [1, layers], and "decoder" [tokens,
        layers], NaN for layers that were not run; and for each encoder stream, with " at full depth" behind its name,
        what all of its layers say.
    """
    plain = {"num_beams": 1, "num_return_sequences": 1, "do_sample": False}
    # Past its end, where something else than `</s>` has ended it, the last token goes on; that is cut off below.
    follow = {"prefix_allowed_tokens_fn": lambda _, ids: [tokens[min(len(ids), len(tokens)) - 1]]}
    with SignalRecorder(model) as run:
        model.generate(**inputs, **exits, **plain, **follow)
    with SignalRecorder(model) as whole, torch.no_grad():
        model.get_encoder()(**inputs)
    every = {WHOLE.format(name): torch.cat(parts) for name, parts in whole.encoder.items()}
    return run.signals.encoder | every | {"decoder": run.signals.decoder[: len(tokens)]}


def draw_signals(signals: Mapping[str, Tensor], options: ExitOptions, num_steps: int) -> Any:
    """
    The `matplotlib.figure.Figure` of the curves that explain the exits: a panel for each encoder stream, and one for
    the decoder where it decides by similarity. Curves end in a dot where a stream or token exited, red lines are the
    thresholds.

    Args:
        signals, options: of [`record_signals`], and of the run.
        num_steps (`int`): N of Theta(t), the greatest number of new tokens.
    """
    from matplotlib.figure import Figure

    streams = [name for name in signals if WHOLE.format(name) in signals]
    names = [*streams, *(["decoder"] if issubclass(CRITERIA[options.exit_criterion], Similarity | Never) else [])]
    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained", dpi=150)
    # Below all curves; thresholds that lie deeper are drawn there.
    bottom = min(float(values.nan_to_num(1.0).min()) for values in signals.values()) - 0.05
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        curves, layers = signals[name], signals[name].shape[1]
        policy = options.policy(name, layers)
        if name == "decoder":
            axes.set_title("decoder, each token", fontsize=10)
            steps = {"dotted": len(curves) - 1, "solid": 0}
            thresholds = {style: policy.at_step(step, num_steps).thresholds for style, step in steps.items()}
        else:
            axes.set_title(f"{name} stream", fontsize=10)
            axes.plot(range(1, layers + 1), signals[WHOLE.format(name)][0], ":o", color=QUIET, markersize=3)
            thresholds = {"solid": policy.thresholds}
        for curve in curves:
            depth = int((~curve.isnan()).sum())
            color = shade(depth, layers)
            axes.plot(range(1, depth + 1), curve[:depth], color=color, linewidth=1.3)
            axes.plot(depth, curve[depth - 1], "o", color=color, markersize=7, markeredgecolor="white", zorder=3)
        for style, values in thresholds.items():
            _draw_thresholds(axes, values, style, bottom)
        axes.set_xlabel("layer")
        axes.set_xticks(range(1, layers + 1))
        axes.grid(alpha=0.25)
    axes = figure.axes[0]
    axes.set_ylabel("cosine of input and output")
    stretch = (lambda y: -np.log10(STRETCH - np.minimum(y, 1)), lambda z: STRETCH - 10**-z)
    axes.set_yscale("function", functions=stretch)
    axes.set_ylim(bottom, 1)
    axes.set_yticks([mark for mark in MARKS if mark >= bottom])
    axes.yaxis.set_major_formatter("{x:g}")
    return figure


def _draw_thresholds(axes: Any, thresholds: Sequence[float | None], style: str, bottom: float) -> None:
    # The last layer's decides nothing, and no cosine is above 1.
    for layer, value in enumerate(thresholds[:-1], 1):
        if value is not None and value < 1:
            ends = layer - 0.4, layer + 0.4
            axes.hlines(max(value, bottom), *ends, color=THRESHOLD, linestyle=style, linewidth=2, clip_on=False)


__all__ = ["depth_map", "draw_signals", "record_signals"]
