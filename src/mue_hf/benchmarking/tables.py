"""A record of `mue-hf bench` as Markdown tables and as a plot."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ..evaluation.plots import require_matplotlib
from ..files import write_whole

COMPONENTS = (
    *("trunk", "encoder", "image_encoder", "text_encoder", "cross_keys", "decoder_layers", "head"),
    "bookkeeping",
)
HEADER = (
    *("arm", "s/image p50", "quartiles", "p95", "layers", "FLOPs", "time", "saving kept", "over stock"),
    *("encoder passes", "decode MiB", "same"),
)
LEGEND = """\
Seconds are of one call of `generate` divided by its images; all arms take turns in one process. Layers, FLOPs and time
are shares of the arm "lossless" (the package as it is, no exits): mean layers of the three streams, operations counted
as they ran, medians with their 95 % interval. "Saving kept" is the saving of time as a share of that of FLOPs. "Over
stock" is the speed-up over the same weights with transformers' own cache; an encoder pass is that arm's, trunk
included. "Decode MiB" is what tensors take at most after the encoder's end. "Same" is the share of sequences equal to
those of "lossless". Arms: plain, eager attention, batch norms not folded, nothing kept between calls; enabled,
exits looked for and never taken; half, half of the layers everywhere; spread, another depth for each image, row and
step, half on average; synchronised, the same with all rows waiting for the deepest."""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _with_interval(one: Mapping[str, Any] | None, unit: str = "") -> str:
    if one is None:
        return "-"
    low, high = one["interval"]
    return f"{one['value']:.2f}{unit} [{low:.2f}, {high:.2f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _arm(name: str, one: Mapping[str, Any], batch: int) -> str:
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
            _number(one.get("saving_kept"), ".2f"),
            _with_interval(one.get("speedup_over_stock"), "x"),
            _number(one.get("encoder_passes"), ".2f"),
            f"{one['decode_peak_bytes'] / 2**20:.1f}",
            _number(one.get("identical"), ".2f"),
        ]
    )


def _components(cell: Mapping[str, Any]) -> list[str]:
    timed = {name: one["components"] for name, one in cell["arms"].items() if one["components"]}
    names = [name for name in COMPONENTS if any(name in seconds for seconds in timed.values())]
    lines = [_row(["ms per image", *(name.replace("_", " ") for name in names)]), "|---" * (len(names) + 1) + "|"]
    for arm, seconds in timed.items():
        lines.append(_row([arm, *(f"{1000 * seconds.get(name, 0) / cell['batch_size']:.1f}" for name in names)]))
    return lines


def _costs(costs: Mapping[str, Any] | None) -> list[str]:
    if costs is None:
        return []
    lines = ["", _row(["ms per layer call", "fixed", "for each row", "to shrink a batch"]), "|---" * 4 + "|"]
    for streams in costs.values():
        for stream, one in streams.items():
            values = (one[name] for name in ("fixed", "per_row", "shrink"))
            lines.append(_row([stream, *(f"{1000 * seconds:.3f}" for seconds in values)]))
    return lines


def markdown(record: Mapping[str, Any]) -> str:
    """Two tables for each cell, the arms and their components, under what they have in common: hardware, versions,
    settings, and costs of the device if they were measured."""
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
    lines += _costs(record["exit_costs"])
    for cell in record["cells"].values():
        load = " and ".join(f"{value:.1f}" for value in cell["load_average"])
        lines += [
            "",
            f"Batch {cell['batch_size']}, beam {cell['beams']} ({cell['rounds']} rounds, load average {load}):",
            "",
            _row(HEADER),
            "|---" * len(HEADER) + "|",
        ]
        lines += [_arm(name, one, cell["batch_size"]) for name, one in cell["arms"].items()]
        lines += ["", *_components(cell)]
    return "\n".join(lines) + "\n"


def draw_plot(record: Mapping[str, Any], folder: Path) -> Path:
    """
    Draws FLOPs saved against time saved, both as shares of the arm "lossless", a colour for each arm and a marker for
    each cell, without peers; on the dotted line all that is saved in FLOPs is saved in time.

    Raises:
        ImportError: where matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    cells = record["cells"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        title="What exits save", xlabel="FLOPs, share of lossless", ylabel="time, share of lossless"
    )
    axes.grid(alpha=0.3)
    axes.axline((1, 1), slope=1, linestyle=":", color="grey")
    names = list(dict.fromkeys(arm for cell in cells.values() for arm in cell["arms"]))
    for marker, (cell_name, cell) in zip("osD^v<>pP*Xd" * len(cells), cells.items(), strict=False):
        for arm, one in cell["arms"].items():
            if one["layers"] is None:
                continue
            value, (low, high) = one["time_ratio"]["value"], one["time_ratio"]["interval"]
            axes.errorbar(
                one["flop_ratio"],
                value,
                ([max(value - low, 0)], [max(high - value, 0)]),
                marker=marker,
                color=f"C{names.index(arm) % 10}",
                elinewidth=0.6,
                label=f"{arm}, {cell_name}",
            )
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    path = folder / "speed.png"
    write_whole(path, content.getvalue())
    return path


__all__ = ["LEGEND", "draw_plot", "markdown"]
