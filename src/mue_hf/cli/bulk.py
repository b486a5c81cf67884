"""What `mue-hf caption --out` and `mue-hf answer` share: rows of a source into a file, in processes or on Ray."""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any

from ..inference.bulk import COLUMNS, bulk_rows, bulk_settings, bulk_to_file
from ..inference.journal import Journal
from ..inference.sources import Row, Source
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor

BULK_BATCH = 16
Process = Callable[[Iterator[Row], Counter], Iterator[dict[str, Any]]]


def bulk_process(
    args: argparse.Namespace,
    source: Source,
    row_arguments: Mapping[str, Any],
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    **work: Any,
) -> tuple[Process, dict[str, Any]]:
    """What turns rows into results (see [`bulk_to_file`]), and the settings that the results depend on.

    Raises:
        `ValueError`: a column that is to be kept is named as one that results have.
    """
    own = {"row", "image", "error", "caption" if work["task"] == "captioning" else "answer", *COLUMNS}
    if taken := [name for name in args.keep if name in own]:
        raise ValueError(f"`--keep` must not name columns that results have of their own, got {taken}; rename them.")
    settings = {name: getattr(args, name) for name in ("image_root", "split")} | dict(row_arguments)
    # Settings of the checkpoint that decide too, too long to be compared word by word.
    saved = [model.generation_config.to_dict(), processor.image_processor.to_dict()]
    settings["checkpoint"] = sha256(json.dumps(saved, sort_keys=True, default=str).encode()).hexdigest()[:16]
    work |= {"columns": args.columns}
    settings = {"sources": source.names, **bulk_settings(model, **work, **settings)}
    work |= {"batch_size": args.batch_size or BULK_BATCH, "workers": args.workers}

    def process(rows: Iterator[Row], totals: Counter) -> Iterator[dict[str, Any]]:
        if args.ray is None:
            return bulk_rows(model, processor, rows, **work, totals=totals)
        # An extra, and slow to import.
        from ..inference.bulk_ray import ray_rows

        # What the model refuses is refused here, not by an actor.
        bulk_rows(model, processor, (), **work | {"workers": 0})
        opened = {"names": source.names, "split": args.split, "image_root": args.image_root}
        checkpoint = {name: getattr(args, name) for name in ("device", "dtype", "threads")} | {"name": args.model}
        ray = {"address": args.ray, "actors": args.actors, "source": opened, "row_arguments": row_arguments}
        return ray_rows(checkpoint, rows, totals, **ray, total=source.total, work=work)

    return process, settings


def run_bulk(
    args: argparse.Namespace, source: Source, rows: Iterator[Row], process: Process, settings: Mapping[str, Any]
) -> int:
    """Writes `--out`, shows progress, and says what became of it.

    Returns:
        `int`: 0, or 1 if some rows could not be used.
    """
    with Journal(args.out, settings, COLUMNS | {"row": "int"}, args.overwrite) as journal:
        summary = bulk_to_file(journal, rows, process, total=source.total, batch_size=args.batch_size or BULK_BATCH)
    if args.json:
        print(json.dumps(summary))
    else:
        counted = "layers" if "layers_skipped" in summary else "FLOPs"
        skipped = summary["compute_skipped"]
        print(
            f"{summary['out']}: {summary['rows']} rows, {summary['bad']} of them bad; in this run "
            f"{summary['new_rows']} in {summary['seconds']:.1f} s ({summary['rows_per_second']:.2f} per second)"
            + ("" if skipped is None else f", {skipped:.0%} of {counted} skipped")
        )
    return 1 if summary["bad"] else 0


__all__ = ["BULK_BATCH", "bulk_process", "run_bulk"]
