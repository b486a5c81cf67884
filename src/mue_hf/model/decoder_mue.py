"""The decoder: causal layers over new tokens, one exit per row and call, and a cache that stays whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import auto_docstring

from .cache_mue import MuECache
from .criteria_mue import ExitPolicy
from .early_exit_mue import ExitDecider, ExitRecord, run_stack
from .encoder_mue import MuEEncoderOutput, check_token_ids
from .engine_mue import EngineGuard
from .layers_mue import (
    MuEDecoderLayer,
    NormedHead,
    known_true,
    mask_value,
    position_scores,
    table_rows,
    text_relative_index,
)
from .views_mue import ImageView, TokenView


@dataclass
class MuEDecoderOutput(ExitRecord, BaseModelOutputWithPastAndCrossAttentions):
    r"""Output of the decoder, with `decoder_exit_layers` and `executed_layers` of this call.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(rows, tokens, d_model)`):
            Each row's exit state after the final LayerNorm.
    """


class _PositionBias:
    """Position biases of one call: tables over all positions, cut or gathered for the tokens at hand.

    Args:
        decoder (`MuEDecoder`): whose weights make the tables.
        encoder_positions (`Tensor` [source, d]): normalised position embeddings of the encoder's output.
        key_mask (`BoolTensor` [rows, keys], *optional*): decoder tokens that exist; leading gaps shift positions.
        length (`int`): positions that the tables cover.
        tables (`dict`): where tables live; a cache's dict keeps them across steps.
    """

    def __init__(
        self, decoder: "MuEDecoder", encoder_positions: Tensor, key_mask: Tensor | None, length: int, tables: dict
    ):
        self.decoder, self.config, self.encoder_positions = decoder, decoder.config, encoder_positions
        self.length, self.tables = length, tables
        self.key_mask = None if key_mask is None or known_true(key_mask) else key_mask
        self.at: tuple[slice, int] | None = None
        self.cut: Sequence[Tensor] = ()
        self.offsets = None
        if self.key_mask is not None and not known_true(self.key_mask[:, 0]):
            # left padding: a row's first token has position 0 wherever it stands
            self.offsets = self.key_mask.int().argmax(dim=1)

    def self_bias(self, layer: int, tokens: TokenView, keys: int) -> Tensor:
        """Additive bias [rows or 1, heads, tokens, keys] of the self-attention, folded as the view of the tokens says;
        it masks later and missing tokens."""
        if isinstance(tokens.positions, slice) and self.offsets is None:
            if self.at != (tokens.positions, keys):
                # cut for all layers at once
                self.at = tokens.positions, keys
                self.cut = self._self_tables()[:, :, :, tokens.positions, :keys].contiguous().unbind(0)
            bias = self.cut[layer]
        else:
            table = self._self_tables()[layer, 0]
            offsets = self._offsets(tokens.rows)
            queries = self._query_positions(tokens).unsqueeze(-1)
            places = (torch.arange(keys, device=offsets.device) - offsets.unsqueeze(1)).clamp_min(0).unsqueeze(1)
            bias = table[:, queries, places].transpose(0, 1)
        if self.key_mask is not None:
            mask = self.key_mask[:, :keys] if tokens.rows is None else self.key_mask[tokens.rows, :keys]
            bias = bias.masked_fill(~mask[:, None, None, :], mask_value(bias))
        return bias if tokens.fold is None else tokens.fold.fold_bias(bias, None)

    def cross_bias(self, tokens: TokenView) -> Tensor:
        """Additive bias [heads, tokens, source], or [rows, heads, tokens, source] where rows differ in position."""
        table = self._cross_table()
        if isinstance(tokens.positions, slice) and self.offsets is None:
            return table[:, tokens.positions]
        return table[:, self._query_positions(tokens)].transpose(0, 1)

    def _offsets(self, rows: Tensor | None) -> Tensor:
        if self.offsets is None:
            return torch.zeros(len(rows), dtype=torch.long, device=self.encoder_positions.device)
        return self.offsets if rows is None else self.offsets[rows]

    def _query_positions(self, tokens: TokenView) -> Tensor:
        offsets, positions = self._offsets(tokens.rows), tokens.positions
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop).unsqueeze(0)
        return (positions.to(offsets.device) - offsets.unsqueeze(1)).clamp_min(0)

    def _self_tables(self) -> Tensor:
        """Self-attention bias [layers, 1, heads, length, length], causal."""
        if "self" not in self.tables:
            decoder, config, positions = self.decoder, self.config, self._decoder_positions()
            scores = self._scores(decoder.self_pos_q_linear, decoder.self_pos_k_linear, positions)
            later = torch.ones(self.length, self.length, dtype=torch.bool, device=scores.device).triu(1)
            index = text_relative_index(
                self.length, config.token_bucket_size, config.max_position_embeddings, scores.device
            )
            tables = torch.stack([table_rows(table, index.device) for table in decoder.token_rel_pos_table_list])
            bias = tables.transpose(1, 2)[:, :, index]
            self.tables["self"] = (bias + scores.masked_fill(later, mask_value(scores))).unsqueeze(1)
        return self.tables["self"]

    def _cross_table(self) -> Tensor:
        """Cross-attention bias [heads, length, source], the same in all layers."""
        if "cross" not in self.tables:
            decoder = self.decoder
            self.tables["cross"] = self._scores(
                decoder.cross_pos_q_linear, decoder.cross_pos_k_linear, self.encoder_positions
            )
        return self.tables["cross"]

    def _decoder_positions(self) -> Tensor:
        decoder = self.decoder
        return decoder.pos_ln(table_rows(decoder.embed_positions, self.encoder_positions.device, self.length))

    def _scores(self, query: nn.Linear, key: nn.Linear, keys: Tensor) -> Tensor:
        heads, factor = self.config.decoder_attention_heads, self.config.attn_scale_factor
        return position_scores(query, key, self._decoder_positions(), keys, heads, factor)


class _LayerView(NamedTuple):
    """What a layer call is about, which stays the same until rows exit or a layer misses other tokens: the tokens from
    `filled` on of `num_rows` rows, their images, and the bias of the cross-attention as these fold it."""

    num_rows: int
    filled: Tensor | None
    tokens: TokenView
    images: ImageView
    cross_bias: Tensor

    def is_of(self, num_rows: int, filled: Tensor | None) -> bool:
        if self.filled is None or filled is None:
            return self.num_rows == num_rows and self.filled is filled
        return torch.equal(self.filled, filled)


class _DecoderCall:
    """One call of the decoder: which tokens it is about, what they attend to, and how a layer runs on some rows.

    Args:
        decoder (`MuEDecoder`): whose layers run.
        encoder_outputs (`MuEEncoderOutput`): what is attended to.
        num_rows, num_tokens (`int`): the new tokens.
        mask (`BoolTensor` [rows, cached and new tokens], *optional*): tokens that exist.
        cache (`MuECache`, *optional*): takes their keys and values.
        output_attentions (`bool`): whether `attentions` collects self- and cross-attention weights.
    """

    def __init__(
        self,
        decoder: "MuEDecoder",
        encoder_outputs: MuEEncoderOutput,
        num_rows: int,
        num_tokens: int,
        mask: Tensor | None,
        cache: MuECache | None,
        output_attentions: bool,
    ):
        # a tuple: a ModuleList looks its modules up by name
        self.layers, self.cache, self.num_rows = tuple(decoder.layers), cache, num_rows
        self.source, source_mask = encoder_outputs.last_hidden_state, encoder_outputs.attention_mask
        self.source_mask = None if known_true(source_mask) else source_mask
        past, length, tables = 0, num_tokens, {}
        if cache is not None:
            cache.begin(num_rows, num_tokens)
            past, tables = cache.length, cache.tables
            length = min(cache.capacity, decoder.config.max_position_embeddings)
        self.positions = slice(past, past + num_tokens)
        self.bias = _PositionBias(decoder, encoder_outputs.position_embeddings[0], mask, length, tables)
        self.new_mask = None if self.bias.key_mask is None else self.bias.key_mask[:, past:]
        self.attentions: tuple[list, list] | None = ([], []) if output_attentions else None
        # rows x tokens that policy "exact" ran besides the new tokens
        self.caught_up = 0
        self.view: _LayerView | None = None

    def run_layer(self, layer: int, states: Tensor, rows: Tensor | None) -> Tensor:
        """Runs a layer on the new tokens' states [rows, tokens, d] and, in the same call, on earlier tokens of these
        rows that skipped it, where the cache asks for that."""
        cache = self.cache
        filled = None if cache is None else cache.skipped(layer, rows)
        if self.view is None or not self.view.is_of(states.shape[0], filled):
            self.view = self._layer_view(states.shape[0], rows, filled)
        tokens = self.view.tokens
        joined = states
        if cache is not None and filled is not None:
            joined = cache.with_skipped(states, tokens)
            self.caught_up += joined.shape[0] * joined.shape[1] - states.shape[0] * states.shape[1]
        output = self.layers[layer](
            joined,
            self.source,
            self.bias.self_bias(layer, tokens, self.positions.stop),
            self.view.cross_bias,
            tokens=tokens,
            images=self.view.images,
            cache=cache,
            output_attentions=self.attentions is not None,
        )
        if self.attentions is not None:
            output, *weights = output
            for collected, part in zip(self.attentions, weights, strict=True):
                # the very tensor of the graph where there is nothing to take out, so that it can keep its gradient
                collected.append(part if filled is None else tokens.new_of(part.transpose(1, 2)).transpose(1, 2))
        if cache is None or filled is None:
            return output
        cache.keep_skipped(layer, output, tokens)
        return tokens.new_of(output)

    def _layer_view(self, num_rows: int, rows: Tensor | None, filled: Tensor | None) -> _LayerView:
        tokens = TokenView(rows, self.positions, filled)
        images = ImageView(tokens.rows, self.num_rows, self.source.shape[0])
        # what layers share is made contiguous once
        bias = images.fold_bias(self.bias.cross_bias(tokens), self.source_mask).contiguous()
        return _LayerView(num_rows, filled, tokens, images, bias)


class MuEDecoder(EngineGuard, nn.Module):
    """Embeds target tokens and runs them through the layers, each row as deep as its exit policy asks."""

    main_input_name = "input_ids"

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        width, heads = config.d_model, config.decoder_attention_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(width)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 2, width)
        self.pos_ln = nn.LayerNorm(width)
        self.self_pos_q_linear = nn.Linear(width, width)
        self.self_pos_k_linear = nn.Linear(width, width)
        self.cross_pos_q_linear = nn.Linear(width, width)
        self.cross_pos_k_linear = nn.Linear(width, width)
        self.layers = nn.ModuleList([MuEDecoderLayer(config, i) for i in range(config.decoder_layers)])
        self.layer_norm = nn.LayerNorm(width)
        self.token_rel_pos_table_list = nn.ModuleList(
            [nn.Embedding(2 * config.token_bucket_size - 1, heads) for _ in self.layers]
        )
        # OFA's tensors for image generation: no text task reads them, checkpoints carry them
        self.embed_image_positions = nn.Embedding(config.image_bucket_size**2 + 1, width)
        self.image_pos_ln = nn.LayerNorm(width)
        self.code_layernorm_embedding = nn.LayerNorm(width)
        image_rows = (2 * config.image_bucket_size - 1) ** 2 + 3
        self.image_rel_pos_table_list = nn.ModuleList([nn.Embedding(image_rows, heads) for _ in self.layers])
        for module in (
            self.embed_image_positions,
            self.image_pos_ln,
            self.code_layernorm_embedding,
            self.image_rel_pos_table_list,
        ):
            module.requires_grad_(False)

    @auto_docstring
    def forward(
        self,
        encoder_outputs: MuEEncoderOutput,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache: MuECache | None = None,
        active_rows: torch.BoolTensor | None = None,
        policy: ExitPolicy | None = None,
        predict: Callable[[Tensor], Tensor] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> MuEDecoderOutput:
        r"""
        encoder_outputs (`MuEEncoderOutput`):
            The encoder's output for `images` samples; decoder row r belongs to sample r // (rows // images).
        active_rows (`torch.BoolTensor` of shape `(rows,)`, *optional*):
            Rows that are worth running; the others have depth 0 and keep their embedding as output.
        policy (`ExitPolicy`, *optional*):
            When rows exit; never by default.
        predict (`Callable`, *optional*):
            Exit states (rows, d_model), normalised -> logits; needed by criteria that look at intermediate logits.
        """
        policy = policy or ExitPolicy()
        # later tokens come from `generate`, which cannot leave the vocabulary
        states = self._embed(input_ids, inputs_embeds, check=cache is None or cache.length == 0)
        num_rows, num_tokens = states.shape[:2]
        images = encoder_outputs.last_hidden_state.shape[0]
        if num_rows % images:
            raise ValueError(
                f"`decoder_input_ids` has {num_rows} rows for {images} encoded samples; pass as many rows for each."
            )
        returned = cache
        if cache is None and not policy.is_never:
            # rows that exit need a place for their keys within this call
            cache = MuECache(self.config, num_tokens)
        past = 0 if cache is None else cache.length
        self._check_length(past + num_tokens)
        mask = self._checked_mask(attention_mask, num_rows, past, num_tokens)
        call = _DecoderCall(self, encoder_outputs, num_rows, num_tokens, mask, cache, output_attentions)
        rows = None
        if active_rows is not None and not known_true(active_rows):
            rows = active_rows.cpu().nonzero().flatten()
        decider = ExitDecider(policy, call.new_mask, predict and NormedHead(self.layer_norm, predict))
        result = run_stack(states, len(self.layers), call.run_layer, decider, rows, output_hidden_states)
        if cache is not None:
            cache.record(result.states, None if rows is None and policy.is_never else result.depths)
        attentions, cross_attentions = call.attentions or (None, None)
        return MuEDecoderOutput(
            last_hidden_state=self.layer_norm(result.states),
            cache=returned,
            hidden_states=result.hidden_states,
            attentions=attentions and tuple(attentions),
            cross_attentions=cross_attentions and tuple(cross_attentions),
            decoder_exit_layers=result.depths.to(states.device),
            executed_layers={"decoder": result.executed + call.caught_up},
        )

    def _embed(self, ids: Tensor | None, embeds: Tensor | None, check: bool) -> Tensor:
        if (ids is None) == (embeds is None):
            raise ValueError("pass exactly one of `decoder_input_ids` and `decoder_inputs_embeds`.")
        if ids is not None:
            if check or ids.dim() != 2 or ids.shape[1] != 1:
                check_token_ids("decoder_input_ids", ids, self.config.vocab_size)
            embeds = self.embed_tokens(ids)
        if embeds.shape[1] == 0:
            raise ValueError("`decoder_input_ids` holds no token; start it with `decoder_start_token_id`.")
        states = self.layernorm_embedding(embeds)
        return nn.functional.dropout(states, self.config.dropout) if self.training else states

    def _check_length(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"the decoder sequence has {length} tokens, but `max_position_embeddings` is {limit}; "
                "shorten it or lower `max_new_tokens`."
            )

    @staticmethod
    def _checked_mask(mask: Tensor | None, rows: int, past: int, tokens: int) -> Tensor | None:
        if mask is None:
            return None
        if mask.shape != (rows, past + tokens):
            raise ValueError(
                f"`decoder_attention_mask` must have the shape {[rows, past + tokens]} (cached and new tokens), "
                f"got {list(mask.shape)}."
            )
        return mask.bool()


__all__ = ["MuEDecoder", "MuEDecoderOutput"]
