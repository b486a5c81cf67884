"""Processes that decode images for bulk work, a batch ahead of the model; an image that crashes one costs its row."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from threading import Thread
from typing import Any

import numpy as np
import torch

from ..model.images_mue import load_image
from .sources import Row


class Decoders:
    """Decodes the images of rows in `workers` processes; with 0 this one does.

    Raises:
        ValueError: if processes cannot be started here.
    """

    def __init__(self, image_processor: Callable, workers: int) -> None:
        self.decode: Callable[[Any], np.ndarray | str] = partial(_decode, image_processor)
        self.workers = workers
        self.pool = _pool(workers) if workers else None

    def close(self) -> None:
        """Ends the processes."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def decoded(self, rows: Iterable[Row], batch_size: int) -> Iterator[tuple[Row, np.ndarray | str]]:
        """Each row with its pixels [3, height, width], or with what is wrong, in order; one batch is decoded while
        another runs."""
        if self.pool is None:
            for row in rows:
                yield row, row.fault or self.decode(row.image)
            return
        rows = iter(rows)
        ahead: deque[tuple[Row, Future]] = deque()
        while True:
            more = islice(rows, batch_size + 2 * self.workers - len(ahead))
            ahead.extend((row, self._submit(row)) for row in more)
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
        future: Future = Future()
        try:
            if row.fault is None and self.pool is not None:
                return self.pool.submit(self.decode, row.image)
            future.set_result(row.fault)
        except BrokenProcessPool as error:
            future.set_exception(error)
        return future

    def _alone(self, row: Row) -> np.ndarray | str:
        with _pool(1) as pool:
            try:
                return pool.submit(self.decode, row.image).result()
            except BrokenProcessPool:
                return "`image` must be one that can be decoded, got a crash of the process that decoded it."


def _decode(image_processor: Callable, image: Any) -> np.ndarray | str:
    try:
        return image_processor(load_image(image), return_tensors="pt")["pixel_values"][0].numpy()
    except ValueError as error:
        return str(error)
    # Whatever a file does to the libraries that read it, the run goes on.
    except Exception as error:
        return f"`image` must be one that can be decoded, got {type(error).__name__}: {error}."


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forking a process that runs torch's threads may hang; a server that has only imported what workers need forks
    # them at once, where there is one.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
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


__all__ = ["Decoders"]
