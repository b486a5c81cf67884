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
    rows = [_cells(record, score, others, records[0]["against"]) for record in records]
    # records of earlier versions have fewer
    columns = max((list(row) for row in rows), key=len)
    lines = [columns, ["---"] * len(columns), *([row.get(name, "-") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(record: Mapping[str, Any], score: str, others: Sequence[str], against: str) -> dict[str, str]:
    """A row of the table, by column."""
    quality, depth, flops, time = (record[name] for name in ("quality", "depth", "flops", "time"))
    skipped = [record["layers_skipped"][name] for name in ("mean", "sum", "without_text")]
    change = record["difference"]
    return {
        "point": record["name"],
        score: _with_interval(quality[score], record["intervals"][score]),
        f"difference to {against}": _with_interval(change["mean"], change["interval"], "+.3f"),
        **_words_cells(record),
        **{name: f"{quality[name]:.3f}" for name in others},
        "identical": _with_interval(record["identical"], record["identical_interval"]),
        "layers image / text / token": f"{depth['image']:.2f} / {depth['text']:.2f} / {depth['decoder']:.2f}",
        **_executed_cell(record),
        "R mean / sum / without text": " / ".join("-" if share is None else f"{share:.1%}" for share in skipped),
        "FLOPs skipped (without trunk)": f"{flops['skipped']:.1%} ({flops['skipped_without_trunk']:.1%})",
        "speed-up": _with_interval(time["speedup"], time["speedup_interval"], ".2f") if time else "-",
        "tokens": f"{record['length']['tokens']:.1f}",
    }


def _executed_cell(record: Mapping[str, Any]) -> dict[str, str]:
    """Layers that ran for a token of a caption; records of 0.2 do not say."""
    executed = record.get("executed")
    return {} if executed is None else {"layers run a token": f"{executed:.2f}"}


def _words_cells(record: Mapping[str, Any]) -> dict[str, str]:
    """What words alone reach, and how far the point is above it, where that was measured."""
    if "words" not in record:
        return {}
    words, change = record["words"], record["words"]["difference"]
    return {
        "words alone": _with_interval(words["accuracy"], words["interval"]),
        "difference to words alone": _with_interval(change["mean"], change["interval"], "+.3f"),
    }


def _with_interval(value: float, interval: Sequence[float], form: str = ".3f") -> str:
    low, high = interval
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


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
    lines += [describe_samples(one) for one in records if one["criterion"] == "full" and one.get("samples")]
    told = [one for one in records if one["easiest"][0]["depth"] < one["hardest"][0]["depth"]]
    for record in [one for one in told if one["criterion"] == "presets"] or told[:1]:
        ends = (
            f"{end}: " + ", ".join(f"{one['image_id']} ({one['depth']:.1f})" for one in record[end][:names])
            for end in ("easiest", "hardest")
        )
        what = f"{record['name']}, images by layers of the encoder (mean of streams) and of the decoder"
        lines.append(f"{what}; {'; '.join(ends)}.")
    return "\n\n".join(lines)


def describe_samples(record: Mapping[str, Any]) -> str:
    """The best, the median and the worst caption of a record by its main score."""
    told = []
    for place, sample in record["samples"].items():
        score = next(value for name, value in sample.items() if name not in ("image_id", "output"))
        told.append(f'{place} "{sample["output"]}" ({score:.2f})')
    name = next(name for name in record["samples"]["best"] if name not in ("image_id", "output"))
    return f"Captions by {name}, {record['name']}: {', '.join(told)}."


__all__ = ["describe_environment", "describe_records", "describe_samples", "main_score", "make_table"]
