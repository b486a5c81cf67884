"""The encoder: one stack of layers over an image stream and a text stream (MuE), or over both joined (OFA)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import auto_docstring

from .criteria_mue import ExitPolicy
from .early_exit_mue import ExitDecider, ExitRecord, StackResult, run_stack
from .engine_mue import EngineGuard
from .exit_options_mue import ExitOptions
from .folding_mue import BatchNormFolding, can_fold
from .layers_mue import (
    MuEEncoderLayer,
    known_true,
    mask_value,
    position_scores,
    relative_bias,
    table_rows,
    text_relative_index,
)
from .vision_mue import (
    add_patch_bias,
    check_features,
    load_trunk,
    patch_positions,
    patch_relative_index,
    trunk_features,
)


@dataclass
class MuEEncoderOutput(ExitRecord, BaseModelOutput):
    r"""Output of the encoder: image tokens first, then text tokens; see [`ExitRecord`] for exits.

    Args:
        attention_mask (`torch.BoolTensor` of shape `(batch_size, source_length)`):
            Source positions that exist (True), image and text.
        position_embeddings (`torch.FloatTensor` of shape `(batch_size, source_length, d_model)`):
            Normalised position embeddings, which the decoder's cross-attention needs.
    """

    attention_mask: torch.BoolTensor | None = None
    position_embeddings: torch.FloatTensor | None = None


@dataclass
class _Source:
    """One modality, embedded.

    Args:
        states (`Tensor` [rows, tokens, d]), mask (`BoolTensor` [rows, tokens], *optional*: all valid).
        positions (`Tensor` [tokens, d]): normalised position embeddings.
        tables (`nn.ModuleList`, *optional*): relative position tables, one per layer; None for no such bias.
        relative_index (`LongTensor` [tokens, tokens], *optional*): indices into them.
        grid (rows, columns), *optional*: of an image's patches.
        is_constant (`bool`): whether all rows are the same, as a captioning prompt is.
    """

    states: Tensor
    mask: Tensor | None
    positions: Tensor
    tables: nn.ModuleList | None = None
    relative_index: Tensor | None = None
    grid: tuple[int, int] | None = None
    is_constant: bool = False

    def full_mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device)

    def repeated(self, repeats: int) -> "_Source":
        mask = None if self.mask is None else self.mask.repeat_interleave(repeats, dim=0)
        return replace(self, states=self.states.repeat_interleave(repeats, dim=0), mask=mask)


class _LayerBias:
    """The additive attention bias of each layer over one sequence: absolute positions, the same in all layers, and the
    relative ones of its parts.

    Args:
        scores (`Tensor` [heads, tokens, tokens]): of the absolute positions.
        parts (list of (`slice`, `_Source`)): the places in the sequence that have relative position biases.
        bucket_size (`int`): side of the image's position grid.
    """

    def __init__(self, scores: Tensor, parts: list[tuple[slice, _Source]], bucket_size: int):
        self.scores, self.bucket_size = scores, bucket_size
        self.parts = [(place, part) for place, part in parts if part.tables is not None]
        # Memory of this size is mapped anew at each allocation: outside of a graph the layers share one bias.
        self.buffer = None if _becomes_graph() else torch.empty_like(scores)
        if self.buffer is not None and len(parts) > 1:
            self.buffer.copy_(scores)

    def __call__(self, layer: int) -> Tensor:
        """[heads, tokens, tokens], valid until the next call."""
        if not self.parts:
            return self.scores
        if self.buffer is None:
            return self._differentiable(layer)
        for place, part in self.parts:
            table, inputs, output = part.tables[layer], self.scores[:, place, place], self.buffer[:, place, place]
            if part.grid is None:
                torch.add(inputs, relative_bias(table, part.relative_index), out=output)
            else:
                rows = table_rows(table, inputs.device).to(inputs.dtype)
                add_patch_bias(rows, part.grid, self.bucket_size, inputs, output)
        return self.buffer

    def _differentiable(self, layer: int) -> Tensor:
        biases = [relative_bias(part.tables[layer], part.relative_index) for _, part in self.parts]
        if len(biases) == 1 and biases[0].shape == self.scores.shape:
            return biases[0] + self.scores
        scores = self.scores.clone()
        for (place, _), bias in zip(self.parts, biases, strict=True):
            scores[:, place, place] += bias
        return scores


class MuEEncoder(EngineGuard, nn.Module):
    """Embeds image and text, runs their streams with exits, and joins them for the decoder's cross-attention."""

    main_input_name = "input_ids"

    def __init__(self, config: Any, trunk: nn.Module | None = None):
        super().__init__()
        self.config = config
        width, heads = config.d_model, config.encoder_attention_heads
        patches = config.image_bucket_size**2
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(width)
        self.type_embedding = nn.Embedding(2, width)
        self.embed_images: Any = load_trunk(config) if trunk is None else trunk
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
            [nn.Embedding(2 * config.token_bucket_size - 1, heads) for _ in range(config.layers_of("text"))]
        )
        self.image_rel_pos_table_list = nn.ModuleList(
            [nn.Embedding(image_rows, heads) for _ in range(config.layers_of("image"))]
        )
        self.folding: BatchNormFolding | None = None

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
            When streams exit; never by default.
        output_exit_layers (`bool`, *optional*, defaults to `False`):
            Whether to return exit depths and the executed-layer record.
        """
        check_attentions(self.config, output_attentions)
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
        masks = [source.full_mask() for source in sources]
        if repeats > 1:
            masks[0] = masks[0].repeat_interleave(repeats, dim=0)
        output = MuEEncoderOutput(
            last_hidden_state=self.layer_norm(states),
            hidden_states=_joined_history(streams) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            attention_mask=torch.cat(masks, dim=1),
            position_embeddings=positions.expand(states.shape[0], -1, -1),
        )
        if output_exit_layers:
            self._add_exit_layers(output, image, text, repeats, streams)
        return output

    # --- folded batch norms ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold_batch_norms(self) -> int:
        """See [`MuEModel.fold_batch_norms`]."""
        if self.training:
            raise ValueError("`fold_batch_norms` needs a model in evaluation mode; call `model.eval()` first.")
        if self.folding is None and can_fold(self.embed_images):
            folding = BatchNormFolding(
                self.embed_images, getattr(self.config.backbone_config, "image_size", None) or 64
            )
            self.folding = folding if folding.pairs else None
        return 0 if self.folding is None else len(self.folding.pairs)

    @torch.no_grad()
    def unfold_batch_norms(self, check: bool = True) -> None:
        """See [`MuEModel.unfold_batch_norms`]."""
        if self.folding is not None:
            self.folding.undo(check)
            self.folding = None

    def train(self, mode: bool = True) -> "MuEEncoder":
        """Training takes the batch norms as they were."""
        if mode:
            self.unfold_batch_norms()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Weights are saved as they were before folding."""
        self.unfold_batch_norms()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # called before the trunk's own weights are loaded
        self.unfold_batch_norms(check=False)
        super()._load_from_state_dict(*args, **kwargs)

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
        states = self.image_proj(features.flatten(2).transpose(1, 2)) + self._type(1, features.device)
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
            mask = None if known_true(mask) else mask
        source = _Source(states, mask, positions, grid=(rows, columns))
        if config.image_relative_bias:
            source.tables = self.image_rel_pos_table_list
            if _becomes_graph():
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
            mask = None if known_true(mask) else mask
        positions = self.pos_ln(table_rows(self.embed_positions, embeds.device, length))
        states = embeds + self._type(0, embeds.device)
        if config.add_position_embedding:
            states = states + positions
        states = nn.functional.dropout(self.layernorm_embedding(states), config.dropout, self.training)
        index = text_relative_index(length, config.token_bucket_size, config.max_position_embeddings, states.device)
        constant = ids is not None and mask is None and not self.training and not _becomes_graph()
        constant = constant and len(ids) > 1 and known_true(ids == ids[:1])
        return _Source(states, mask, positions, self.token_rel_pos_table_list, index, is_constant=constant)

    def _type(self, modality: int, device: torch.device) -> Tensor:
        """The type embedding [d] of text (0) or image (1)."""
        return self.type_embedding(torch.tensor(modality, device=device))

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
            layers = self.config.layers_of(name)
            policy = options.policy(name, layers)
            collected = [] if output_attentions else None
            batch = source.states.shape[0]
            # rows that are all the same run once
            once = source.is_constant and not output_attentions and not isinstance(policy.depth, Tensor)
            if once:
                source = replace(source, states=source.states[:1])
            stream = self._run_stream(source, [(slice(None), source)], layers, policy, output_hidden_states, collected)
            if once and batch > 1:
                stream = _repeated(stream, batch)
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
            image = image.repeated(repeats)
        sources = [source for source in (image, text) if source is not None]
        lengths = [source.states.shape[1] for source in sources]
        joint = _Source(
            torch.cat([source.states for source in sources], dim=1),
            torch.cat([source.full_mask() for source in sources], dim=1)
            if any(source.mask is not None for source in sources)
            else None,
            torch.cat([source.positions for source in sources]),
        )
        places = [slice(0, lengths[0]), slice(lengths[0], sum(lengths))]
        parts = list(zip(places, sources, strict=False))
        policy = options.policy("encoder", len(self.layers))
        collected = [] if output_attentions else None
        stream = self._run_stream(joint, parts, len(self.layers), policy, output_hidden_states, collected)
        return [stream], tuple(collected or ())

    def _run_stream(
        self,
        source: _Source,
        parts: list[tuple[slice, _Source]],
        num_layers: int,
        policy: ExitPolicy,
        output_hidden_states: bool,
        attentions: list | None,
    ) -> StackResult:
        """Runs the first layers over one sequence; `parts` are the places in it that have relative position biases."""
        states, mask, rows = source.states, source.mask, None
        if mask is not None:
            states = states * mask.unsqueeze(-1)
            present = mask.any(dim=1)
            if not known_true(present) and not mask.is_meta and not torch.compiler.is_compiling():
                rows = present.cpu().nonzero().flatten()
                if mask[present].all():
                    # samples without an image take no part, those with one have all patches
                    mask = None
        layer_bias = _LayerBias(self._position_scores(source), parts, self.config.image_bucket_size)

        def run_layer(layer: int, states: Tensor, rows: Tensor | None) -> Tensor:
            bias = layer_bias(layer).unsqueeze(0)
            if mask is not None:
                keys = mask if rows is None else mask[rows]
                bias = bias.masked_fill(~keys[:, None, None, :], mask_value(bias))
            if attentions is None:
                return self.layers[layer](states, bias)
            states, weights = self.layers[layer](states, bias, output_attentions=True)
            attentions.append(_spread(weights, rows, source.states.shape[0]))
            return states

        decider = ExitDecider(policy, mask)
        return run_stack(states, num_layers, run_layer, decider, rows, output_hidden_states)

    def _position_scores(self, source: _Source) -> Tensor:
        """Scores [heads, tokens, tokens] of absolute positions, the same in all layers."""
        heads, factor, positions = self.config.encoder_attention_heads, self.config.attn_scale_factor, source.positions
        dtype = None if self.engine is None else self.engine.attention
        return position_scores(self.pos_q_linear, self.pos_k_linear, positions, positions, heads, factor, dtype)

    def _add_exit_layers(
        self,
        output: MuEEncoderOutput,
        image: _Source | None,
        text: _Source | None,
        repeats: int,
        streams: list[StackResult],
    ) -> None:
        batch, device = output.last_hidden_state.shape[0], output.last_hidden_state.device
        depths, executed, of_source = {}, {}, iter(streams)
        for name, source in (("image", image), ("text", text)):
            depths[name], executed[name] = torch.zeros(batch, dtype=torch.long), 0
            if source is None:
                continue
            stream = next(of_source) if self.config.modality_decomposition else streams[0]
            executed[name] = stream.executed
            if not self.config.modality_decomposition:
                executed[name] = stream.executed // stream.states.shape[1] * source.states.shape[1]
            depths[name] = stream.depths
            if source.mask is not None:
                present = source.mask.any(dim=1).cpu()
                depths[name] = stream.depths * (
                    present.repeat_interleave(repeats) if name == "image" and repeats > 1 else present
                )
        output.image_exit_layers, output.text_exit_layers = depths["image"].to(device), depths["text"].to(device)
        output.executed_layers = executed


def _becomes_graph() -> bool:
    """Whether what is computed becomes part of a graph: to differentiate, to compile or to export."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def check_attentions(config: Any, output_attentions: bool | None) -> None:
    """Raises a ValueError if attention weights are asked for and this attention does not give them."""
    if output_attentions and config._attn_implementation == "onnxruntime":
        raise ValueError(
            '`output_attentions=True` needs attention in torch, which `engine="onnxruntime"` has in its graphs; load '
            'the model without `engine`, with `attn_implementation="eager"`.'
        )
    if output_attentions and config._attn_implementation != "eager":
        raise ValueError(
            f"`output_attentions=True` needs eager attention, got {config._attn_implementation!r}; "
            'call `model.set_attn_implementation("eager")` first.'
        )


def check_token_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises a ValueError unless ids [batch, length] lie in the vocabulary."""
    if ids.dim() != 2:
        raise ValueError(f"`{name}` must have the shape [batch, length], got {list(ids.shape)}.")
    if ids.numel() and not ids.is_meta and not torch.compiler.is_compiling():
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


def _joined_history(streams: list[StackResult]) -> tuple[Tensor, ...]:
    """States after every layer of all streams side by side; a shorter stream repeats its last ones."""
    if len(streams) == 1:
        return streams[0].hidden_states
    depth = max(len(stream.hidden_states) for stream in streams)
    return tuple(
        torch.cat([s.hidden_states[min(i, len(s.hidden_states) - 1)] for s in streams], dim=1) for i in range(depth)
    )


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


__all__ = ["MuEEncoder", "MuEEncoderOutput", "check_attentions", "check_token_ids"]
