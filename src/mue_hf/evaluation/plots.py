"""Pictures of evaluations: quality against what was skipped, and how deep streams, tokens and statements went."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from ..files import write_whole

# Lines by token position and by kind are readable for this many points.
MOST_LINES = 6
# Beside the axes, where it hides nothing.
LEGEND: dict[str, Any] = {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1, 1)}


def main_score(record: Mapping[str, Any]) -> str:
    """The name of the score by which points are compared: CIDEr or accuracy, or else the first one there is."""
    names = list(record["quality"])
    return next((name for name in names if name.startswith(("cider", "accuracy"))), names[0])


def require_matplotlib() -> None:
    """Raises an ImportError that says what to install where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib, which is not installed: pip install 'mue-hf[eval]'")


def draw_plots(
    records: Sequence[Mapping[str, Any]], folder: str | os.PathLike, curves: Mapping[str, Any] | None = None
) -> list[Path]:
    """
    Draws what the records of one run allow, as PNG files that are written whole.

    Args:
        records: points as `mue-hf evaluate` writes them, of one task, model and data set.
        folder: made if it does not exist.
        curves: see [`similarity_curves`].

    Returns:
        `list[Path]`: quality and share of identical outputs against FLOPs and time, similarity by layer, decoder depth
        by token position, depth by kind of statement; those for which there are figures.

    Raises:
        ImportError: where matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    score = main_score(records[0])
    drawn = []

    def draw(name: str, title: str, x: str, y: str) -> Any:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        if x in ("layer", "token"):
            axes.locator_params("x", integer=True)
        drawn.append((folder / f"{name}.png", figure))
        return axes

    timed = [record for record in records if record["time"]]
    flops = {record["key"]: 100 * record["flops"]["skipped"] for record in records}
    speed = {record["key"]: record["time"]["speedup"] for record in timed}
    x_flops, x_time = "FLOPs skipped, %", "speed-up against full depth, measured"
    _points(draw("quality_flops", f"{score} against FLOPs", x_flops, score), records, flops, score)
    _points(draw("identical_flops", "Outputs as at full depth", x_flops, "share identical"), records, flops, None)
    if timed:
        _points(draw("quality_time", f"{score} against time", x_time, score), timed, speed, score)
        _points(draw("identical_time", "Outputs as at full depth", x_time, "share identical"), timed, speed, None)
    if curves:
        _curves(draw("similarity_layers", "Saturation", "layer", "cosine of input and output"), curves)
    # Where the depth is given, it says nothing about tokens and statements.
    dynamic = [record for record in records if not record["criterion"].startswith(("full", "fixed", "random"))]
    some = _spread(dynamic or records)
    if records[0]["depth_by_position"]:
        axes = draw("depth_position", "Decoder depth by token position", "token", "mean layers")
        for record in some:
            depths = [place["depth"] for place in record["depth_by_position"]]
            axes.plot(range(1, len(depths) + 1), depths, marker=".", label=record["name"])
        axes.legend(**LEGEND)
    if records[0]["by_kind"]:
        _kinds(draw("depth_kind", "Depth by kind of statement", "", "image + decoder layers, mean"), some, "depth")
        _kinds(draw("accuracy_kind", "Accuracy by kind of statement", "", "accuracy"), some, "accuracy")
    for path, figure in drawn:
        _save(figure, path)
    return [path for path, _ in drawn]


def _points(axes: Any, records: Sequence[Mapping[str, Any]], place: Mapping[str, float], score: str | None) -> None:
    """A line for each criterion; `score` None for the share of identical outputs."""
    groups = defaultdict(list)
    for record in records:
        value = record["identical"] if score is None else record["quality"][score]
        low, high = record["identical_interval"] if score is None else record["intervals"][score]
        # Percentile intervals of few images may lie beside the score.
        groups[record["criterion"]].append((place[record["key"]], value, max(value - low, 0), max(high - value, 0)))
    for number, (criterion, points) in enumerate(groups.items()):
        x, y, below, above = zip(*sorted(points), strict=True)
        if criterion == "full":
            axes.axhline(y[0], linestyle="--", color="grey", label="full depth")
        else:
            # colours come again after ten criteria, markers do not
            marker = "os^D"[number // 10 % 4]
            axes.errorbar(x, y, (below, above), marker=marker, markersize=4, elinewidth=0.5, label=criterion)
    axes.legend(**LEGEND)


def _curves(axes: Any, curves: Mapping[str, Any]) -> None:
    for name, curve in curves.items():
        layers = range(1, len(curve["mean"]) + 1)
        (line,) = axes.plot(layers, curve["mean"], marker="o", label=name)
        axes.fill_between(layers, curve["low"], curve["high"], color=line.get_color(), alpha=0.2)
        if "agreeing" in curve:
            axes.plot(layers, curve["agreeing"], ":", color=line.get_color(), label=f"{name}: share as last layer")
    axes.legend(**LEGEND)


def _kinds(axes: Any, records: Sequence[Mapping[str, Any]], what: str) -> None:
    kinds = list(records[0]["by_kind"])
    width = 0.8 / len(records)
    for index, record in enumerate(records):
        values = []
        for kind in kinds:
            value = record["by_kind"][kind][what]
            values.append(value["image"] + value["decoder"] if what == "depth" else value)
        axes.bar([at + index * width for at in range(len(kinds))], values, width, label=record["name"])
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(kinds))], kinds)
    axes.legend(**LEGEND)


def _spread(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most `MOST_LINES` of the records, evenly from the first to the last by FLOPs skipped."""
    ordered = sorted(records, key=lambda record: record["flops"]["skipped"])
    count = min(MOST_LINES, len(ordered))
    return [ordered[round(index * (len(ordered) - 1) / max(count - 1, 1))] for index in range(count)]


def _save(figure: Any, path: Path) -> None:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())


__all__ = ["draw_plots", "main_score", "require_matplotlib"]
