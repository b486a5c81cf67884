"""Records of `mue-hf evaluate` as a table in markdown, and what is said below it."""

from collections.abc import Mapping, Sequence
from typing import Any


def main_score(record: Mapping[str, Any]) -> str:
    """The name of the score by which points are compared: CIDEr or accuracy, or else the first one there is."""
    names = list(record["quality"])
    return next((name for name in names if name.startswith(("cider", "accuracy"))), names[0])


def make_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The points as a table in markdown, scores with 95 % intervals."""
    score = main_score(records[0])
    others = [name for name in records[0]["quality"] if name.startswith(("bleu_4", "meteor", "rouge", "spice"))]
    head = [
        "point",
        score,
        f"difference to {records[0]['against']}",
        *others,
        "identical",
        "layers image / text / token",
        "R mean / sum / without text",
        "FLOPs skipped (without trunk)",
        "speed-up",
        "tokens",
    ]
    lines = [head, ["---"] * len(head)]
    for record in records:
        quality, depth, skipped, flops, taken = (
            record[name] for name in ("quality", "depth", "layers_skipped", "flops", "time")
        )
        low, high = record["intervals"][score]
        same_low, same_high = record["identical_interval"]
        reductions = " / ".join(
            "-" if skipped[name] is None else f"{skipped[name]:.1%}" for name in ("mean", "sum", "without_text")
        )
        speed = "-"
        if taken:
            speed = "{:.2f} [{:.2f}, {:.2f}]".format(taken["speedup"], *taken["speedup_interval"])
        lines.append(
            [
                record["name"],
                f"{quality[score]:.3f} [{low:.3f}, {high:.3f}]",
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(record["difference"]["mean"], *record["difference"]["interval"]),
                *(f"{quality[name]:.3f}" for name in others),
                f"{record['identical']:.3f} [{same_low:.3f}, {same_high:.3f}]",
                f"{depth['image']:.2f} / {depth['text']:.2f} / {depth['decoder']:.2f}",
                reductions,
                f"{flops['skipped']:.1%} ({flops['skipped_without_trunk']:.1%})",
                speed,
                f"{record['length']['tokens']:.1f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_environment(record: Mapping[str, Any]) -> tuple[str, str]:
    """What a record was measured on, and with which versions, in words."""
    environment = record["environment"]
    machine = environment["hardware"]
    if environment["device"] == "cpu":
        machine += f", threads: {environment['threads']}"
    return machine, ", ".join(f"{name} {value}" for name, value in environment["versions"].items())


def describe_records(records: Sequence[Mapping[str, Any]], names: int = 3) -> str:
    """What stands below the table: data, machine and versions, and of the presets (else of the first point that does
    not give all images the same depth) the images that needed least and most."""
    first = records[0]
    machine, versions = describe_environment(first)
    loads = [load[0] for record in records if (load := record["environment"].get("load_average"))]
    source = f"Split {first['source']['split']} of {first['source']['data']}"
    rows = f"{first['rows']} rows of {first['image_count']} images"
    lines = [f"{source}, {rows}; {first['dtype']}, {machine}; {versions}."]
    if loads:
        lines.append(f"Load average between {min(loads):.1f} and {max(loads):.1f}.")
    told = [one for one in records if one["easiest"][0]["depth"] < one["hardest"][0]["depth"]]
    for record in [one for one in told if one["criterion"] == "presets"] or told[:1]:
        ends = (
            f"{end}: " + ", ".join(f"{one['image_id']} ({one['depth']:.1f})" for one in record[end][:names])
            for end in ("easiest", "hardest")
        )
        what = f"{record['name']}, images by layers of the encoder (mean of streams) and of the decoder"
        lines.append(f"{what}; {'; '.join(ends)}.")
    return "\n\n".join(lines)


__all__ = ["describe_environment", "describe_records", "main_score", "make_table"]
