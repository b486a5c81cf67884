"""A record of `mue-hf bench` as Markdown tables and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.plots import require_matplotlib, save_figure
from .record import upgraded

COMPONENTS = (
    *("trunk", "encoder", "image_encoder", "text_encoder", "cross_keys", "decoder_layers", "head"),
    "bookkeeping",
)
HEADER = (
    *("variant", "s/image p50", "quartiles", "p95", "layers", "FLOPs", "time", "realised saving", "over stock"),
    *("encoder passes", "decode MiB", "same"),
)
LEGEND = """\
Seconds are of one call of `generate` divided by its images; all variants take turns in one process. Layers, FLOPs and
time are shares of the variant "lossless" (the package as it is, no exits): mean layers of the three streams,
operations counted as they ran, medians with their 95 % interval. "Realised saving" is the share of the FLOP saving
that is saved in time. "Over stock" is the speed-up over the same weights with transformers' own cache; an encoder pass
is that variant's, trunk included. "Decode MiB" is what tensors take at most after the encoder's end. "Same" is the
share of sequences equal to those of "lossless". Variants: plain, eager attention and batch norms not folded; enabled,
the overhead of unused exits, which are computed and never taken (by similarity, or by the criterion that is named);
half, half of the layers everywhere; spread, another depth for each image, row and step, half on average; synchronised,
the same with all rows waiting for the deepest."""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _with_interval(one: Mapping[str, Any] | None, unit: str = "") -> str:
    if one is None:
        return "-"
    low, high = one["interval"]
    return f"{one['value']:.2f}{unit} [{low:.2f}, {high:.2f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _variant(name: str, one: Mapping[str, Any], batch: int) -> str:
    low, high = (1 / batch * value for value in one["quartiles"])
    layers = one["layers"] and one["layers"]["ratio"]
    return _row(
        [
            name,
            f"{one['p50'] / batch:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{one['p95'] / batch:.3f}",
            _number(layers, ".2f"),
            _number(one.get("flop_ratio"), ".2f"),
            _with_interval(one.get("time_ratio")),
            _number(one.get("realised_saving"), ".2f"),
            _with_interval(one.get("speedup_over_stock"), "x"),
            _number(one.get("encoder_passes"), ".2f"),
            f"{one['decode_peak_bytes'] / 2**20:.1f}",
            _number(one.get("identical"), ".2f"),
        ]
    )


def _components(cell: Mapping[str, Any]) -> list[str]:
    timed = {name: one["components"] for name, one in cell["variants"].items() if one["components"]}
    names = [name for name in COMPONENTS if any(name in seconds for seconds in timed.values())]
    lines = [_row(["ms per image", *(name.replace("_", " ") for name in names)]), "|---" * (len(names) + 1) + "|"]
    for variant, seconds in timed.items():
        lines.append(_row([variant, *(f"{1000 * seconds.get(name, 0) / cell['batch_size']:.1f}" for name in names)]))
    return lines


def markdown(record: Mapping[str, Any]) -> str:
    """Two tables for each cell, the variants and their components, under what they have in common: hardware, versions
    and settings. Records of version 0.1 are taken too."""
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
    for cell in record["cells"].values():
        load = " and ".join(_number(value, ".1f") for value in cell["load_average"])
        lines += [
            "",
            f"Batch {cell['batch_size']}, beam {cell['beams']} ({cell['rounds']} rounds, load average {load}):",
            "",
            _row(HEADER),
            "|---" * len(HEADER) + "|",
        ]
        lines += [_variant(name, one, cell["batch_size"]) for name, one in cell["variants"].items()]
        lines += ["", *_components(cell)]
    return "\n".join(lines) + "\n"


def draw_plot(record: Mapping[str, Any], folder: Path) -> Path:
    """
    Draws FLOPs against time, both as shares of the variant "lossless": a colour for each cell and a label for each
    variant, without peers. On the dotted line all that is saved in FLOPs is saved in time.

    Raises:
        ImportError: where matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        title="What exits save", xlabel="FLOPs, share of lossless", ylabel="time, share of lossless"
    )
    axes.grid(alpha=0.3)
    axes.axline((1, 1), slope=1, linestyle=":", color="grey")
    for cell_name, cell in upgraded(record)["cells"].items():
        ours = {name: one for name, one in cell["variants"].items() if one["layers"] is not None}
        flops = [one["flop_ratio"] for one in ours.values()]
        time = [one["time_ratio"]["value"] for one in ours.values()]
        ends = zip(*(one["time_ratio"]["interval"] for one in ours.values()), strict=True)
        errors = [[abs(at - end) for at, end in zip(time, some, strict=True)] for some in ends]
        axes.errorbar(flops, time, errors, fmt="o", markersize=4, elinewidth=0.6, label=cell_name)
        for name, x, y in zip(ours, flops, time, strict=True):
            axes.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=6)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    path = folder / "speed.png"
    save_figure(figure, path)
    return path


__all__ = ["LEGEND", "draw_plot", "markdown"]
