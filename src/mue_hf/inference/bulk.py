"""Bulk work: captions or closed answers for any number of rows, at flat memory, in the order of the source.

Images are decoded in worker processes while the model runs. A row that cannot be used gives a row that says why.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..model.exit_options_mue import CONFIG_NAMES
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .audit import AUDIT_COLUMNS, Audit, BudgetRefutedError
from .decoders import Decoders
from .depths import layers_skipped, read_depths
from .flops import FlopCount
from .journal import Journal
from .loading import evaluating
from .predict import TEXTS, encode_texts, run_task, task_options
from .sources import Row, batches
from .timing import timed

TASKS = tuple(TEXTS)
#: Columns on request, and their types.
COLUMNS = {
    "image_exit_layers": "int",
    "text_exit_layers": "int",
    "decoder_exit_layers": "ints",
    "layers_skipped": "float",
    "flops_skipped": "float",
    "scores": "floats",
    "seconds": "float",
    "batch_size": "int",
}
CAPTION_COLUMNS = tuple(name for name in COLUMNS if name != "scores")
ANSWER_COLUMNS = tuple(name for name in COLUMNS if name != "flops_skipped")
# Rows that may wait for others of their shape, in batches.
WAITING = 4


def bulk_rows(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    rows: Iterable[Row],
    *,
    task: str = "captioning",
    answers: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    columns: Sequence[str] = (),
    batch_size: int = 16,
    workers: int = 1,
    totals: Counter | None = None,
    audit: Audit | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Captions, or answers, for a stream of rows.

    Rows come out in the order they went in, one for each; what they say depends on `batch_size` and `workers` no more
    than the model's own arithmetic does (in float32 a product of another size may differ in its last bits). At most a
    few batches of rows are in memory.

    Args:
        model, processor: on the model's device, in its dtype; put into evaluation mode for the time.
        rows (iterable of [`Row`]): see [`Source`].
        task (`str`, *optional*, defaults to `"captioning"`): or "entailment", whose rows have the texts "hypothesis"
            and maybe "premise", or "vqa", whose rows have a question as "text".
        answers (sequence of `str`, *optional*): those to choose from; "yes", "no" and "maybe" for entailment.
        options (`dict`, *optional*): of `generate`, exits included; for answers exit options alone.
        columns (sequence of `str`, *optional*): further columns, of `COLUMNS`: "layers_skipped" is the paper's share,
            "scores" are log-probabilities in the order of `answers`, "seconds" those of the batch's model run, divided
            by its rows.
        batch_size (`int`, *optional*, defaults to 16): rows of one shape of pixels that run together.
        workers (`int`, *optional*, defaults to 1): processes that decode images, for which a script needs
            `if __name__ == "__main__":`; 0 decodes in this one.
        totals (`Counter`, *optional*): where to add "rows", "bad", and what was run and what full depth would have
            run: "ran" and "full", in FLOPs for captions and in layers for answers; and "audit_seconds".
        audit ([`Audit`], *optional*): runs a share of the rows a second time, at full depth, in the same batch. They
            wait for each other, so that their batches hold no other rows.

    Returns:
        `Iterator[dict]`: "row", "image", the row's fields, "caption" or "answer", "error" (None, or why there is
        none), and `columns`; with `audit` also whether the row was "audited", whether its output is "changed" by its
        exits (None where it was not audited; of captions without punctuation, as presets are calibrated), and whether
        it ran at "full_depth" because the budget was refuted.

    Raises:
        ValueError: before the first row is read, if an argument is not one of these or the model refuses an option.
        BudgetRefutedError: after the row that refutes the preset's budget, where `audit` is to stop there.
    """
    if workers < 0:
        raise ValueError(f"`workers` must be at least 0, got {workers}; 0 decodes in this process.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}; pass more.")
    if answers is None and task == "vqa":
        raise ValueError("`answers` must be given for vqa, got None; pass those to choose from.")
    answers = list(processor.entailment_answers.values() if answers is None else answers)
    work = _Work(model, processor, task, answers, options or {}, columns, audit)
    work.rehearse()
    decoders = Decoders(processor.image_processor, workers)
    return _results(work, rows, decoders, batch_size, Counter() if totals is None else totals)


def _results(
    work: "_Work", rows: Iterable[Row], decoders: Decoders, batch_size: int, totals: Counter
) -> Iterator[dict[str, Any]]:
    audit = work.audit
    with closing(decoders), evaluating(work.model):
        if audit is not None:
            audit.check()
        decoded = decoders.decoded(map(work.checked, rows), batch_size)
        for record in _in_order(work, decoded, batch_size, totals):
            totals.update(rows=1, bad=record["error"] is not None)
            if audit is None:
                yield record
                continue
            audit.see(record)
            yield record
            audit.check()


def _in_order(
    work: "_Work", decoded: Iterable[tuple[Row, np.ndarray | str]], batch_size: int, totals: Counter
) -> Iterator[dict[str, Any]]:
    """Rows of one shape of pixels wait for each other, those that are audited apart, and results for those of the rows
    before them."""
    groups: dict[tuple[int, ...], dict[int, tuple[Row, np.ndarray]]] = {}
    done: dict[int, dict[str, Any]] = {}
    given = 0

    def run(kind: tuple[int, ...]) -> None:
        group = groups.pop(kind)
        done.update(zip(group, work.guarded(list(group.values()), totals), strict=True))

    for position, (row, pixels) in enumerate(decoded):
        if isinstance(pixels, str):
            done[position] = work.record(row, None, pixels)
        else:
            kind = (work.is_audited(row), *pixels.shape)
            group = groups.setdefault(kind, {})
            group[position] = row, pixels
            if len(group) == batch_size:
                run(kind)
        # The first group has waited longest; the others wait for it.
        if groups and position + 1 - given > WAITING * batch_size:
            run(next(iter(groups)))
        while given in done:
            yield done.pop(given)
            given += 1
    for kind in list(groups):
        run(kind)
    yield from (done[position] for position in sorted(done))


@dataclass
class _Work:
    """The arguments of [`bulk_rows`], checked, and what is done with a batch."""

    model: MuEForConditionalGeneration
    processor: MuEProcessor
    task: str
    answers: list[str]
    options: Mapping[str, Any]
    columns: Sequence[str]
    audit: Audit | None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"`task` must be one of {list(TASKS)}, got {self.task!r}; choose one of them.")
        self.captions = self.task == "captioning"
        known = CAPTION_COLUMNS if self.captions else ANSWER_COLUMNS
        if unknown := [name for name in self.columns if name not in known]:
            raise ValueError(f"`columns` must be among {list(known)} for {self.task}, got {unknown}; check the names.")
        self.options = task_options(self.task, self.options)
        self.answer_ids = None if self.captions else self.processor.encode_answers(self.answers)
        kept = {name: value for name, value in self.options.items() if name not in CONFIG_NAMES}
        self.full_options = kept | {"exit_criterion": "never"}
        self.flops = FlopCount(self.model, self.options)
        if self.audit is not None:
            self.audit.check_run(self.model, self.task, self.options)

    def rehearse(self) -> None:
        """One grey image, so that what the model refuses is refused before work is done."""
        texts: dict[str, str | None] = dict.fromkeys(TEXTS[self.task][:1], "a")
        image = Image.new("RGB", (64, 64), "grey")
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0].numpy()
        with evaluating(self.model):
            self.run([(Row(0, None, texts=texts), pixels)], Counter())

    def is_audited(self, row: Row) -> bool:
        """Whether a row runs a second time, at full depth."""
        return self.audit is not None and not self.audit.full_depth and self.audit.draws(row.number)

    def checked(self, row: Row) -> Row:
        """The row, with a fault if its texts cannot be used."""
        if row.fault is None and not self.captions:
            try:
                encode_texts(self.processor, self.task, [row.texts])
            except ValueError as error:
                return replace(row, image=None, fault=str(error))
        return row

    def guarded(self, batch: list[tuple[Row, np.ndarray]], totals: Counter) -> list[dict[str, Any]]:
        """Results of a batch; a row that the model refuses is found by running each alone."""
        try:
            return self.run(batch, totals)
        except ValueError as error:
            if len(batch) == 1:
                return [self.record(batch[0][0], None, str(error))]
            return [record for one in batch for record in self.guarded([one], totals)]

    @torch.inference_mode()
    def run(self, batch: list[tuple[Row, np.ndarray]], totals: Counter) -> list[dict[str, Any]]:
        """Results of rows and their pixels."""
        rows = [row for row, _ in batch]
        inputs = encode_texts(self.processor, self.task, [row.texts for row in rows])
        inputs["pixel_values"] = torch.from_numpy(np.stack([pixels for _, pixels in batch]))
        inputs = inputs.to(self.model.device, self.model.dtype)
        full_depth = self.audit is not None and self.audit.full_depth
        call = partial(run_task, self.model, inputs, answer_ids=self.answer_ids)
        options = self.full_options if full_depth else self.options
        output, seconds = timed(partial(call, options=options), self.model.device)
        results = self.results(output)
        audited = [self.is_audited(row) for row in rows]
        changed: list[bool] = []
        if any(audited):
            full_output, audit_seconds = timed(partial(call, options=self.full_options), self.model.device)
            changed = [one != other for one, other in zip(*map(self.compared, (output, full_output)), strict=True)]
            totals.update(audit_seconds=audit_seconds)
        shape, text_tokens = inputs["pixel_values"].shape[1:], inputs["attention_mask"].sum(1).tolist()
        records = []
        for index, (row, depths) in enumerate(zip(rows, read_depths(output), strict=True)):
            facts: dict[str, Any] = {
                **vars(depths),
                "decoder_exit_layers": list(depths.decoder_exit_layers),
                "layers_skipped": layers_skipped(self.model.config, depths),
                "seconds": seconds / len(rows),
                "batch_size": len(rows),
                "audited": audited[index],
                "changed": changed[index] if audited[index] else None,
                "full_depth": full_depth,
            }
            if self.captions:
                ran, full = (sum(parts.values()) for parts in self.flops(shape, text_tokens[index], depths))
                facts["flops_skipped"] = 1 - ran / full
            else:
                ran, full = 1 - facts["layers_skipped"], 1.0
                facts["scores"] = output.scores[index].tolist()
            totals.update(ran=ran, full=full)
            records.append(self.record(row, results[index], None, **facts))
        return records

    def results(self, output: Any) -> list[str]:
        """The captions or answers of a batch's output."""
        if self.captions:
            return self.processor.post_process_image_text_to_text(output.sequences)
        return [self.answers[best] for best in output.scores.argmax(1).tolist()]

    def compared(self, output: Any) -> list[str]:
        """What an audit compares: what calibration counts as an output."""
        return self.processor.post_process_captions(output.sequences) if self.captions else self.results(output)

    def record(self, row: Row, result: str | None, error: str | None, **facts: Any) -> dict[str, Any]:
        """What comes out for a row."""
        given = {"caption" if self.captions else "answer": result, "error": error}
        asked = {name: facts.get(name) for name in self.columns}
        if self.audit is not None:
            # Nothing of a bad row can change.
            asked |= {"audited": False, "changed": None, "full_depth": False}
            asked |= {name: facts[name] for name in AUDIT_COLUMNS if name in facts}
        return {"row": row.number, "image": row.name, **row.fields, **given, **asked}


def bulk_to_file(
    journal: Journal,
    rows: Iterable[Row],
    process: Callable[[Iterator[Row], Counter], Iterator[dict[str, Any]]],
    *,
    total: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
    audit: Audit | None = None,
) -> dict[str, Any]:
    """
    Works off the rows that a journal lacks, and makes its file of them.

    Args:
        journal ([`Journal`]): entered.
        rows (iterable of [`Row`]): all rows of the source.
        process (`Callable`): (rows, totals) to results, as [`bulk_rows`] makes them.
        total (`int`, *optional*), progress (`bool`, *optional*, defaults to `True`): number of rows for a bar.
        batch_size (`int`, *optional*, defaults to 16): results that are written at once.
        audit ([`Audit`], *optional*): that of `process`, fresh; the rows that are done tell it where it was.

    Returns:
        `dict`: "out", "rows" and "bad" of the whole file; of this run "new_rows", "seconds", "rows_per_second" and the
        share that exits saved, "flops_skipped" or for answers "layers_skipped" (None where nothing ran), without what
        audits cost. With `audit` its summary of the whole file as "audit", and "audit_seconds" of this run.

    Raises:
        ValueError: if the source has no rows, or does not begin with those that are done.
        BudgetRefutedError: if the audit stops the run; what is done is kept.
    """
    totals: Counter = Counter()
    counted = "flops" if journal.settings.get("task", TASKS[0]) == "captioning" else "layers"
    start = time.perf_counter()
    if not journal.complete:
        results = process(journal.remaining(rows, None if audit is None else audit.see), totals)
        # Without the start of the workers.
        start = time.perf_counter()
        with tqdm(total=total, initial=journal.counts["rows"], unit=" images", disable=not progress) as bar:
            for written in _kept(results, batch_size):
                journal.append(written)
                skipped = _run_facts(totals, start, counted)[f"{counted}_skipped"]
                shown = {f"{counted} skipped": "-" if skipped is None else f"{skipped:.0%}"}
                bar.set_postfix(shown | {"bad": journal.counts["bad"]}, refresh=False)
                bar.update(len(written))
        if not journal.counts["rows"]:
            raise ValueError("`source` must have rows, got none; check it.")
        audited = {} if audit is None else {"audit": audit.summary()}
        journal.finish({"run": _run_facts(totals, start, counted), **audited})
    summary = {"out": str(journal.out), **journal.counts, **_run_facts(totals, start, counted)}
    if audit is not None:
        summary |= {"audit": journal.finished["audit"], "audit_seconds": totals["audit_seconds"]}
    return summary


def _kept(results: Iterator[dict[str, Any]], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Results in batches; those before the end of a run that stops are not lost."""
    stopped: list[BudgetRefutedError] = []

    def until_stopped() -> Iterator[dict[str, Any]]:
        try:
            yield from results
        except BudgetRefutedError as error:
            stopped.append(error)

    yield from batches(until_stopped(), batch_size)
    if stopped:
        raise stopped[0]


def _run_facts(totals: Counter, start: float, counted: str) -> dict[str, Any]:
    seconds = time.perf_counter() - start
    skipped = 1 - totals["ran"] / totals["full"] if totals["full"] else None
    speed = {"new_rows": totals["rows"], "seconds": seconds, "rows_per_second": totals["rows"] / seconds}
    # "compute_skipped" is its name in 0.1, whatever was counted
    return {**speed, f"{counted}_skipped": skipped, "compute_skipped": skipped}


__all__ = ["ANSWER_COLUMNS", "CAPTION_COLUMNS", "COLUMNS", "TASKS", "bulk_rows", "bulk_to_file"]
