"""Several data sets as one, mixed by share in whole batches, in an order that a resumed run finds again."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import Dataset


class Mixture(Dataset):
    """Batches of several data sets in turn, each of rows of one of them alone, so that rows may differ in form.

    A data set gives every row once, then every row again in another order. What comes at a place follows from the
    seed, with what a row draws by torch, such as the view of an image: read it in order
    (`train_sampling_strategy="sequential"`), and a resumed run goes on with the next rows. (What a collator draws does
    not: batches are made one ahead, so that a resumed run has other random numbers for its first one.)

    Args:
        parts (sequence of data sets of known length): what to mix.
        shares (sequence of `float`): the share of the batches that each part gives; they sum to 1. At every point the
            parts have given their shares to within a batch, with five parts and more to within two.
        batch_size (`int`): rows of a batch on one device.
        num_batches (`int`): batches until the end, over all devices.
        seed (`int`, *optional*, defaults to 0): of the order.

    Raises:
        ValueError: if shares do not fit the parts or do not sum to 1, a part that has a share is empty or has no
            length, or a number is not at least 1.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        shares: Sequence[float],
        *,
        batch_size: int,
        num_batches: int,
        seed: int = 0,
    ):
        check_shares(shares, len(parts))
        for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
            if share and not hasattr(part, "__len__"):
                kind = type(part).__name__
                raise ValueError(f"`parts[{number}]` must have a length, got {kind}; load it without streaming.")
            if share and len(part) == 0:
                raise ValueError(f"`parts[{number}]` must have rows, got none for a share of {share}; drop it.")
        for name, value in (("batch_size", batch_size), ("num_batches", num_batches)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}; pass more.")
        self.parts, self.batch_size, self.num_batches, self.seed = parts, batch_size, num_batches, seed
        self.turns = _turns(shares, num_batches)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch, place = divmod(index, self.batch_size)
        part, turn = self.turns[batch]
        rows = self.parts[part]
        epoch, position = divmod(turn * self.batch_size + place, len(rows))
        row = _order(self.seed, part, epoch, len(rows))[position]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{self.seed}/{index}").getrandbits(63))
            return rows[row]


def check_shares(shares: Sequence[float], count: int) -> None:
    """ValueError unless there are `count` shares in [0, 1] that sum to 1."""
    if len(shares) != count or any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"`shares` must hold one share in [0, 1] for each of {count} sources, got {list(shares)}.")
    if not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"`shares` must sum to 1, got {list(shares)}, which sum to {sum(shares):g}; scale them.")


def _turns(shares: Sequence[float], count: int) -> list[tuple[int, int]]:
    """For each batch its part, and how many batches that part gave before: next is the one furthest behind."""
    given, turns = [0] * len(shares), []
    for batch in range(count):
        behind = [share * (batch + 1) - done for share, done in zip(shares, given, strict=True)]
        part = max(range(len(shares)), key=behind.__getitem__)
        turns.append((part, given[part]))
        given[part] += 1
    return turns


@lru_cache(maxsize=16)
def _order(seed: int, part: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"{seed}/{part}/{epoch}").sample(range(count), count)


__all__ = ["Mixture", "check_shares"]
