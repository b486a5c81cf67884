"""A record of `mue-hf bench` as Markdown tables and as a plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.plots import require_matplotlib, save_figure
from .record import upgraded

LEGEND = """\
Seconds are of one call of `generate` divided by its images; all variants take turns in one process. Layers, FLOPs and
time are shares of the variant "lossless" in torch (the package as it is, no exits): mean layers of the three streams,
operations counted as they ran, medians with their 95 % interval. "Over full depth" is the speed-up over "lossless" of
the same engine and precision, and "realised saving" the share of the FLOP saving that is saved in time there. "Over
stock" is the speed-up over the same weights with transformers' own cache; an encoder pass is that variant's, trunk
included. "Decode MiB" is what tensors take at most after the encoder's end. "Same" is the share of sequences equal to
those of "lossless", and of a variant on an export equal to those of this variant in torch, whose FLOPs are given for
it; memory of its engine is not seen. Variants: plain, eager attention and batch norms not folded; enabled, the
overhead of unused exits, which are computed and never taken (by similarity, or by the criterion that is named); half,
half of the layers everywhere; spread, another depth for each image, row and step, half on average; synchronised, the
same with all rows waiting for the deepest."""


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table whose columns are the keys of the rows."""
    cells: Iterable[Iterable[Any]] = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return [f"| {' | '.join(map(str, line))} |" for line in cells]


def ratio_cell(ratio: Mapping[str, Any] | None, unit: str = "") -> str:
    """A ratio (see [`ratio`]) with its interval."""
    return "-" if ratio is None else "{:.2f}{} [{:.2f}, {:.2f}]".format(ratio["value"], unit, *ratio["interval"])


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _engine(one: Mapping[str, Any]) -> dict[str, str]:
    return {"engine": one["engine"], "precision": one["precision"]}


def _variant(name: str, one: Mapping[str, Any], batch: int) -> dict[str, str]:
    low, high = (value / batch for value in one["quartiles"])
    peak = one["decode_peak_bytes"]
    return {
        "variant": name,
        **_engine(one),
        "s/image p50": f"{one['p50'] / batch:.3f}",
        "quartiles": f"{low:.3f} - {high:.3f}",
        "p95": f"{one['p95'] / batch:.3f}",
        "layers": _number(one["layers"] and one["layers"]["ratio"]),
        "FLOPs": _number(one.get("flop_ratio")),
        "time": ratio_cell(one.get("time_ratio")),
        "realised saving": _number(one.get("realised_saving")),
        "over full depth": ratio_cell(one.get("speedup_over_full_depth"), "x"),
        "over stock": ratio_cell(one.get("speedup_over_stock"), "x"),
        "encoder passes": _number(one.get("encoder_passes")),
        "decode MiB": _number(peak and peak / 2**20, ".1f"),
        "same": _number(one.get("identical")),
    }


def _components(name: str, one: Mapping[str, Any], batch: int) -> dict[str, str]:
    seconds = one["components"].items()
    cells = {component.replace("_", " "): f"{1000 * taken / batch:.1f}" for component, taken in seconds}
    return {"ms per image": name} | _engine(one) | cells


def markdown(record: Mapping[str, Any]) -> str:
    """Two tables for each cell, the variants and their components, under what they have in common: hardware, versions
    and settings. Records of earlier versions are taken too."""
    record = upgraded(record)
    machine, settings = record["environment"], record["settings"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    lines = [
        f"{settings['name']}, {settings['image_tokens']} image tokens, {settings['new_tokens']} new tokens, "
        f"{machine['dtype']}, {machine['device']} ({machine['hardware']}, {machine['threads']} threads), {versions}.",
        "",
        LEGEND,
    ]
    for peer, facts in settings["peers"].items():
        lines += ["", f"{peer}: random weights, {facts['image_size']} px, {facts['image_tokens']} image tokens."]
    for export, facts in settings["exports"].items():
        lines += ["", f"{export}: an export, {facts['precision']}, SHA-256 of its manifest {facts['manifest'][:12]}."]
    for cell in record["cells"].values():
        batch, load = cell["batch_size"], " and ".join(_number(value, ".1f") for value in cell["load_average"])
        figures = cell["variants"].items()
        timed = [_components(name, one, batch) for name, one in figures if one["components"]]
        lines += ["", f"Batch {batch}, beam {cell['beams']} ({cell['rounds']} rounds, load average {load}):", ""]
        lines += [*markdown_table([_variant(name, one, batch) for name, one in figures]), "", *markdown_table(timed)]
    return "\n".join(lines) + "\n"


def draw_plot(record: Mapping[str, Any], folder: Path) -> Path:
    """Draws FLOPs against time, both as shares of the variant "lossless": a colour for each cell and a label for each
    variant, without peers. On the dotted line all that is saved in FLOPs is saved in time."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    labels = {"xlabel": "FLOPs, share of lossless", "ylabel": "time, share of lossless in torch"}
    axes = figure.add_subplot(title="What exits save", **labels)
    axes.grid(alpha=0.3)
    axes.axline((1, 1), slope=1, linestyle=":", color="grey")
    for cell_name, cell in upgraded(record)["cells"].items():
        ours = {name: one for name, one in cell["variants"].items() if one["layers"] is not None}
        flops = [one["flop_ratio"] for one in ours.values()]
        time, intervals = zip(*(one["time_ratio"].values() for one in ours.values()), strict=True)
        errors = np.abs(np.array(intervals).T - time)
        axes.errorbar(flops, time, errors, fmt="o", markersize=4, elinewidth=0.6, label=cell_name)
        for name, x, y in zip(ours, flops, time, strict=True):
            axes.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=6)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    path = folder / "speed.png"
    save_figure(figure, path)
    return path


__all__ = ["draw_plot", "markdown", "markdown_table", "ratio_cell"]
