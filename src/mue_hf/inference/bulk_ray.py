"""Bulk work on many machines: `bulk_rows` inside a pool of Ray actors, for `mue-hf caption --ray`."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from .audit import Audit
from .bulk import bulk_rows
from .loading import load_checkpoint
from .sources import Row, Source

# Batches that an actor is given at once, and that are done again where it dies.
BATCHES = 4
MOST_SHARES = 10_000
# What is added up over the shares.
COUNTED = ("ran", "full", "audit_seconds")


class _Actor:
    """A model, and the source it reads its share of by itself. Ray starts it anew, elsewhere, where it dies."""

    def __init__(
        self, checkpoint: dict, source: dict, rows: dict, work: dict, audit: dict | None, first: int, share: int
    ) -> None:
        self.model, self.processor = load_checkpoint(**checkpoint)
        # It draws rows; their sum is taken where they come together.
        self.audit = None if audit is None else Audit(**audit)
        self.source, self.arguments, self.work = Source(**source), rows, work
        self.first, self.share, self.position = first, share, 0
        self.rows: Iterator[Row] = iter(())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list]:
        """The results of one share as JSON, which needs no common type; and what was run, beside the first."""
        start = self.first + int(batch["id"][0]) * self.share
        # Shares come in order as a rule; where one is repeated, reading begins anew.
        if self.position == 0 or start < self.position:
            self.position, self.rows = 0, self.source.rows(**self.arguments)
        mine = list(islice(self.rows, start - self.position, start - self.position + self.share))
        self.position = start + len(mine)
        totals: Counter = Counter()
        results = bulk_rows(self.model, self.processor, mine, totals=totals, audit=self.audit, **self.work)
        records = list(map(json.dumps, results))
        rest = [0.0] * (len(records) - 1)
        return {"record": records, **{name: [float(totals[name]), *rest] for name in COUNTED}}


def ray_rows(
    checkpoint: dict[str, Any],
    rows: Iterator[Row],
    totals: Counter,
    *,
    address: str,
    actors: int,
    source: dict[str, Any],
    row_arguments: dict[str, Any],
    total: int | None,
    work: dict[str, Any],
    audit: Audit | None = None,
) -> Iterator[dict[str, Any]]:
    """
    What [`bulk_rows`] gives for `rows`, computed by actors, in the same order.

    Every machine needs this package, and sees the checkpoint, the source and the images under the same names. An actor
    that dies is replaced and its share done again; only whole shares count.

    Args:
        checkpoint, source, row_arguments, work (`dict`): arguments of [`load_checkpoint`], [`Source`], its `rows` and
            [`bulk_rows`], `audit` aside.
        rows (iterator of [`Row`]): those that are to be done, without a gap; only the first is looked at.
        totals (`Counter`): as of [`bulk_rows`].
        address (`str`): of a cluster, or "local" for one on this machine that ends with the work.
        actors (`int`): models at work at the same time, each with a processor core, or a GPU where its device is one.
        total (`int` or None): number of rows in the source.
        audit ([`Audit`], *optional*): as of [`bulk_rows`]; rows that actors have begun run as they began.

    Raises:
        ValueError: if the length of the source is not known.
        BudgetRefutedError: as of [`bulk_rows`].
        ImportError: without Ray.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("`--ray` needs Ray: pip install 'mue-hf[ray]'") from error
    if total is None:
        raise ValueError("`--ray` needs a source whose length is known, got a streamed data set; store it as parquet.")
    first = next(rows, None)
    if first is None:
        return
    if audit is not None:
        audit.check()
    # The bar of `bulk_to_file` is enough.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    options: dict[str, Any] = {"num_cpus": actors, "include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **options)
    try:
        expected = first.number
        while expected < total:
            full_depth = audit is not None and audit.full_depth
            drawn = None if audit is None else {**audit.settings, "full_depth": full_depth}
            share = max(BATCHES * work["batch_size"], -(-(total - expected) // MOST_SHARES))
            shares = -(-(total - expected) // share)
            numbers = ray.data.from_items([{"id": number} for number in range(shares)], override_num_blocks=shares)
            numbers.context.execution_options.preserve_order = True
            numbers.context.enable_progress_bars = False
            results = numbers.map_batches(
                _Actor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=1,
                num_gpus=1 if checkpoint["device"].startswith("cuda") else 0,
                fn_constructor_args=(checkpoint, source, row_arguments, work, drawn, expected, share),
            )
            for result in results.iter_rows():
                record = json.loads(result["record"])
                if record["row"] != expected:
                    raise RuntimeError(f"Ray gave row {record['row']} in the place of row {expected}")
                expected += 1
                counted = {name: result[name] for name in COUNTED}
                totals.update(rows=1, bad=record["error"] is not None, **counted)
                if audit is None:
                    yield record
                    continue
                audit.see(record)
                yield record
                audit.check()
                # New actors go on at full depth.
                if audit.full_depth and not full_depth:
                    break
    finally:
        ray.shutdown()


__all__ = ["ray_rows"]
