"""Bulk work: captions or closed answers for any number of rows, at flat memory, in the order of the source.

Images are decoded in worker processes while the model runs. A row that cannot be used gives a row that says why.
"""

import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..model.exit_options_mue import CONFIG_NAMES, check_names
from ..model.generation_mue import weights_fingerprint
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import CAPTION_PROMPT, MuEProcessor, load_image
from .depths import layers_skipped, read_depths
from .flops import FlopCount
from .journal import Journal
from .predict import one_caption
from .sources import Row
from .timing import timed

TASKS = ("captioning", "entailment", "vqa")
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
) -> Iterator[dict[str, Any]]:
    """
    Captions, or answers, for a stream of rows.

    Rows come out in the order they went in, one for each, whatever `batch_size` and `workers` are; what they say
    depends on those no more than the model's own arithmetic does (exact in float64; in float32 a product of another
    size may differ in its last bits). At most a few batches of rows are in memory.

    Args:
        model ([`MuEForConditionalGeneration`]): on its device, in its dtype; put into evaluation mode for the time.
        processor ([`MuEProcessor`]): that of the model.
        rows (iterable of [`Row`]): see [`Source`].
        task (`str`, *optional*, defaults to `"captioning"`): or "entailment", whose rows have the texts "hypothesis"
            and maybe "premise", or "vqa", whose rows have a question as "text".
        answers (sequence of `str`, *optional*): those to choose from; "yes", "no" and "maybe" for entailment.
        options (`dict`, *optional*): of `generate`, exits included; for answers exit options alone.
        columns (sequence of `str`, *optional*): further columns: "image_exit_layers", "text_exit_layers",
            "decoder_exit_layers" (a list), "layers_skipped" (the paper's share), "flops_skipped" (captions),
            "scores" (answers: log-probabilities in the order of `answers`), "seconds" (of the batch's model run,
            divided by its rows), "batch_size".
        batch_size (`int`, *optional*, defaults to 16): rows of one shape of pixels that run together.
        workers (`int`, *optional*, defaults to 1): processes that decode images; 0 decodes in this one. A script that
            asks for some needs `if __name__ == "__main__":`.
        totals (`Counter`, *optional*): where to add "rows", "bad", and what was run and what full depth would have
            run: "ran" and "full", in FLOPs for captions and in layers for answers.

    Returns:
        `Iterator[dict]`: "row", "image", the row's fields, "caption" or "answer", "error" (None, or why there is
        none), and `columns`.

    Raises:
        ValueError: before the first row is read, if an argument is not one of these or the model refuses an option.
    """
    work = _Work(model, processor, task, answers, dict(options or {}), columns, batch_size)
    if workers < 0:
        raise ValueError(f"`workers` must be at least 0, got {workers}; 0 decodes in this process.")
    work.rehearse()
    decoders = _Decoders(partial(_decode, processor.image_processor), workers)
    return chain.from_iterable(work.records(rows, decoders, Counter() if totals is None else totals))


class _Work:
    """The arguments of [`bulk_rows`], checked, and what is done with a batch."""

    def __init__(
        self,
        model: MuEForConditionalGeneration,
        processor: MuEProcessor,
        task: str,
        answers: Sequence[str] | None,
        options: dict[str, Any],
        columns: Sequence[str],
        batch_size: int,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {list(TASKS)}, got {task!r}; choose one of them.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}; pass more.")
        known = CAPTION_COLUMNS if task == "captioning" else ANSWER_COLUMNS
        if unknown := [name for name in columns if name not in known]:
            raise ValueError(f"`columns` must be among {list(known)} for {task}, got {unknown}; check the names.")
        check_names(options, CONFIG_NAMES)
        exits = {name: value for name, value in options.items() if name in CONFIG_NAMES}
        decoding = {name: value for name, value in options.items() if name not in CONFIG_NAMES}
        if task != "captioning" and decoding:
            raise ValueError(
                f"`options` of {task} must be exit options, got {sorted(decoding)}; answers are not generated."
            )
        self.model, self.processor, self.task, self.options = model, processor, task, options
        self.columns, self.batch_size = columns, batch_size
        self.flops = FlopCount(model, exits, decoding)
        if task == "captioning":
            self.result, self.options = "caption", one_caption(options)
            return
        if answers is None and task == "vqa":
            raise ValueError("`answers` must be given for vqa, got None; pass those to choose from.")
        self.result = "answer"
        self.answers = list(processor.entailment_answers.values()) if answers is None else list(answers)
        self.answer_ids = processor.encode_answers(self.answers)

    def rehearse(self) -> None:
        """One grey image, so that what the model refuses is refused before work is done."""
        texts = {"entailment": {"hypothesis": "a"}, "vqa": {"text": "a"}}.get(self.task, {})
        image = Image.new("RGB", (64, 64), "grey")
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0].numpy()
        training = self.model.training
        self.model.eval()
        try:
            self.run([(Row(0, None, texts=texts), pixels)], Counter())
        finally:
            self.model.train(training)

    def records(self, rows: Iterable[Row], decoders: "_Decoders", totals: Counter) -> Iterator[list[dict[str, Any]]]:
        """Results in order, as many at a time as have become ready."""
        training = self.model.training
        self.model.eval()
        done: dict[int, dict[str, Any]] = {}
        groups: dict[tuple[int, ...], list[tuple[int, Row, np.ndarray]]] = {}
        first = 0

        def run(shape: tuple[int, ...]) -> None:
            group = groups.pop(shape)
            records = self.guarded([(row, pixels) for _, row, pixels in group], totals)
            done.update((position, record) for (position, _, _), record in zip(group, records, strict=True))

        try:
            checked = (self.checked(row) for row in rows)
            for position, (row, pixels) in enumerate(decoders.decoded(checked, self.batch_size)):
                if isinstance(pixels, str):
                    done[position] = self.record(row, None, pixels)
                else:
                    group = groups.setdefault(pixels.shape, [])
                    group.append((position, row, pixels))
                    if len(group) == self.batch_size:
                        run(pixels.shape)
                # The first group has waited longest; the others wait for it.
                if groups and position - first >= WAITING * self.batch_size:
                    run(next(iter(groups)))
                while first in done:
                    ready = []
                    while first in done:
                        ready.append(done.pop(first))
                        first += 1
                    yield self.counted(ready, totals)
            while groups:
                run(next(iter(groups)))
            if done:
                yield self.counted([done[position] for position in sorted(done)], totals)
        finally:
            decoders.close()
            self.model.train(training)

    def counted(self, records: list[dict[str, Any]], totals: Counter) -> list[dict[str, Any]]:
        totals.update(rows=len(records), bad=sum(record["error"] is not None for record in records))
        return records

    def checked(self, row: Row) -> Row:
        """The row, with a fault if its texts cannot be used."""
        if row.fault is None and self.task != "captioning":
            try:
                self.encoded([row])
            except ValueError as error:
                return Row(row.number, None, row.name, row.texts, row.fields, str(error))
        return row

    def encoded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The model's inputs of the texts."""
        if self.task == "captioning":
            return dict(self.processor(text=[CAPTION_PROMPT] * len(rows)))
        names = ("hypothesis", "premise") if self.task == "entailment" else ("text",)
        return dict(self.processor(task=self.task, **{name: [row.texts.get(name) for row in rows] for name in names}))

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
        rows = [row for row, _ in batch]
        inputs = self.encoded(rows) | {"pixel_values": torch.from_numpy(np.stack([pixels for _, pixels in batch]))}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        shape, text_tokens = inputs["pixel_values"].shape[1:], inputs["attention_mask"].sum(1).tolist()
        if self.task == "captioning":
            call = partial(self.model.generate, **inputs, **self.options, return_dict_in_generate=True)
            output, seconds = timed(call, self.model.device)
            results = self.processor.post_process_image_text_to_text(output.sequences)
        else:
            call = partial(self.model.score_answers, self.answer_ids, **inputs, **self.options, return_dict=True)
            output, seconds = timed(call, self.model.device)
            results = [self.answers[best] for best in output.scores.argmax(1).tolist()]
        records = []
        for index, (row, depths) in enumerate(zip(rows, read_depths(output), strict=True)):
            facts: dict[str, Any] = {
                "image_exit_layers": depths.image_exit_layers,
                "text_exit_layers": depths.text_exit_layers,
                "decoder_exit_layers": list(depths.decoder_exit_layers),
                "layers_skipped": layers_skipped(self.model.config, depths),
                "seconds": seconds / len(rows),
                "batch_size": len(rows),
            }
            if self.task == "captioning":
                ran, full = (sum(part.values()) for part in self.flops(shape, text_tokens[index], depths))
                facts["flops_skipped"] = 1 - ran / full
            else:
                full = 1.0
                ran = 1 - facts["layers_skipped"]
                facts["scores"] = output.scores[index].tolist()
            totals.update(ran=ran, full=full)
            records.append(self.record(row, results[index], None, facts))
        return records

    def record(
        self, row: Row, result: str | None, error: str | None, facts: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        asked = {name: (facts or {}).get(name) for name in self.columns}
        return {"row": row.number, "image": row.name, **row.fields, self.result: result, "error": error, **asked}


def _decode(image_processor: Any, image: Any) -> np.ndarray | str:
    """Pixels [3, height, width] of an image, or why there are none."""
    try:
        return image_processor(load_image(image), return_tensors="pt")["pixel_values"][0].numpy()
    except ValueError as error:
        return str(error)
    # Whatever a file does to the libraries that read it, the run goes on.
    except Exception as error:
        return f"`image` must be one that can be decoded, got {type(error).__name__}: {error}."


class _Decoders:
    """Processes that decode images, or, with 0 workers, this one."""

    def __init__(self, decode: Callable[[Any], np.ndarray | str], workers: int) -> None:
        self.decode, self.workers = decode, workers
        self.pool = _pool(workers) if workers else None

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def decoded(self, rows: Iterable[Row], batch_size: int) -> Iterator[tuple[Row, np.ndarray | str]]:
        """Each row with its pixels, or with what is wrong, in order; one batch is decoded while another runs."""
        if self.pool is None:
            for row in rows:
                yield row, row.fault or self.decode(row.image)
            return
        rows = iter(rows)
        ahead: deque[tuple[Row, Future]] = deque()
        while True:
            while len(ahead) < batch_size + 2 * self.workers and (row := next(rows, None)) is not None:
                ahead.append((row, self._submit(row)))
            if not ahead:
                return
            row, future = ahead.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                # A process died, killed from outside or by an image: this row runs alone, the others again.
                self.close()
                result = self._alone(row)
                self.pool = _pool(self.workers)
                ahead = deque((waiting, self._submit(waiting)) for waiting, _ in ahead)
            yield row, result

    def _submit(self, row: Row) -> Future:
        try:
            if row.fault is None and self.pool is not None:
                return self.pool.submit(self.decode, row.image)
            future: Future = Future()
            future.set_result(row.fault)
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
        return future

    def _alone(self, row: Row) -> np.ndarray | str:
        with _pool(1) as pool:
            try:
                return pool.submit(self.decode, row.image).result()
            except BrokenProcessPool:
                return "`image` must be one that can be decoded, got a crash of the process that decoded it."


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forking a process that runs torch's threads may hang; a server that has only imported what workers need forks
    # them at once, where there is one.
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    else:
        context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool as error:
        raise ValueError(
            "`workers` cannot be started; in a script of your own put the code under "
            '`if __name__ == "__main__":`, or pass `workers=0`.'
        ) from error
    return pool


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of a terminal; the parent's word counts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers to end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def bulk_settings(
    model: MuEForConditionalGeneration,
    *,
    task: str,
    answers: Sequence[str] | None,
    options: Mapping[str, Any],
    columns: Sequence[str],
    **others: Any,
) -> dict[str, Any]:
    """All that the rows of a run depend on: what a [`Journal`] compares. The model counts by its weights."""
    return {
        "task": task,
        "answers": None if answers is None else list(answers),
        "options": dict(options),
        "columns": list(columns),
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype),
        **others,
    }


def bulk_to_file(
    journal: Journal,
    rows: Iterable[Row],
    process: Callable[[Iterator[Row], Counter], Iterator[dict[str, Any]]],
    *,
    total: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Works off the rows that a journal lacks, and makes its file of them.

    Args:
        journal ([`Journal`]): entered.
        rows (iterable of [`Row`]): all rows of the source.
        process (`Callable`): (rows, totals) to results, as [`bulk_rows`] makes them.
        total (`int`, *optional*): number of rows, for the bar.
        batch_size (`int`, *optional*, defaults to 16): results that are written at once.
        progress (`bool`, *optional*, defaults to `True`): whether a bar with rows per second and the share of compute
            that exits saved is shown.

    Returns:
        `dict`: "out", "rows" and "bad" of the whole file; of this run "new_rows", "seconds", "rows_per_second" and
        "compute_skipped" (None where nothing ran).

    Raises:
        ValueError: if the source has no rows, or does not begin with those that are done.
    """
    totals: Counter = Counter()
    start = time.perf_counter()
    if not journal.complete:
        results = process(journal.remaining(rows), totals)
        # Without the start of the workers.
        start = time.perf_counter()
        with tqdm(total=total, initial=journal.counts["rows"], unit=" images", disable=not progress) as bar:
            written: list[dict[str, Any]] = []
            for record in results:
                written.append(record)
                if len(written) == batch_size:
                    _write(journal, written, totals, bar)
            _write(journal, written, totals, bar)
        if not journal.counts["rows"]:
            raise ValueError("`source` must have rows, got none; check it.")
        journal.finish({"run": _speed(totals, start)})
    return {"out": str(journal.out), **journal.counts, **_speed(totals, start)}


def _write(journal: Journal, written: list[dict[str, Any]], totals: Counter, bar: tqdm) -> None:
    journal.append(written)
    skipped = _skipped(totals)
    bar.set_postfix(
        {"skipped": "-" if skipped is None else f"{skipped:.0%}", "bad": journal.counts["bad"]}, refresh=False
    )
    bar.update(len(written))
    written.clear()


def _skipped(totals: Counter) -> float | None:
    return 1 - totals["ran"] / totals["full"] if totals["full"] else None


def _speed(totals: Counter, start: float) -> dict[str, Any]:
    seconds = time.perf_counter() - start
    return {
        "new_rows": totals["rows"],
        "seconds": seconds,
        "rows_per_second": totals["rows"] / seconds,
        "compute_skipped": _skipped(totals),
    }


__all__ = [
    "ANSWER_COLUMNS",
    "CAPTION_COLUMNS",
    "COLUMNS",
    "TASKS",
    "bulk_rows",
    "bulk_settings",
    "bulk_to_file",
]
