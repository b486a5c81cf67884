"""The reference that speed is compared with: the same weights, decoded as transformers' `generate` does by itself.

The encoder's output is repeated for every beam, each row projects its own cross-attention keys and values into
transformers' `EncoderDecoderCache`, which reorders them at every step, position biases are recomputed at every step,
every row runs its prompt, products are torch's own `linear`, and the head covers the whole vocabulary. It is no straw
man: a position bias is made once for all rows and for the new token alone, attention is the model's own, and so are
the layers of the encoder.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from ..model.encoder_mue import MuEEncoderOutput
from ..model.layers_mue import MuEDecoderLayer, mask_value, position_scores, relative_bias, text_relative_index


class StockEncoder(nn.Module):
    """The model's encoder without exits, its trunk run layer by layer as it was trained."""

    main_input_name = "input_ids"

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> MuEEncoderOutput:
        """Takes what `generate` passes to an encoder; `kwargs` hold outputs that nobody asked for."""
        encoder = self.encoder
        if attention_mask is None:
            attention_mask = input_ids != encoder.config.pad_token_id
        features = encoder.embed_images(pixel_values).feature_maps[-1]
        # Embedded tokens are not recognised as one prompt for all rows.
        embeds = encoder.embed_tokens(input_ids)
        return encoder(inputs_embeds=embeds, attention_mask=attention_mask, image_features=features)


class StockLinear(nn.Module):
    """torch's own product with the weights of a linear layer."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.linear.weight, self.linear.bias)


class StockAttention(nn.Module):
    """Attention of a decoder layer by torch's own products."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            StockLinear(linear)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        )

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [rows, tokens, d] -> keys and values [rows, heads, tokens, head dim]."""
        split = self.attention.split_heads
        return split(self.k_proj(states)), split(self.v_proj(states))

    def forward(self, states: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        query = self.attention.split_heads(self.q_proj(states))
        return self.out_proj(self.attention.attend(query, keys, values, bias)[0])


class StockDecoderLayer(nn.Module):
    """A decoder layer on transformers' cache.

    Args:
        layer (`MuEDecoderLayer`): whose weights it runs.
        index (`int`): its place in the stack.
    """

    def __init__(self, layer: MuEDecoderLayer, index: int):
        super().__init__()
        self.layer, self.index = layer, index
        self.self_attn, self.cross_attn = StockAttention(layer.self_attn), StockAttention(layer.cross_attn)
        self.fc1, self.fc2 = StockLinear(layer.fc1), StockLinear(layer.fc2)

    def forward(
        self, states: Tensor, encoder_states: Tensor, self_bias: Tensor, cross_bias: Tensor, cache: Cache
    ) -> Tensor:
        """States [rows, tokens, d] over encoder states [rows, source, d] -> states."""
        layer = self.layer
        normed = layer.self_attn_layer_norm(states)
        keys, values = cache.self_attention_cache.update(*self.self_attn.keys_values(normed), self.index)
        states = states + layer.self_attn_mid_layer_norm(self.self_attn(normed, keys, values, self_bias))

        cross = cache.cross_attention_cache
        if cache.is_updated.get(self.index):
            keys, values = cross.layers[self.index].keys, cross.layers[self.index].values
        else:
            keys, values = cross.update(*self.cross_attn.keys_values(encoder_states), self.index)
            cache.is_updated[self.index] = True
        output = self.cross_attn(layer.cross_attn_layer_norm(states), keys, values, cross_bias)
        states = states + layer.cross_attn_mid_layer_norm(output)
        hidden = layer.activation_fn(self.fc1(layer.final_layer_norm(states)))
        return states + self.fc2(layer.ffn_layer_norm(hidden))


class StockModel(PreTrainedModel, GenerationMixin):
    """The weights of a `MuEForConditionalGeneration` behind transformers' own cache and generation loop, exits off.

    Args:
        model (`MuEForConditionalGeneration`): its modules are used, not copied; a user of plain transformers would not
            have its batch norms folded.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, model: PreTrainedModel):
        super().__init__(model.config)
        self.model = model
        self.generation_config = model.generation_config
        self.encoder = StockEncoder(model.get_encoder())
        layers = model.get_decoder().layers
        self.layers = nn.ModuleList([StockDecoderLayer(layer, index) for index, layer in enumerate(layers)])
        self.lm_head = StockLinear(model.lm_head)
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
        past, tokens = cache.get_seq_length(), decoder_input_ids.shape[1]
        states = decoder.layernorm_embedding(decoder.embed_tokens(decoder_input_ids))

        heads, factor = config.decoder_attention_heads, config.attn_scale_factor
        positions = decoder.pos_ln(decoder.embed_positions.weight[: past + tokens])
        new = positions[past:]
        scores = position_scores(decoder.self_pos_q_linear, decoder.self_pos_k_linear, new, positions, heads, factor)
        later = torch.ones(tokens, past + tokens, dtype=torch.bool, device=scores.device).triu(past + 1)
        scores = scores.masked_fill(later, mask_value(scores))
        index = text_relative_index(
            past + tokens, config.token_bucket_size, config.max_position_embeddings, scores.device
        )[past:]
        # All rows have the same encoder positions.
        source = encoder_outputs.position_embeddings[0]
        cross_bias = position_scores(
            decoder.cross_pos_q_linear, decoder.cross_pos_k_linear, new, source, heads, factor
        ).unsqueeze(0)
        mask = encoder_outputs.attention_mask
        if not bool(mask.all()):
            cross_bias = cross_bias.masked_fill(~mask[:, None, None, :], mask_value(cross_bias))
        for number, layer in enumerate(self.layers):
            self_bias = (scores + relative_bias(decoder.token_rel_pos_table_list[number], index)).unsqueeze(0)
            states = layer(states, encoder_outputs.last_hidden_state, self_bias, cross_bias, cache)
        return Seq2SeqLMOutput(logits=self.lm_head(decoder.layer_norm(states)), cache=cache)


__all__ = ["StockModel"]
