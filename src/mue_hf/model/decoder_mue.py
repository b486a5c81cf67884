"""The decoder: causal layers over new tokens, one exit per row and call, and a cache that stays whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import auto_docstring

from .cache_mue import CrossView, MuECache, SelfView
from .criteria_mue import ExitPolicy
from .early_exit_mue import ExitDecider, run_stack
from .encoder_mue import MuEEncoderOutput, check_token_ids
from .layers_mue import MuEDecoderLayer, mask_value, position_scores, relative_bias, text_relative_index


@auto_docstring(custom_intro="Output of the decoder.")
@dataclass
class MuEDecoderOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(rows, tokens, d_model)`):
        Each row's exit state after the final LayerNorm.
    exit_layers (`torch.LongTensor` of shape `(rows,)`):
        Layers run by each row in this call.
    executed_layers (`int`):
        How often a layer ran, as rows x tokens; more than the depths say where `exact` caught up.
    """

    last_hidden_state: torch.FloatTensor | None = None
    cache: MuECache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    exit_layers: torch.LongTensor | None = None
    executed_layers: int | None = None


class _Positions:
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
        self.decoder, self.encoder_positions = decoder, encoder_positions
        self.length, self.tables = length, tables
        self.key_mask = key_mask
        self.offsets = None
        if key_mask is not None:
            if bool(key_mask.all()):
                self.key_mask = None
            elif not bool(key_mask[:, 0].all()):
                # left padding: a row's first token has position 0 wherever it stands
                self.offsets = key_mask.int().argmax(dim=1)

    def _table(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        if name not in self.tables:
            self.tables[name] = make()
        return self.tables[name]

    def self_bias(self, layer: int, rows: Tensor | None, slots: slice | Tensor, keys: int) -> Tensor:
        """Additive bias [rows or 1, heads, tokens, keys] of the self-attention; it masks later and missing tokens."""
        table = self._table(layer, lambda: self.decoder.self_table(layer, self.length, self.tables))
        if isinstance(slots, slice) and self.offsets is None:
            bias = table[:, slots, :keys].unsqueeze(0)
        else:
            offsets = self._offsets(rows)
            queries = self._query_positions(rows, slots).unsqueeze(-1)
            places = (torch.arange(keys, device=offsets.device) - offsets.unsqueeze(1)).clamp_min(0).unsqueeze(1)
            bias = table[:, queries, places].transpose(0, 1)
        if self.key_mask is not None:
            mask = self.key_mask[:, :keys] if rows is None else self.key_mask[rows, :keys]
            bias = bias.masked_fill(~mask[:, None, None, :], mask_value(bias))
        return bias

    def cross_bias(self, rows: Tensor | None, slots: slice | Tensor) -> Tensor:
        """Additive bias [heads, tokens, source], or [rows, heads, tokens, source] where rows differ in position."""
        table = self._table("cross", lambda: self.decoder.cross_table(self.encoder_positions, self.length))
        if isinstance(slots, slice) and self.offsets is None:
            return table[:, slots]
        return table[:, self._query_positions(rows, slots)].transpose(0, 1)

    def _offsets(self, rows: Tensor | None) -> Tensor:
        if self.offsets is None:
            return torch.zeros(len(rows), dtype=torch.long, device=self.encoder_positions.device)
        return self.offsets if rows is None else self.offsets[rows]

    def _query_positions(self, rows: Tensor | None, slots: slice | Tensor) -> Tensor:
        offsets = self._offsets(rows)
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop).unsqueeze(0)
        return (slots.to(offsets.device) - offsets.unsqueeze(1)).clamp_min(0)


class MuEDecoder(nn.Module):
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
            When rows leave; never by default.
        predict (`Callable`, *optional*):
            Exit states (rows, d_model), normalised -> logits; needed by all criteria but similarity and fixed.
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
            # rows that leave need a place for their keys within this call
            cache = MuECache(self.config, num_tokens)
        past = 0 if cache is None else cache.length
        self._check_length(past + num_tokens)
        mask = self._checked_mask(attention_mask, num_rows, past, num_tokens)
        if cache is not None:
            cache.begin(num_rows, num_tokens)
        positions = _Positions(
            self,
            encoder_outputs.position_embeddings[0],
            mask,
            num_tokens if cache is None else min(cache.capacity, self.config.max_position_embeddings),
            {} if cache is None else cache.tables,
        )
        source, source_mask = encoder_outputs.last_hidden_state, encoder_outputs.attention_mask
        source_mask = None if bool(source_mask.all()) else source_mask
        weights = ([], []) if output_attentions else None
        slots = slice(past, past + num_tokens)
        caught_up = 0
        views: dict[int, tuple[CrossView, Tensor]] = {}

        def cross_view(rows: Tensor | None, slots: slice | Tensor) -> tuple[CrossView, Tensor]:
            view = CrossView(rows, num_rows, images)
            return view, view.fold_bias(positions.cross_bias(rows, slots), source_mask)

        def call(
            layer: int, states: Tensor, view: SelfView, cross: tuple[CrossView, Tensor], attentions: Any = None
        ) -> Tensor:
            keys = view.slots.stop if isinstance(view.slots, slice) else past
            self_bias, (cross_rows, cross_bias) = positions.self_bias(layer, view.rows, view.slots, keys), cross
            return self.layers[layer](
                states,
                source,
                self_bias,
                cross_bias,
                self_view=view,
                cross_view=cross_rows,
                cache=cache,
                attentions=attentions,
            )

        def catch_up(layer: int, rows: Tensor | None) -> int:
            def run(states: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
                return call(layer, states, SelfView(rows, slots), cross_view(rows, slots))

            return 0 if cache is None else cache.fill(layer, rows, self.layers[layer].project_self, run)

        def run_layer(layer: int, states: Tensor, rows: Tensor | None) -> Tensor:
            nonlocal caught_up, views
            caught_up += catch_up(layer, rows)
            # the view changes only when rows leave
            count = states.shape[0]
            if count not in views:
                views = {count: cross_view(rows, slots)}
            return call(layer, states, SelfView(rows, slots), views[count], weights)

        rows = None
        if active_rows is not None and not bool(active_rows.all()):
            rows = active_rows.cpu().nonzero().flatten()
        valid = None if positions.key_mask is None else positions.key_mask[:, past:]
        decider = ExitDecider(policy, valid, predict and (lambda states: predict(self.layer_norm(states))))
        result = run_stack(states, len(self.layers), run_layer, decider, rows, output_hidden_states)
        if cache is not None:
            cache.record(result.states, result.depths)
        return MuEDecoderOutput(
            last_hidden_state=self.layer_norm(result.states),
            cache=returned,
            hidden_states=result.hidden_states,
            attentions=tuple(weights[0]) if weights else None,
            cross_attentions=tuple(weights[1]) if weights else None,
            exit_layers=result.depths.to(states.device),
            executed_layers=result.executed + caught_up,
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
        return nn.functional.dropout(states, self.config.dropout, self.training)

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

    def self_table(self, layer: int, length: int, tables: dict) -> Tensor:
        """Self-attention bias [heads, length, length] of one layer, causal."""
        config = self.config
        if "self" not in tables:
            p = self.pos_ln(self.embed_positions.weight[:length])
            heads, factor = config.decoder_attention_heads, config.attn_scale_factor
            scores = position_scores(self.self_pos_q_linear, self.self_pos_k_linear, p, p, heads, factor)
            index = text_relative_index(length, config.token_bucket_size, config.max_position_embeddings, p.device)
            later = torch.ones(length, length, dtype=torch.bool, device=p.device).triu(1)
            tables["self"] = scores.masked_fill(later, mask_value(scores))
            tables["index"] = index
        return tables["self"] + relative_bias(self.token_rel_pos_table_list[layer], tables["index"])

    def cross_table(self, encoder_positions: Tensor, length: int) -> Tensor:
        """Cross-attention bias [heads, length, source], the same in all layers."""
        config = self.config
        p = self.pos_ln(self.embed_positions.weight[:length])
        return position_scores(
            self.cross_pos_q_linear,
            self.cross_pos_k_linear,
            p,
            encoder_positions,
            config.decoder_attention_heads,
            config.attn_scale_factor,
        )


__all__ = ["MuEDecoder", "MuEDecoderOutput"]
