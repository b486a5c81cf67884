"""The encoder: one stack of layers over an image stream and a text stream (MuE), or over both joined (OFA)."""

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import auto_docstring

from .criteria_mue import ExitPolicy
from .early_exit_mue import ExitDecider, StackResult, run_stack
from .exit_options_mue import ExitOptions
from .layers_mue import MuEEncoderLayer, mask_value, position_scores, relative_bias, text_relative_index
from .memo_mue import WeightMemo, modules_of, plain_weights
from .vision_mue import (
    add_patch_bias,
    check_features,
    load_trunk,
    patch_positions,
    patch_relative_index,
    trunk_features,
)

# Prompts and image grids whose results an encoder keeps.
KEPT_PROMPTS = 16
KEPT_GRIDS = 1


@auto_docstring(custom_intro="Output of the encoder: image tokens first, then text tokens.")
@dataclass
class MuEEncoderOutput(BaseModelOutput):
    r"""
    attention_mask (`torch.BoolTensor` of shape `(batch_size, source_length)`):
        Source positions that exist (True), image and text.
    position_embeddings (`torch.FloatTensor` of shape `(batch_size, source_length, d_model)`):
        Normalised position embeddings, which the decoder's cross-attention needs.
    image_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        Layers run by each sample's image stream, 0 without an image. Only when exits were asked for.
    text_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        The same for the text stream.
    executed_layers (`dict[str, int]`):
        "image" and "text": how often a layer ran, as rows x tokens. Only when exits were asked for.
    """

    attention_mask: torch.BoolTensor | None = None
    position_embeddings: torch.FloatTensor | None = None
    image_exit_layers: torch.LongTensor | None = None
    text_exit_layers: torch.LongTensor | None = None
    executed_layers: dict[str, int] | None = None


@dataclass
class _Source:
    """One modality, embedded: states [rows, tokens, d], mask [rows, tokens] (None: all valid), normalised positions
    [tokens, d], its relative position tables (None: no such bias) and indices [tokens, tokens] into them, the (rows,
    columns) of an image's patches, and the token ids of a text that all rows share."""

    states: Tensor
    mask: Tensor | None
    positions: Tensor
    tables: nn.ModuleList | None = None
    relative_index: Tensor | None = None
    grid: tuple[int, int] | None = None
    prompt: tuple[int, ...] | None = None


class MuEEncoder(nn.Module):
    """Embeds image and text, runs their streams with exits, and joins them for the decoder's cross-attention."""

    main_input_name = "input_ids"

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        width, heads = config.d_model, config.encoder_attention_heads
        patches = config.image_bucket_size**2
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(width)
        self.type_embedding = nn.Embedding(2, width)
        self.embed_images = load_trunk(config)
        self.image_proj = nn.Linear(self.embed_images.channels[-1], width)
        self.patch_layernorm_embedding = nn.LayerNorm(width)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 2, width)
        self.embed_image_positions = nn.Embedding(patches + 1, width)
        self.pos_ln = nn.LayerNorm(width)
        self.image_pos_ln = nn.LayerNorm(width)
        self.pos_q_linear = nn.Linear(width, width)
        self.pos_k_linear = nn.Linear(width, width)
        self.layers = nn.ModuleList([MuEEncoderLayer(config, i) for i in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(width)
        # OFA keeps three more rows in the image tables, for its code token
        image_rows = (2 * config.image_bucket_size - 1) ** 2 + 3
        self.token_rel_pos_table_list = nn.ModuleList(
            [nn.Embedding(2 * config.token_bucket_size - 1, heads) for _ in self.layers]
        )
        self.image_rel_pos_table_list = nn.ModuleList([nn.Embedding(image_rows, heads) for _ in self.layers])
        self.prompts, self.grids = WeightMemo(KEPT_PROMPTS), WeightMemo(KEPT_GRIDS)

    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        patch_mask: torch.BoolTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        exit_options: ExitOptions | None = None,
        output_exit_layers: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MuEEncoderOutput:
        r"""
        patch_mask (`torch.BoolTensor` of shape `(images,)`, *optional*):
            False where a sample has no image; its pixels are ignored.
        image_features (`torch.FloatTensor` of shape `(images, channels, rows, columns)`, *optional*):
            The trunk's last feature map, in place of `pixel_values`.
        exit_options (`ExitOptions`, *optional*):
            When streams leave; never by default.
        output_exit_layers (`bool`, *optional*, defaults to `False`):
            Whether to return exit depths and the executed-layer record.
        """
        image = self._embed_image(pixel_values, image_features, patch_mask)
        text = self._embed_text(input_ids, attention_mask, inputs_embeds)
        if image is None and text is None:
            raise ValueError(
                "nothing to encode: pass `input_ids`, `pixel_values` (or `image_features`), or both; "
                "`processor(images=..., text=...)` makes them."
            )
        repeats = self._texts_per_image(image, text)
        options = exit_options or ExitOptions()
        run = self._run_decomposed if self.config.modality_decomposition else self._run_joint
        streams, attentions = run(image, text, repeats, options, bool(output_hidden_states), bool(output_attentions))

        sources = [source for source in (image, text) if source is not None]
        states = torch.cat([stream.states for stream in streams], dim=1)
        positions = torch.cat([source.positions for source in sources])
        masks = [self._full_mask(source) for source in sources]
        if repeats > 1:
            masks[0] = masks[0].repeat_interleave(repeats, dim=0)
        output = MuEEncoderOutput(
            last_hidden_state=self.layer_norm(states),
            hidden_states=self._joined_history(streams) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            attention_mask=torch.cat(masks, dim=1),
            position_embeddings=positions.expand(states.shape[0], -1, -1),
        )
        if output_exit_layers:
            self._add_exit_layers(output, image, text, repeats, streams)
        return output

    # --- embedding -------------------------------------------------------------------------------------------------

    def _embed_image(
        self, pixels: Tensor | None, features: Tensor | None, patch_mask: Tensor | None
    ) -> _Source | None:
        if pixels is not None and features is not None:
            raise ValueError("pass `pixel_values` or `image_features`, not both; the latter is the trunk's output.")
        if pixels is not None:
            features = trunk_features(self.embed_images, pixels)
        if features is None:
            if patch_mask is not None:
                raise ValueError("`patch_mask` says which samples have an image, but none was passed; drop it.")
            return None
        config = self.config
        check_features(features, self.image_proj.in_features, config.image_bucket_size)
        rows, columns = features.shape[2:]
        ids = patch_positions(rows, columns, config.image_bucket_size, features.device)
        positions = self.image_pos_ln(self.embed_image_positions(ids))
        states = self.image_proj(features.flatten(2).transpose(1, 2)) + self.type_embedding.weight[1]
        if config.add_position_embedding:
            states = states + positions
        states = nn.functional.dropout(self.patch_layernorm_embedding(states), config.dropout, self.training)
        mask = None
        if patch_mask is not None:
            if patch_mask.shape != states.shape[:1]:
                raise ValueError(
                    f"`patch_mask` must hold one value per image, [{states.shape[0]}], got {list(patch_mask.shape)}."
                )
            mask = patch_mask.bool().unsqueeze(1).expand(states.shape[:2])
            mask = None if bool(mask.all()) else mask
        source = _Source(states, mask, positions, grid=(rows, columns))
        if config.image_relative_bias:
            source.tables = self.image_rel_pos_table_list
            if _recorded():
                source.relative_index = patch_relative_index(rows, columns, config.image_bucket_size, states.device)
        return source

    def _embed_text(self, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None) -> _Source | None:
        if ids is not None and embeds is not None:
            raise ValueError("pass `input_ids` or `inputs_embeds`, not both.")
        if ids is None and embeds is None:
            return None
        config = self.config
        if ids is not None:
            check_token_ids("input_ids", ids, config.vocab_size)
            embeds = self.embed_tokens(ids)
        batch, length = embeds.shape[:2]
        if length == 0:
            raise ValueError("`input_ids` holds no token; pass at least the prompt, or leave `input_ids` out.")
        if length > config.max_position_embeddings:
            raise ValueError(
                f"`input_ids` has {length} tokens, but `max_position_embeddings` is {config.max_position_embeddings}; "
                "shorten the text."
            )
        if mask is None and ids is not None:
            mask = ids != config.pad_token_id
        if mask is not None:
            if mask.shape != (batch, length):
                raise ValueError(
                    f"`attention_mask` must have the shape of `input_ids`, {[batch, length]}, got {list(mask.shape)}."
                )
            mask = mask.bool()
            mask = None if bool(mask.all()) else mask
        positions = self.pos_ln(self.embed_positions.weight[:length])
        states = embeds + self.type_embedding.weight[0]
        if config.add_position_embedding:
            states = states + positions
        states = nn.functional.dropout(self.layernorm_embedding(states), config.dropout, self.training)
        index = text_relative_index(length, config.token_bucket_size, config.max_position_embeddings, states.device)
        prompt, alone = None, self.training or _recorded()
        if ids is not None and mask is None and not alone and bool((ids == ids[:1]).all()):
            prompt = tuple(ids[0].tolist())
        return _Source(states, mask, positions, self.token_rel_pos_table_list, index, prompt=prompt)

    @staticmethod
    def _texts_per_image(image: _Source | None, text: _Source | None) -> int:
        if image is None or text is None:
            return 1
        images, texts = image.states.shape[0], text.states.shape[0]
        if images == 0 or texts % images:
            raise ValueError(
                f"the batch of texts ({texts}) must be that of images ({images}) or a multiple of it; "
                "pass one image per text, or one image for several texts."
            )
        return texts // images

    # --- streams ---------------------------------------------------------------------------------------------------

    def _run_decomposed(
        self,
        image: _Source | None,
        text: _Source | None,
        repeats: int,
        options: ExitOptions,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[list[StackResult], tuple[Tensor, ...]]:
        streams, weights = [], []
        for name, source in (("image", image), ("text", text)):
            if source is None:
                continue
            policy = options.policy(name, len(self.layers))
            collected = [] if output_attentions else None
            if source.prompt is None or output_hidden_states or output_attentions or isinstance(policy.depth, Tensor):
                parts = [(slice(None), source)]
                stream = self._run_stream(source, parts, policy, output_hidden_states, collected)
            else:
                stream = self._run_prompt(source, policy)
            if name == "image" and repeats > 1:
                stream = _repeated(stream, repeats)
                collected = collected and [x.repeat_interleave(repeats, dim=0) for x in collected]
            streams.append(stream)
            weights.append(collected)
        return streams, _block_diagonal(weights) if output_attentions else ()

    def _run_joint(
        self,
        image: _Source | None,
        text: _Source | None,
        repeats: int,
        options: ExitOptions,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[list[StackResult], tuple[Tensor, ...]]:
        if image is not None and repeats > 1:
            states = image.states.repeat_interleave(repeats, dim=0)
            mask = None if image.mask is None else image.mask.repeat_interleave(repeats, dim=0)
            image = replace(image, states=states, mask=mask)
        sources = [source for source in (image, text) if source is not None]
        lengths = [source.states.shape[1] for source in sources]
        masks = [self._full_mask(source) for source in sources]
        joint = _Source(
            torch.cat([source.states for source in sources], dim=1),
            torch.cat(masks, dim=1) if any(source.mask is not None for source in sources) else None,
            torch.cat([source.positions for source in sources]),
            grid=None if image is None else image.grid,
        )
        places = [slice(0, lengths[0]), slice(lengths[0], sum(lengths))]
        parts = list(zip(places, sources, strict=False))
        policy = options.policy("encoder", len(self.layers))
        collected = [] if output_attentions else None
        stream = self._run_stream(joint, parts, policy, output_hidden_states, collected)
        return [stream], tuple(collected or ())

    def _run_prompt(self, source: _Source, policy: ExitPolicy) -> StackResult:
        """A text that all rows share, run for one of them, and not again while weights and policy are the same."""
        one, fresh = replace(source, states=source.states[:1]), []

        def run() -> StackResult:
            fresh.append(self._run_stream(one, [(slice(None), one)], policy, False, None))
            return fresh[0]

        stream = None
        if not torch.is_autocast_enabled(source.states.device.type):
            parts = (self.embed_tokens, self.layernorm_embedding, self.type_embedding, self.embed_positions)
            parts += (self.pos_ln, self.pos_q_linear, self.pos_k_linear, self.token_rel_pos_table_list, self.layers)
            weights = plain_weights(chain.from_iterable(map(modules_of, parts)))
            stream = self.prompts.get((source.prompt, policy, self.config._attn_implementation), weights, run)
        stream = stream or run()
        batch = source.states.shape[0]
        executed = stream.executed if fresh else 0
        return StackResult(stream.states.expand(batch, -1, -1), stream.depths.expand(batch), executed, None)

    def _run_stream(
        self,
        source: _Source,
        parts: list[tuple[slice, _Source]],
        policy: ExitPolicy,
        output_hidden_states: bool,
        attentions: list | None,
    ) -> StackResult:
        """Runs the layers over one sequence; `parts` are the places in it that have relative position biases."""
        states, mask, rows = source.states, source.mask, None
        if mask is not None:
            states = states * mask.unsqueeze(-1)
            present = mask.any(dim=1).cpu()
            if not present.all():
                rows = present.nonzero().flatten()
                if bool(mask[present].all()):
                    # samples without an image take no part, those with one have all patches
                    mask = None

        scores = self._position_scores(source)
        # Memory of this size is mapped anew at each allocation: the layers share one bias.
        buffer = None if _recorded() else torch.empty_like(scores)
        if buffer is not None and len(parts) > 1:
            buffer.copy_(scores)

        def run_layer(layer: int, states: Tensor, rows: Tensor | None) -> Tensor:
            bias = self._layer_bias(layer, scores, parts, buffer).unsqueeze(0)
            if mask is not None:
                keys = mask if rows is None else mask[rows]
                bias = bias.masked_fill(~keys[:, None, None, :], mask_value(bias))
            weights = None if attentions is None else []
            states = self.layers[layer](states, bias, weights)
            if weights:
                attentions.append(_spread(weights[0], rows, source.states.shape[0]))
            return states

        decider = ExitDecider(policy, mask)
        return run_stack(states, len(self.layers), run_layer, decider, rows, output_hidden_states)

    def _layer_bias(
        self, layer: int, scores: Tensor, parts: list[tuple[slice, _Source]], buffer: Tensor | None
    ) -> Tensor:
        """Adds the relative position biases of a layer to scores [heads, tokens, tokens] shared by all layers; in
        `buffer`, which holds scores outside of the parts, or differentiably without one."""
        parts = [(place, part) for place, part in parts if part.tables is not None]
        if not parts:
            return scores
        if buffer is not None:
            for place, part in parts:
                table, inputs, output = part.tables[layer], scores[:, place, place], buffer[:, place, place]
                if part.grid is None:
                    torch.add(inputs, relative_bias(table, part.relative_index), out=output)
                else:
                    add_patch_bias(table.weight, part.grid, self.config.image_bucket_size, inputs, output)
            return buffer
        biases = [relative_bias(part.tables[layer], part.relative_index) for _, part in parts]
        if len(biases) == 1 and biases[0].shape == scores.shape:
            return biases[0] + scores
        scores = scores.clone()
        for (place, _), bias in zip(parts, biases, strict=True):
            scores[:, place, place] += bias
        return scores

    def _position_scores(self, source: _Source) -> Tensor:
        """Scores [heads, tokens, tokens] of absolute positions; those of an image's size are kept."""

        def compute() -> Tensor:
            heads, factor, positions = config.encoder_attention_heads, config.attn_scale_factor, source.positions
            return position_scores(self.pos_q_linear, self.pos_k_linear, positions, positions, heads, factor)

        config, scores = self.config, None
        autocast = torch.is_autocast_enabled(source.positions.device.type)
        if source.grid is not None and not _recorded() and not autocast:
            parts = (self.embed_image_positions, self.image_pos_ln, self.embed_positions, self.pos_ln)
            weights = plain_weights((*parts, self.pos_q_linear, self.pos_k_linear))
            scores = self.grids.get((source.grid, len(source.positions)), weights, compute)
        return compute() if scores is None else scores

    # --- output ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _full_mask(source: _Source) -> Tensor:
        if source.mask is not None:
            return source.mask
        return torch.ones(source.states.shape[:2], dtype=torch.bool, device=source.states.device)

    @staticmethod
    def _joined_history(streams: list[StackResult]) -> tuple[Tensor, ...]:
        if len(streams) == 1:
            return streams[0].hidden_states
        depth = max(len(stream.hidden_states) for stream in streams)
        return tuple(
            torch.cat([s.hidden_states[min(i, len(s.hidden_states) - 1)] for s in streams], dim=1)
            for i in range(depth)
        )

    def _add_exit_layers(
        self,
        output: MuEEncoderOutput,
        image: _Source | None,
        text: _Source | None,
        repeats: int,
        streams: list[StackResult],
    ) -> None:
        batch, device = output.last_hidden_state.shape[0], output.last_hidden_state.device
        depths, executed, at = {}, {}, 0
        for name, source in (("image", image), ("text", text)):
            depths[name], executed[name] = torch.zeros(batch, dtype=torch.long), 0
            if source is None:
                continue
            if self.config.modality_decomposition:
                stream = streams[at]
                executed[name], at = stream.executed, at + 1
            else:
                stream = streams[0]
                executed[name] = stream.executed // stream.states.shape[1] * source.states.shape[1]
            present = self._full_mask(source).any(dim=1).cpu()
            if name == "image" and repeats > 1:
                present = present.repeat_interleave(repeats)
            depths[name] = stream.depths * present
        output.image_exit_layers, output.text_exit_layers = depths["image"].to(device), depths["text"].to(device)
        output.executed_layers = executed


def _recorded() -> bool:
    """Whether what is computed becomes part of a graph: to differentiate, to compile or to export."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def check_token_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises a ValueError unless ids [batch, length] lie in the vocabulary."""
    if ids.dim() != 2:
        raise ValueError(f"`{name}` must have the shape [batch, length], got {list(ids.shape)}.")
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"`{name}` must lie in the vocabulary [0, {vocab_size}), got {low if low < 0 else high}; "
                "use the tokenizer that belongs to this model."
            )


def _repeated(stream: StackResult, repeats: int) -> StackResult:
    history = stream.hidden_states and tuple(x.repeat_interleave(repeats, dim=0) for x in stream.hidden_states)
    states, depths = stream.states.repeat_interleave(repeats, dim=0), stream.depths.repeat_interleave(repeats)
    return StackResult(states, depths, stream.executed, history)


def _spread(weights: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """Puts the attention weights of some rows back into their batch; the others are 0."""
    if rows is None:
        return weights
    full = weights.new_zeros(batch, *weights.shape[1:])
    return full.index_put((rows.to(weights.device),), weights)


def _block_diagonal(streams: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Attention weights of separate streams as those of one sequence: no stream attends to the other."""
    if len(streams) == 1:
        return tuple(streams[0])
    depth = max(len(layers) for layers in streams)
    joined = []
    for layer in range(depth):
        blocks = [layers[layer] if layer < len(layers) else torch.zeros_like(layers[0]) for layers in streams]
        total = sum(block.shape[-1] for block in blocks)
        full = blocks[0].new_zeros(*blocks[0].shape[:2], total, total)
        at = 0
        for block in blocks:
            end = at + block.shape[-1]
            full[:, :, at:end, at:end] = block
            at = end
        joined.append(full)
    return tuple(joined)


__all__ = ["MuEEncoder", "MuEEncoderOutput", "check_token_ids"]
