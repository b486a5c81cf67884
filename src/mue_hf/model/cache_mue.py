"""The decoder's KV cache: self-attention keys and values that stay complete when tokens skip layers, and those of the
cross-attention once per image."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from .views_mue import TokenView

Project = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class MuECacheLayer:
    """What the cache holds for one layer; None where nobody has reached it yet.

    Args:
        keys, values (`Tensor` [rows, heads, positions, head dim]): of the self-attention, with or without room for
            more positions.
        filled (`LongTensor` [rows]): how many leading positions of each row have them.
        cross_keys, cross_values (`Tensor` [images, heads, source, head dim]): of the encoder's output.
        ready (`BoolTensor` [images]): which images have them.
        complete (`bool`): whether all have.
    """

    is_compileable: ClassVar[bool] = False
    is_croppable: ClassVar[bool] = True

    keys: Tensor | None = None
    values: Tensor | None = None
    filled: Tensor | None = None
    cross_keys: Tensor | None = None
    cross_values: Tensor | None = None
    ready: Tensor | None = None
    complete: bool = False


class MuECache(Cache):
    """Cache of a `MuEForConditionalGeneration`'s decoder, static or growing.

    A token that exited at depth l has keys and values in layers 1..l. A deeper layer makes up for them when a row
    first reaches it, by one of three policies, so that no layer ever attends to holes:

    * "project": the exit state goes through the layer's own norm and projections (state propagation as in CALM);
    * "copy": the exit layer's keys and values are reused;
    * "exact": the layer runs on the tokens that miss it, in the call of the new ones; the numbers are those of full
      depth.

    Gradients flow through the tokens of the current call, not into earlier calls.

    Args:
        config (`MuEConfig`): the model's configuration.
        max_length (`int`, *optional*): positions to allocate at once; more are added when needed.
        kv_policy (`str`, defaults to "project"): see above.
    """

    def __init__(self, config: Any, max_length: int | None = None, kv_policy: str = "project"):
        self.kv_policy = kv_policy
        self.capacity = max_length or 32
        self.num_layers = config.decoder_layers
        # what the decoder keeps across steps: position biases that no row owns
        self.tables: dict[Any, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens and images."""
        self.length = 0
        self.num_rows: int | None = None
        self.layers = [MuECacheLayer() for _ in range(self.num_layers)]
        # exit states [rows, capacity, d] and depths [rows, capacity] of tokens that skipped layers
        self.states: Tensor | None = None
        self.depths: Tensor | None = None
        self.tables.clear()

    def begin(self, num_rows: int, num_tokens: int) -> None:
        """Makes room for `num_tokens` more positions of each of `num_rows` rows.

        Raises:
            ValueError: if the cache holds another number of rows.
        """
        if self.num_rows is not None and self.num_rows != num_rows:
            raise ValueError(
                f"`cache` holds {self.num_rows} rows, but `decoder_input_ids` has {num_rows}; "
                "pass the rows the cache was filled with, or a new cache."
            )
        self.num_rows = num_rows
        if self.length + num_tokens > self.capacity:
            self.capacity = max(self.length + num_tokens, 2 * self.capacity)
            self.tables.clear()
            if self.states is not None:
                self.states, self.depths = self._grown(self.states, 1), self._grown(self.depths, 1)

    def _grown(self, old: Tensor, dim: int) -> Tensor:
        shape = list(old.shape)
        shape[dim] = self.capacity
        new = old.new_zeros(shape)
        new.narrow(dim, 0, old.shape[dim]).copy_(old)
        return new

    def _with_room(self, layer_idx: int, keys: Tensor) -> MuECacheLayer:
        """The layer with room for all positions, allocated like keys [any, heads, ..., head dim] if nobody has reached
        it yet."""
        layer = self.layers[layer_idx]
        if layer.keys is None:
            shape = (self.num_rows, keys.shape[1], self.capacity, keys.shape[-1])
            layer.keys, layer.values = keys.new_zeros(shape), keys.new_zeros(shape)
            layer.filled = torch.zeros(self.num_rows, dtype=torch.long)
        elif layer.keys.shape[2] < self.capacity:
            layer.keys, layer.values = self._grown(layer.keys, 2), self._grown(layer.values, 2)
        return layer

    def update_self(
        self, layer_idx: int, keys: Tensor, values: Tensor, view: TokenView, project: Project
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values [rows, heads, tokens, head dim] of the view's tokens; returns those of the rows'
        whole prefix, which policies "project" and "copy" complete first for tokens that skipped this layer.

        Args:
            project (`Callable`): states [rows, tokens, d] -> the layer's self-attention keys and values.
        """
        rows, positions = view.rows, view.positions
        self._complete(layer_idx, rows, project)
        layer, index = self._with_room(layer_idx, keys), slice(None) if rows is None else rows
        if not isinstance(positions, slice):
            layer.keys[rows, :, positions[:, 0]] = keys.detach().squeeze(2)
            layer.values[rows, :, positions[:, 0]] = values.detach().squeeze(2)
            index = view.keys_of
            return layer.keys[index, :, : view.new.stop], layer.values[index, :, : view.new.stop]
        layer.keys[index, :, positions] = keys.detach()
        layer.values[index, :, positions] = values.detach()
        if positions.start == 0:
            return keys, values
        return layer.keys[index, :, : positions.stop], layer.values[index, :, : positions.stop]

    def past_self(self, layer_idx: int, view: TokenView, project: Project) -> tuple[Tensor, Tensor] | None:
        """Keys and values [rows, heads, past, head dim] of the positions before the view's tokens, completed as
        `update_self` does, None without any: for a layer that puts those of the tokens behind them by itself."""
        self._complete(layer_idx, view.rows, project)
        layer = self.layers[layer_idx]
        if layer.keys is None:
            return None
        if view.past == layer.keys.shape[2] and view.rows is None:
            return layer.keys, layer.values
        keys, values = layer.keys[:, :, : view.past], layer.values[:, :, : view.past]
        if view.rows is None:
            return keys, values
        return keys.index_select(0, view.rows), values.index_select(0, view.rows)

    def extend_self(self, layer_idx: int, keys: Tensor, values: Tensor, view: TokenView) -> None:
        """Stores what a layer made of `past_self`: keys and values [rows, heads, past and new, head dim]."""
        layer, positions = self.layers[layer_idx], view.positions
        if view.rows is None:
            layer.keys, layer.values = keys, values
            if layer.filled is None:
                layer.filled = torch.zeros(self.num_rows, dtype=torch.long)
            return
        layer = self._with_room(layer_idx, keys)
        if isinstance(positions, slice):
            new: Any = (slice(None), slice(None), slice(view.past, None))
        else:
            positions, new = positions[:, 0], (torch.arange(len(keys)), slice(None), view.keys[2])
        layer.keys[view.rows, :, positions], layer.values[view.rows, :, positions] = keys[new], values[new]

    def cross(self, layer_idx: int, project: Project, states: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values [all images, heads, source, head dim] of a layer, made for an image when one
        of its rows first gets there."""
        layer, count = self.layers[layer_idx], states.shape[0]
        if layer.complete:
            return layer.cross_keys, layer.cross_values
        if images is None and layer.ready is None:
            layer.cross_keys, layer.cross_values = (x.contiguous() for x in project(states))
            layer.complete = True
            return layer.cross_keys, layer.cross_values
        if layer.ready is None:
            layer.ready = torch.zeros(count, dtype=torch.bool)
        wanted = torch.arange(count) if images is None else images
        missing = wanted[~layer.ready[wanted]]
        if len(missing):
            keys, values = project(states[missing])
            if layer.cross_keys is None:
                layer.cross_keys = keys.new_zeros(count, *keys.shape[1:])
                layer.cross_values = values.new_zeros(count, *values.shape[1:])
            layer.cross_keys[missing], layer.cross_values[missing] = keys, values
            layer.ready[missing] = True
            layer.complete = bool(layer.ready.all())
        return layer.cross_keys, layer.cross_values

    # --- tokens that skipped layers --------------------------------------------------------------------------------

    def record(self, states: Tensor, depths: Tensor | None) -> None:
        """Ends a call: its tokens' exit states [rows, tokens, d] and the layers that each row ran [rows], None for all
        of them."""
        start, self.length = self.length, self.length + states.shape[1]
        for i, layer in enumerate(self.layers):
            if layer.filled is not None:
                layer.filled[slice(None) if depths is None else depths > i] = self.length
        if depths is None:
            return
        early = (depths < self.num_layers).nonzero().flatten()
        if not len(early):
            return
        if self.states is None:
            self.states = states.new_zeros(self.num_rows, self.capacity, states.shape[2])
            self.depths = torch.full((self.num_rows, self.capacity), self.num_layers)
        self.states[early, start : self.length] = states[early].detach()
        self.depths[early, start : self.length] = depths[early].unsqueeze(1)

    def _filled(self, layer_idx: int, rows: Tensor | None) -> Tensor:
        """How many leading positions of each of `rows` the layer has keys and values for [rows]."""
        filled = self.layers[layer_idx].filled
        if filled is None:
            return torch.zeros(self.num_rows if rows is None else len(rows), dtype=torch.long)
        return filled if rows is None else filled[rows]

    def _complete(self, layer_idx: int, rows: Tensor | None, project: Project) -> None:
        """Policies "project" and "copy": keys and values of the tokens of `rows` that skipped the layer."""
        if self.states is None or self.kv_policy == "exact":
            return
        filled = self._filled(layer_idx, rows)
        incomplete = filled < self.length
        if not incomplete.any():
            return
        rows, filled = (torch.arange(self.num_rows) if rows is None else rows)[incomplete], filled[incomplete]
        missing = (torch.arange(self.length) >= filled.unsqueeze(1)).nonzero()
        row, position = rows[missing[:, 0]], missing[:, 1]
        if self.kv_policy == "copy":
            keys, values = self._copied(row, position)
        else:
            keys, values = (x.squeeze(0).transpose(0, 1) for x in project(self.states[row, position].unsqueeze(0)))
        layer = self._with_room(layer_idx, keys)
        layer.keys[row, :, position], layer.values[row, :, position] = keys.detach(), values.detach()
        layer.filled[rows] = self.length

    def _copied(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values [tokens, heads, head dim] of each token's exit layer."""
        source = self.depths[row, position] - 1
        first = self.layers[int(source[0])].keys
        keys, values = (first.new_empty(len(row), first.shape[1], first.shape[3]) for _ in range(2))
        for i in source.unique().tolist():
            of = source == i
            keys[of] = self.layers[i].keys[row[of], :, position[of]]
            values[of] = self.layers[i].values[row[of], :, position[of]]
        return keys, values

    def skipped(self, layer_idx: int, rows: Tensor | None) -> Tensor | None:
        """Policy "exact": from which position on each of `rows` has to run a layer [rows], since earlier tokens
        skipped it; None where no row misses any."""
        if self.kv_policy != "exact" or self.states is None:
            return None
        filled = self._filled(layer_idx, rows)
        return filled.clone() if bool((filled < self.length).any()) else None

    def with_skipped(self, states: Tensor, tokens: TokenView) -> Tensor:
        """The states [rows, tokens, d] of new tokens, and those of the view's earlier ones: what the layer runs on."""
        return tokens.join(self.states[tokens.older_index], states)

    def keep_skipped(self, layer_idx: int, states: Tensor, tokens: TokenView) -> None:
        """Stores what the layer made of the view's earlier tokens, which the next layer starts from."""
        self.states[tokens.older_index] = tokens.older_of(states).detach()
        self.depths[tokens.older_index] = layer_idx + 1
        self.layers[layer_idx].filled[slice(None) if tokens.rows is None else tokens.rows] = self.length

    # --- what `generate` asks of a cache ---------------------------------------------------------------------------

    def for_same_images(self) -> "MuECache":
        """An empty cache of other tokens of the same rows, which shares what belongs to images and positions."""
        other = copy(self)
        other.length, other.states, other.depths = 0, None, None
        other.layers = [replace(layer, keys=None, values=None, filled=None) for layer in self.layers]
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r continues as row beam_idx[r] did. Beams stay with their image, so cross-attention keys stay put."""
        self._select(beam_idx.cpu())

    def _select(self, index: Tensor) -> None:
        if self.num_rows is None or torch.equal(index, torch.arange(self.num_rows)):
            return
        same_size = len(index) == self.num_rows
        for layer in self.layers:
            if layer.keys is not None:
                layer.keys, layer.values = (self._selected(x, index, 2, same_size) for x in (layer.keys, layer.values))
                layer.filled = layer.filled[index]
        if self.states is not None:
            self.states = self._selected(self.states, index, 1, same_size)
            self.depths = self.depths[index]
        self.num_rows = len(index)

    def _selected(self, old: Tensor, index: Tensor, dim: int, same_size: bool) -> Tensor:
        # only the positions in use are moved
        length = min(self.length, old.shape[dim])
        used = old.narrow(dim, 0, length).index_select(0, index.to(old.device))
        if length == old.shape[dim]:
            return used
        new = old if same_size else old.new_zeros(len(index), *old.shape[1:])
        new.narrow(dim, 0, length).copy_(used)
        return new

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row, as many times for each image."""
        if self.num_rows is not None:
            self._select(torch.arange(self.num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError("MuECache keeps the rows of an image together; select rows before the first call instead.")

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` positions of every row."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be negative or 0 (how many to cut off), got {tokens_to_remove}; negate it."
            )
        self.length = max(self.length + tokens_to_remove, 0)
        for layer in self.layers:
            if layer.filled is not None:
                layer.filled.clamp_(max=self.length)
        if self.depths is not None:
            self.depths[:, self.length :] = self.num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of decoder positions held."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def __repr__(self) -> str:
        return f"MuECache(layers={self.num_layers}, rows={self.num_rows}, length={self.length}, kv={self.kv_policy})"

    @property
    def is_initialized(self) -> bool:
        return self.num_rows is not None


__all__ = ["MuECache", "MuECacheLayer"]
