"""Pictures of evaluations: quality against what was skipped, and how deep streams, tokens and statements went."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import accumulate, product
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from ..files import whole_file
from ..model.criteria_mue import CRITERIA
from .settings import sets_depths
from .tables import main_score

# Okabe and Ito's, which people see apart who do not see all colours. More lines cannot be told apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MOST_LINES = len(COLORS)
QUIET = "#777777"
# Points of these curves lie on no line and have names of their own.
NAMED = {"presets": "presets", "chosen": "chosen settings", "given": "given options"}
SCORES = {"bleu_4": "BLEU-4", "cider": "CIDEr", "meteor": "METEOR", "rouge_l": "ROUGE-L", "spice": "SPICE"}
SCORES |= {f"{score}_plain": f"{label} (plain words)" for score, label in SCORES.items()}
# Shares of the height of the axes between labels beside them.
LABEL_GAP = 0.065


def require_matplotlib() -> None:
    """Raises an ImportError that says what to install where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib, which is not installed: pip install 'mue-hf[eval]'")


def draw_plots(
    records: Sequence[Mapping[str, Any]], folder: str | os.PathLike, curves: Mapping[str, Any] | None = None
) -> list[Path]:
    """
    Draws what the records of one run allow, as PNG files in `folder`: quality and share of identical outputs against
    FLOPs and time, similarity by layer, decoder depth by token position, depth and accuracy by kind of statement.

    Args:
        records: points as `mue-hf evaluate` writes them, of one task, model and data set.
        curves: see [`similarity_curves`].
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    drawn = []

    def draw(name: str, title: str, x: str, y: str) -> Any:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if x in ("layer", "token"):
            axes.locator_params("x", integer=True)
        drawn.append((Path(folder) / f"{name}.png", figure))
        return axes

    score = main_score(records[0])
    label = SCORES.get(score, score)
    flops = [100 * record["flops"]["skipped"] for record in records]
    order = _most_telling(_values(records, flops, score))
    timed = [record for record in records if record["time"]]
    ways = [("flops", records, flops, "FLOPs skipped, %", "FLOPs skipped")]
    if timed:
        speed = [record["time"]["speedup"] for record in timed]
        ways.append(("time", timed, speed, "measured speed-up over full depth", "speed-up"))
    for what, some, x, x_label, against in ways:
        axes = draw(f"quality_{what}", f"{label[0].upper()}{label[1:]} against {against}", x_label, label)
        _points(axes, _values(some, x, score), order)
        axes = draw(f"identical_{what}", f"Outputs as at full depth against {against}", x_label, "share identical")
        _points(axes, _values(some, x, None), order)
    if curves:
        axes = draw("similarity_layers", "Saturation", "layer", "cosine of input and output")
        agreeing = {
            f"{name}: share as last layer": one["agreeing"] for name, one in curves.items() if "agreeing" in one
        }
        _lines(axes, {name: curve["mean"] for name, curve in curves.items()} | agreeing)
        for color, curve in zip(COLORS, curves.values(), strict=False):
            axes.fill_between(range(1, len(curve["mean"]) + 1), curve["low"], curve["high"], color=color, alpha=0.2)
    some = [record for record in records if _finds_depths(record)] or records
    some = sorted(some, key=lambda record: record["flops"]["skipped"])
    some = [some[i] for i in sorted({round(at) for at in np.linspace(0, len(some) - 1, MOST_LINES)})]
    if records[0]["depth_by_position"]:
        depths = {one["name"]: [place["depth"] for place in one["depth_by_position"]] for one in some}
        _lines(draw("depth_position", "Decoder depth by token position", "token", "mean layers"), depths)
    if records[0]["by_kind"]:
        for what, name in (("depth", "image + decoder layers, mean"), ("accuracy", "accuracy")):
            axes = draw(f"{what}_kind", f"{what.capitalize()} by kind of statement", "", name)
            kinds = list(records[0]["by_kind"])
            found = {one["name"]: [one["by_kind"][kind][what] for kind in kinds] for one in some}
            if what == "depth":
                found = {name: [one["image"] + one["decoder"] for one in depths] for name, depths in found.items()}
            _lines(axes, found, ":o")
            axes.set_xticks(range(1, len(kinds) + 1), kinds)
    for path, figure in drawn:
        save_figure(figure, path)
    return [path for path, _ in drawn]


class Point(NamedTuple):
    """A point of a plot with the lengths of its error bar, and the name of its record."""

    x: float
    y: float
    below: float
    above: float
    name: str


def _values(records: Sequence[Mapping[str, Any]], x: Sequence[float], score: str | None) -> dict[str, list[Point]]:
    """The points of each curve, by x; `score` None for the share of identical outputs."""
    curves = defaultdict(list)
    for record, at in zip(records, x, strict=True):
        value = record["identical"] if score is None else record["quality"][score]
        low, high = record["identical_interval"] if score is None else record["intervals"][score]
        # Percentile intervals of few images may lie beside the score.
        point = Point(at, value, max(value - low, 0), max(high - value, 0), record["name"])
        curves[record["criterion"]].append(point)
    return {name: sorted(points) for name, points in curves.items()}


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats in both x and y, by x."""
    front: list[Point] = []
    for point in sorted(points, reverse=True):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front[::-1]


def _most_telling(curves: Mapping[str, Sequence[Point]]) -> list[str]:
    """The curves in the order in which they are drawn while there is room: named points, then those of whole criteria,
    then the others, each kind by the area below the curve."""
    left = min(points[0].x for points in curves.values())
    bottom = min(point.y for points in curves.values() for point in points)

    def area(name: str) -> float:
        front = pareto_front(curves[name])
        starts = [left, *(point.x for point in front)]
        return sum((point.x - start) * (point.y - bottom) for point, start in zip(front, starts, strict=False))

    names = [name for name in curves if name != "full"]
    return sorted(names, key=lambda name: (name not in NAMED, name not in CRITERIA, -area(name)))


def _points(axes: Any, curves: Mapping[str, Sequence[Point]], order: Sequence[str]) -> None:
    """A line for each of the first curves, and the Pareto front of all."""
    # What the oracle saves cannot be reached.
    front = pareto_front(point for name, points in curves.items() if name != "oracle" for point in points)
    axes.plot([one.x for one in front], [one.y for one in front], color="#dddddd", linewidth=5, zorder=1)
    labels = [("Pareto front", front[-1].x, front[-1].y, QUIET)]
    for name, color in zip(order, COLORS, strict=False):
        if name in curves:
            x, y, below, above, names = zip(*curves[name], strict=True)
            style = {"fmt": "D" if name in NAMED else "o-", "color": color, "ecolor": f"{color}66"}
            axes.errorbar(x, y, (below, above), elinewidth=0.8, markersize=4, **style)
            ends = zip(names, x, y, strict=True) if name in NAMED else [(_curve_label(name), x[-1], y[-1])]
            labels += [(*end, color) for end in ends]
    if rest := [_curve_label(name) for name in order[MOST_LINES:] if name in curves]:
        note = f"Not drawn, see the table: {'; '.join(rest)}."
        axes.figure.supxlabel(fill(note, 130), fontsize=7, color=QUIET)
    left, right = axes.get_xlim()
    for point in curves.get("full", ()):
        axes.axhline(point.y, linestyle="--", color=QUIET, linewidth=1, zorder=1)
        labels.append((point.name, right, point.y, QUIET))
    # From the middle of the axes, lines to the labels beside them would hide too much.
    aside = [one for one in labels if one[1] > left + 0.8 * (right - left)]
    label_ends(axes, aside)
    _label_points(axes, [one for one in labels if one not in aside])


def _lines(axes: Any, lines: Mapping[str, Sequence[float]], style: str = "-o") -> None:
    """A line for each name over 1, 2, ..., with its name at its end."""
    ends = []
    for color, (name, values) in zip(COLORS, lines.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, style, color=color, markersize=3)
        ends.append((name, len(values), values[-1], color))
    label_ends(axes, ends)


def label_ends(axes: Any, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes each (text, x, y, colour) beside the axes, as near to the height of its point as the others allow."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    place = axes.transData + axes.transAxes.inverted()
    labels = sorted(labels, key=lambda one: one[2])
    points = [float(place.transform((x, y))[1]) for _, x, y, _ in labels]
    heights = accumulate(points, lambda below, own: max(own, below + LABEL_GAP))
    for above, (text, x, y, color), height in zip(reversed(range(len(labels))), labels, heights, strict=True):
        # The highest may reach the top; the others stay below it.
        height = min(height, 1.0 - above * LABEL_GAP)
        arrow = {"arrowstyle": "-", "color": color, "alpha": 0.5, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
        style = {"color": color, "fontsize": 8, "va": "center", "arrowprops": arrow, "annotation_clip": False}
        axes.annotate(text, (x, y), (1.03, height), textcoords="axes fraction", **style)


def _label_points(axes: Any, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes each (text, x, y, colour) beside its point, where no earlier one is."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=2, foreground="white")]
    # The layout is done, so that places are known.
    axes.figure.draw_without_rendering()
    places = list(product((5, -5, 15, -15, 25, -25), ("left", "right")))
    taken: list[Any] = []
    for text, x, y, color in labels:
        for up, side in places:
            style = {"color": color, "ha": side, "va": "bottom" if up > 0 else "top", "path_effects": outline}
            offset = (5 if side == "left" else -5, up)
            label = axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=8, zorder=4, **style)
            box = label.get_window_extent()
            if (up, side) == places[-1] or not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        taken.append(box)


def _curve_label(curve: str) -> str:
    """What a reader calls the curve of a record's criterion."""
    name = curve.removesuffix(" per layer")
    first, _, stream = name.partition(" ")
    if first in CRITERIA and sets_depths(CRITERIA[first]):
        name = f"{first} depths" + (f" of {stream} alone" if stream else "")
    for part in ("encoder", "decoder"):
        if name.endswith(f"-{part}"):
            name = f"{name.removesuffix(f'-{part}')} of {part} alone"
    if name.startswith("kv-"):
        name = f"{name.removeprefix('kv-')} keys and values"
    # "random" is what 0.1 wrote
    name = {**NAMED, "oracle": "token oracle", "random": "shuffled depths"}.get(name, name)
    return name + (" (threshold per layer)" if curve.endswith(" per layer") else "")


def _finds_depths(record: Mapping[str, Any]) -> bool:
    """Whether the depths of a record say something about its tokens and statements: they were not given."""
    exits = record.get("options") or record["exits"] or {}
    criterion = CRITERIA.get(exits.get("exit_criterion", ""))
    given = criterion is not None and (sets_depths(criterion) or not criterion.sweep_options)
    return not given and record["criterion"] not in ("random", "shuffled depths")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG file, whole or not at all; makes its folder."""
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150)


__all__ = ["draw_plots", "label_ends", "require_matplotlib", "save_figure"]
