"""What `mue-hf caption --out` and `mue-hf answer` share: rows of a source through the model, here or on Ray."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

from ..inference.audit import AUDIT_COLUMNS, Audit, BudgetRefutedError, promised_budget
from ..inference.bulk import COLUMNS, bulk_rows, bulk_to_file
from ..inference.journal import Journal
from ..inference.sources import Row, Source, printable
from ..model.generation_mue import weights_fingerprint
from .options import decoding_options, exit_options, load_model

BULK_BATCH = 16
# Exit code of a run that an audit has stopped.
STOPPED = 3


def run_bulk(
    args: argparse.Namespace, source: Source, task: str, answers: Sequence[str] | None = None, **columns: Any
) -> int:
    """Writes the results of a source's rows to `--out`, with a bar and a summary, or as JSON lines to stdout; 1 if
    some rows could not be used, 3 if an audit stopped the run. `columns` are arguments of [`Source.rows`] that `args`
    lacks."""
    try:
        return _run(args, source, task, answers, **columns)
    except BudgetRefutedError as error:
        print(f"mue-hf {args.command}: stopped: {error}", file=sys.stderr)
        return STOPPED


def _run(args: argparse.Namespace, source: Source, task: str, answers: Sequence[str] | None, **columns: Any) -> int:
    own = {"row", "image", "error", "caption" if task == "captioning" else "answer", *COLUMNS}
    own |= set() if args.audit is None else AUDIT_COLUMNS.keys()
    if taken := [name for name in args.keep if name in own]:
        raise ValueError(f"`--keep` must not name columns that results have of their own, got {taken}; rename them.")
    columns = {"image_column": args.image_column, "keep": args.keep, **columns}
    rows = source.rows(**columns)
    model, processor = load_model(args)
    options = exit_options(args, model) | decoding_options(args)
    given = {"seed": args.audit_seed, "on_drift": args.on_drift}
    given = {name: value for name, value in given.items() if value is not None}
    audit = None
    if args.audit is not None:
        budget = promised_budget(model, processor, task, options, answers)
        audit = Audit(args.audit, budget=budget, **given)
        # Before there is a file.
        audit.check_run(model, task, options)
    elif given:
        raise ValueError("`--audit` must be given with `--audit-seed` and `--on-drift`, got none; pass a share.")
    work = {"task": task, "answers": answers, "options": options, "columns": args.columns}
    batch_size = args.batch_size or BULK_BATCH
    sized = work | {"batch_size": batch_size, "workers": args.workers, "audit": audit}
    if args.ray is None:

        def process(rows: Iterator[Row], totals: Counter) -> Iterator[dict[str, Any]]:
            return bulk_rows(model, processor, rows, **sized, totals=totals)
    else:
        # What the model refuses is refused here, not by an actor.
        bulk_rows(model, processor, (), **work, workers=0, audit=audit)
        process = _on_ray(args, source, columns, sized)
    if args.out is None:
        totals: Counter = Counter()
        for record in process(rows, totals):
            print(printable(json.dumps(record, ensure_ascii=False)), flush=True)
        if totals["bad"]:
            print(f"mue-hf answer: {totals['bad']} of {totals['rows']} rows could not be used", file=sys.stderr)
        if audit is not None:
            print(f"mue-hf answer: {_describe_audit(audit.summary(), totals['audit_seconds'])}", file=sys.stderr)
        return 1 if totals["bad"] else 0
    # Settings of the checkpoint that decide too, too long to be compared word by word.
    saved = [model.generation_config.to_dict(), processor.image_processor.to_dict()]
    read = {"sources": source.names, "image_root": args.image_root, "split": args.split, **columns}
    checkpoint = sha256(json.dumps(saved, sort_keys=True, default=str).encode()).hexdigest()[:16]
    weights = {"weights": weights_fingerprint(model), "dtype": str(model.dtype)}
    # What follows from an audit may differ: each row says how it ran.
    audited = {} if audit is None else {"audit": audit.settings}
    settings = {**work, **read, **weights, "checkpoint": checkpoint, **audited}
    with Journal(args.out, settings, COLUMNS | AUDIT_COLUMNS | {"row": "int"}, args.overwrite) as journal:
        summary = bulk_to_file(journal, rows, process, total=source.total, batch_size=batch_size, audit=audit)
    print(json.dumps(summary) if args.json else _describe(summary))
    return 1 if summary["bad"] else 0


def _on_ray(args: argparse.Namespace, source: Source, columns: dict[str, Any], work: dict[str, Any]) -> Any:
    """What turns rows into results, as [`bulk_to_file`] asks for it."""
    # An extra, and slow to import.
    from ..inference.bulk_ray import ray_rows

    return partial(
        ray_rows,
        {"name": args.model} | {name: getattr(args, name) for name in ("device", "dtype", "threads", "engine")},
        address=args.ray,
        actors=args.actors,
        source={"names": source.names, "split": args.split, "image_root": args.image_root},
        row_arguments=columns,
        total=source.total,
        work={name: value for name, value in work.items() if name != "audit"},
        audit=work["audit"],
    )


def _describe(summary: Mapping[str, Any]) -> str:
    skipped, counted = summary["compute_skipped"], "layers" if "layers_skipped" in summary else "FLOPs"
    return (
        f"{summary['out']}: {summary['rows']} rows, {summary['bad']} of them bad; in this run "
        f"{summary['new_rows']} in {summary['seconds']:.1f} s ({summary['rows_per_second']:.2f} per second)"
        + ("" if skipped is None else f", {skipped:.0%} of {counted} skipped")
        + (f"; {_describe_audit(summary['audit'], summary['audit_seconds'])}" if "audit" in summary else "")
    )


def _describe_audit(audit: Mapping[str, Any], seconds: float) -> str:
    text = f"{audit['changed']} of {audit['rows']} audited rows changed"
    if audit["rows"]:
        low, high = audit["interval"]
        text += f" ({audit['changed_share']:.2%}, 95 % interval {low:.2%} to {high:.2%})"
    if audit["budget"] is not None:
        after = audit["refuted_at"]
        text += f", budget {audit['budget']:.4g} {'not refuted' if after is None else f'refuted after row {after}'}"
    return f"{text}; audits took {seconds:.1f} s"


__all__ = ["run_bulk"]
