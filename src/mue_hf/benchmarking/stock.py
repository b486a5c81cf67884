"""The reference that speed is compared with: the same weights, decoded as transformers' `generate` does by itself.

The encoder's output is repeated for every beam, each row projects its own cross-attention keys and values into
transformers' `EncoderDecoderCache`, which reorders them at every step, position biases are recomputed at every step,
every row runs its prompt, products are torch's own `linear`, batch norms are not folded, and the head covers the whole
vocabulary. It is no straw man: a position bias is made once for all rows and for the new token alone, and the layers
are the model's own.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from ..model.encoder_mue import MuEEncoderOutput
from ..model.layers_mue import MuELinear, known_true, mask_value, position_scores, relative_bias, text_relative_index
from ..model.views_mue import ImageView


def unfolded_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second model on the same weights, but for those of the trunk: its batch norms are not folded."""
    trunk = model.get_encoder().embed_images
    own = {id(tensor) for tensor in (*trunk.parameters(), *trunk.buffers())}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, {key: tensor for key, tensor in tensors.items() if key not in own})
    copy.unfold_batch_norms()
    return copy


class StockEncoder(nn.Module):
    """The model's encoder without exits."""

    main_input_name = "input_ids"

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, **_: Any) -> MuEEncoderOutput:
        # All pixels at once; and embedded tokens, which are not recognised as one prompt for all rows.
        features = self.encoder.embed_images(pixel_values).feature_maps[-1]
        embeds = self.encoder.embed_tokens(input_ids)
        return self.encoder(inputs_embeds=embeds, attention_mask=attention_mask, image_features=features)


class StockCache:
    """transformers' cache as decoder layers write to it and read from it."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def update_self(self, layer: int, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return self.cache.self_attention_cache.update(keys, values, layer)

    def cross(
        self, layer: int, project: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        cross = self.cache.cross_attention_cache
        if self.cache.is_updated.get(layer):
            return cross.layers[layer].keys, cross.layers[layer].values
        self.cache.is_updated[layer] = True
        return cross.update(*project(states), layer)


class StockModel(PreTrainedModel, GenerationMixin):
    """The weights of a `MuEForConditionalGeneration` behind transformers' own cache and generation loop, exits off.

    Args:
        model (`MuEForConditionalGeneration`): its modules are copied, its weights but the trunk's are shared.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, model: PreTrainedModel):
        model = unfolded_copy(model)
        super().__init__(model.config)
        self.model, self.lm_head = model, model.lm_head
        self.generation_config = model.generation_config
        self.encoder = StockEncoder(model.get_encoder())
        for module in (*model.get_decoder().layers.modules(), self.lm_head):
            if isinstance(module, MuELinear):
                module.__class__ = nn.Linear
        self.eval()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: MuEEncoderOutput | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """One step of `generate`, which passes `encoder_outputs`, `cache` and the new `decoder_input_ids`."""
        decoder, config = self.model.get_decoder(), self.config
        rows, tokens = decoder_input_ids.shape
        past = cache.get_seq_length()
        states = decoder.layernorm_embedding(decoder.embed_tokens(decoder_input_ids))

        sizes = config.decoder_attention_heads, config.attn_scale_factor
        positions = decoder.pos_ln(decoder.embed_positions.weight[: past + tokens])
        new = positions[past:]
        scores = position_scores(decoder.self_pos_q_linear, decoder.self_pos_k_linear, new, positions, *sizes)
        later = torch.ones(tokens, past + tokens, dtype=torch.bool, device=scores.device).triu(past + 1)
        scores = scores.masked_fill(later, mask_value(scores))
        index = text_relative_index(
            past + tokens, config.token_bucket_size, config.max_position_embeddings, scores.device
        )[past:]
        # All rows have the same encoder positions.
        source = encoder_outputs.position_embeddings[0]
        cross_bias = position_scores(decoder.cross_pos_q_linear, decoder.cross_pos_k_linear, new, source, *sizes)
        mask, view = encoder_outputs.attention_mask, ImageView(None, rows, rows)
        cross_bias = view.fold_bias(cross_bias, None if known_true(mask) else mask)
        for layer, table in zip(decoder.layers, decoder.token_rel_pos_table_list, strict=True):
            self_bias = (scores + relative_bias(table, index)).unsqueeze(0)
            biases = self_bias, cross_bias
            states = layer(states, encoder_outputs.last_hidden_state, *biases, None, view, StockCache(cache))
        return Seq2SeqLMOutput(logits=self.lm_head(decoder.layer_norm(states)), cache=cache)


__all__ = ["StockModel", "unfolded_copy"]
