"""The processes of one run, as `accelerate launch` or `torchrun` start them: who does what, and who learns of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: which one it is (`index`), of how many (`count`), and the `device` where it
    runs the model. They pass each other Python objects through the CPU, so that one may work for hours while others
    wait."""

    index: int
    count: int
    device: str

    @classmethod
    def start(cls, device: str) -> "Processes":
        """Finds the others if the run has any; "cuda" then stands for one GPU each."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        return cls(dist.get_rank(), count, f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.index == 0

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives in the main process, where alone it is called; in all of them."""
        made: list[Any] = [make() if self.is_main else None]
        if self.count > 1:
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def part(self, total: int) -> range:
        """The places of `total` that are this process's: neighbours, in the order of the processes."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in their order; in all of them."""
        if self.count == 1:
            return items
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others do what is inside after the main process, and find what it left on disk."""
        if not self.is_main:
            dist.barrier()
        yield
        if self.is_main and self.count > 1:
            dist.barrier()


def finish_processes() -> None:
    """Waits for the other processes of the run, if there are any, and parts from them: the last call of a program that
    had no error. One that just ends may be aborted for threads that it leaves behind, or leave the others hanging."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


__all__ = ["Processes", "finish_processes"]
