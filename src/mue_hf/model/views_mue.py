"""Which decoder tokens, and which images, a layer call is about."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class ImageView:
    """Which image each decoder row belongs to, and how rows of one image are folded into its query length.

    Args:
        rows (`LongTensor` [rows] on the CPU, *optional*): rows of the batch in ascending order; all by default.
        num_rows, num_images (`int`): rows of the whole batch and images; row r belongs to image
            r // (num_rows // num_images).

    Attributes:
        images (`LongTensor`, *optional*): the images that still have rows; None for all.
        rows_per_image (`int`): places that the folded queries have for rows of an image.
        runs (list of (query slice, image slice)): neighbouring images, so that their keys are sliced, not copied.
    """

    def __init__(self, rows: Tensor | None, num_rows: int, num_images: int):
        group = num_rows // num_images
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        if rows is None:
            self.images, self.index, self.rows_per_image = None, None, group
            self.runs = [(slice(None), slice(None))]
            self.count = num_images
            return
        self.images, inverse, counts = torch.unique_consecutive(rows // group, return_inverse=True, return_counts=True)
        self.count, self.rows_per_image = len(self.images), int(counts.max())
        place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[inverse]
        self.index = None if len(rows) == self.count * self.rows_per_image else (inverse, place)
        self.runs = self._neighbours(self.images)

    @staticmethod
    def _neighbours(images: Tensor) -> list[tuple[slice, slice]]:
        cuts = [0, *((images[1:] - images[:-1] != 1).nonzero().flatten() + 1).tolist(), len(images)]
        first = images.tolist()
        return [(slice(a, b), slice(first[a], first[a] + b - a)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

    def fold_bias(self, bias: Tensor, mask: Tensor | None) -> Tensor:
        """An additive bias [heads, tokens, source] or [rows, heads, tokens, source] as the folded queries need it,
        [images or 1, heads, folded tokens or 1, source], with what mask [all images, source] hides filled in."""
        if bias.dim() == 4:
            bias = self.fold(bias)
        elif bias.shape[1] > 1:
            bias = bias.unsqueeze(1).expand(-1, self.rows_per_image, -1, -1).flatten(1, 2).unsqueeze(0)
        else:
            # one token: the singleton broadcasts over the folded rows
            bias = bias.unsqueeze(0)
        if mask is None:
            return bias
        mask = mask if self.images is None else mask[self.images]
        return bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)

    def fold(self, states: Tensor) -> Tensor:
        """[rows, heads, tokens, x] -> [images, heads, rows_per_image * tokens, x]; a missing row has zeros."""
        rows, heads, tokens, width = states.shape
        if self.index is not None:
            places = states.new_zeros(self.count, self.rows_per_image, heads, tokens, width)
            states = places.index_put(self.index, states)
        states = states.reshape(self.count, self.rows_per_image, heads, tokens, width)
        return states.transpose(1, 2).flatten(2, 3)

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """The row in each slot of an image [images, rows_per_image], the first one where a slot is free; and the slot
        of each row [rows]."""
        slots = torch.arange(self.count * self.rows_per_image)
        if self.index is None:
            return slots.view(self.count, self.rows_per_image), slots
        slot = self.index[0] * self.rows_per_image + self.index[1]
        rows = torch.zeros_like(slots).index_put_((slot,), torch.arange(len(slot)))
        return rows.view(self.count, self.rows_per_image), slot

    def places(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Folding and its way back by look-ups, for an engine, of so many tokens a row: the token of each query of an
        image [images, rows_per_image * tokens], counted over all rows, any where a slot is free; and the place of each
        token [rows, tokens], counted over all queries."""
        if tokens not in self._places:
            each = torch.arange(tokens)
            fold, unfold = (slots.unsqueeze(-1) * tokens + each for slots in self.slots)
            self._places[tokens] = fold.flatten(1), unfold
        return self._places[tokens]

    def unfold(self, states: Tensor) -> Tensor:
        """[images, rows_per_image * tokens, d] -> [rows, tokens, d]."""
        states = states.unflatten(1, (self.rows_per_image, -1))
        return states.flatten(0, 1) if self.index is None else states[self.index]

    def unfold_weights(self, weights: tuple[Tensor | None, ...]) -> Tensor | None:
        """[images, heads, rows_per_image * tokens, source] of all runs -> [rows, heads, tokens, source]."""
        if weights[0] is None:
            return None
        states = torch.cat(weights) if len(weights) > 1 else weights[0]
        if self.rows_per_image == 1:
            return states
        states = states.unflatten(2, (self.rows_per_image, -1)).transpose(1, 2)
        return states.flatten(0, 1) if self.index is None else states[self.index]


class TokenView:
    """Which decoder tokens a layer call is about: new ones, and earlier ones of the same rows that skipped the layer.

    Args:
        rows (`LongTensor` [rows] on the CPU, *optional*): rows of the batch in ascending order; all by default.
        new (`slice`): places of the new tokens in the sequence.
        filled (`LongTensor` [rows], *optional*): the place of the first token of each row; by default all are new.

    Attributes:
        positions (`slice` or `LongTensor` [tokens, 1]): one range where rows begin at the same place. Otherwise each
            token is a row of the call by itself, so that nothing is padded, and `rows` [tokens] repeats its row.
        past (`int`): how many positions come before them, in the row that has most.
        fold (`ImageView`, *optional*): then, how tokens of a row are folded for the self-attention, as rows of an
            image are for the cross-attention.
        keys_of (`LongTensor` [rows], *optional*): then, `rows` as they were: those whose keys are attended to.
    """

    def __init__(self, rows: Tensor | None, new: slice, filled: Tensor | None = None):
        self.rows, self.new = rows, new
        self.positions: slice | Tensor = new
        self.fold: ImageView | None = None
        self.keys_of: Tensor | None = None
        # how many earlier tokens each row has, or where in the call the earlier and the new tokens are
        self.num_older, self.past = 0, new.start
        self.places: tuple[Tensor, Tensor] | None = None
        self._own: Tensor | None = None
        if filled is None:
            return
        first = int(filled[0])
        if bool((filled == first).all()):
            self.num_older, self.positions, self.past = new.start - first, slice(first, new.stop), first
            return
        self.filled, self.past = filled, int(filled.max())
        counts = new.stop - filled
        place = torch.arange(len(filled)).repeat_interleave(counts)
        self.keys_of = torch.arange(len(filled)) if rows is None else rows
        self.rows, self.fold = self.keys_of[place], ImageView(place, len(filled), len(filled))
        positions = torch.arange(len(self.rows)) + (new.stop - counts.cumsum(0)).repeat_interleave(counts)
        self.positions = positions.unsqueeze(1)
        older = positions < new.start
        self.places = older.nonzero().flatten(), (~older).nonzero().flatten()

    def own(self, num_rows: int, num_tokens: int) -> Tensor:
        """The tokens of the call [num_rows, tokens], counted over all rows, whose keys each row has behind those of
        its `past`: its own, and where tokens are rows, those of the same row, and any where that has fewer than
        others."""
        if self._own is None and self.fold is None:
            self._own = torch.arange(num_rows * num_tokens).view(num_rows, num_tokens)
        elif self._own is None:
            self._own = self.fold.slots[0][self.fold.slots[1] // self.fold.rows_per_image]
        return self._own

    @cached_property
    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where tokens are rows: the position of each key [tokens, past + own], whether it is that of no token of the
        row [tokens, past + own], and the place of the token's own key [tokens]."""
        own, slots = self.own(0, 0), self.fold.slots[1]
        past = torch.arange(self.past).expand(len(own), -1)
        row, slot = slots // self.fold.rows_per_image, slots % self.fold.rows_per_image
        counts = torch.bincount(row)[row]
        absent = [past >= self.filled[row, None], torch.arange(own.shape[1]) >= counts[:, None]]
        return torch.cat([past, self.positions[own, 0]], dim=1), torch.cat(absent, dim=1), self.past + slot

    @property
    def older_index(self) -> tuple[Any, Any]:
        """The earlier tokens as an index into [all rows, positions]."""
        if self.places is None:
            rows = slice(None) if self.rows is None else self.rows
            return rows, slice(self.new.start - self.num_older, self.new.start)
        return self.rows[self.places[0]], self.positions[self.places[0], 0]

    def join(self, older: Tensor, new: Tensor) -> Tensor:
        """States of the earlier tokens, as `older_index` takes them, and of the new ones [rows, tokens, d] -> of all,
        as the call takes them."""
        if self.places is None:
            return torch.cat([older, new], dim=1)
        joined = new.new_empty(len(self.rows), new.shape[2])
        joined[self.places[0]], joined[self.places[1]] = older, new.flatten(0, 1)
        return joined.unsqueeze(1)

    def older_of(self, states: Tensor) -> Tensor:
        """What `join` put together, or a layer made of it -> the earlier tokens' part."""
        return states[:, : self.num_older] if self.places is None else states[self.places[0], 0]

    def new_of(self, states: Tensor) -> Tensor:
        """The new tokens' part [rows, tokens, ...]."""
        if self.places is None:
            return states[:, self.num_older :]
        return states[self.places[1]].reshape(-1, self.new.stop - self.new.start, *states.shape[2:])


__all__ = ["ImageView", "TokenView"]
