"""The slow obvious way, which fast paths are compared with: one row, no cache, plain formulae, recomputed."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu, linear

from mue_hf.model.layers_mue import position_scores, relative_bias, text_relative_index


def attention(module, x: Tensor, source: Tensor, bias: Tensor) -> Tensor:
    """x [q, d] attends to source [k, d] under an additive bias [h, q, k]."""
    d, h = x.shape[-1], module.num_heads

    def heads(states: Tensor) -> Tensor:
        return states.view(len(states), h, d // h).transpose(0, 1)

    q, k, v = heads(module.q_proj(x)), heads(module.k_proj(source)), heads(module.v_proj(source))
    weights = (q @ k.transpose(1, 2) / math.sqrt(2 * d // h) + bias).softmax(-1)
    mixed = (weights @ v) * module.c_attn.view(-1, 1, 1)
    return module.out_proj(mixed.transpose(0, 1).reshape(len(x), d))


def feed_forward(layer, x: Tensor) -> Tensor:
    return x + layer.fc2(layer.ffn_layer_norm(gelu(layer.fc1(layer.final_layer_norm(x)))))


def decoder_layer(layer, x: Tensor, keys_from: Tensor, bias: Tensor, encoded: Tensor, cross_bias: Tensor) -> Tensor:
    """New tokens x [n, d]; `keys_from` [k, d] are the inputs of this layer that make keys and values, x's included."""
    y = attention(layer.self_attn, layer.self_attn_layer_norm(x), layer.self_attn_layer_norm(keys_from), bias)
    x = x + layer.self_attn_mid_layer_norm(y)
    y = attention(layer.cross_attn, layer.cross_attn_layer_norm(x), encoded, cross_bias)
    return feed_forward(layer, x + layer.cross_attn_mid_layer_norm(y))


def encoder_stream(model, states: Tensor, scores: Tensor, tables, index: Tensor, threshold=None) -> tuple[Tensor, int]:
    """One sample's stream [n, d] with the authors' decision: one flattened vector per layer, strict comparison."""
    encoder = model.model.encoder
    depth = 0
    for layer, table in zip(encoder.layers, tables, strict=True):
        depth += 1
        normed = layer.self_attn_layer_norm(states)
        y = attention(layer.self_attn, normed, normed, scores + relative_bias(table, index))
        new = feed_forward(layer, states + layer.self_attn_mid_layer_norm(y))
        similarity = cosine_similarity(new.reshape(1, -1), states.reshape(1, -1)).item()
        states = new
        if threshold is not None and similarity > threshold:
            break
    return states, depth


class Row:
    """One decoder row that grows token by token, by a key/value policy ("project" or "exact")."""

    def __init__(self, model, encoded: Tensor, positions: Tensor, policy: str, length: int = 40):
        self.model, self.decoder, self.encoded, self.policy = model, model.model.decoder, encoded, policy
        decoder, config = self.decoder, model.config
        p = decoder.pos_ln(decoder.embed_positions.weight[:length])
        heads, factor = config.decoder_attention_heads, config.attn_scale_factor
        self.scores = position_scores(decoder.self_pos_q_linear, decoder.self_pos_k_linear, p, p, heads, factor)
        self.cross = position_scores(
            decoder.cross_pos_q_linear, decoder.cross_pos_k_linear, p, positions, heads, factor
        )
        self.index = text_relative_index(length, config.token_bucket_size, config.max_position_embeddings, p.device)
        # per token: its input to every layer, as far as it has been computed
        self.inputs: list[list[Tensor]] = []

    def _step(self, layer: int, token: int, upto: int) -> Tensor:
        """Layer `layer` on token `token`, attending to tokens 0..token by what they hold for that layer."""
        held = [states[min(layer, len(states) - 1)] for states in self.inputs[:upto]]
        bias = self.scores + relative_bias(self.decoder.token_rel_pos_table_list[layer], self.index)
        return decoder_layer(
            self.decoder.layers[layer],
            self.inputs[token][layer][None],
            torch.stack(held),
            bias[:, token : token + 1, :upto],
            self.encoded,
            self.cross[:, token : token + 1],
        )[0]

    def push(self, token_id: int, thresholds: list[float]) -> tuple[Tensor, int]:
        """Adds a token under one threshold per layer; returns the logits of its exit and its depth."""
        decoder = self.decoder
        self.inputs.append([decoder.layernorm_embedding(decoder.embed_tokens.weight[token_id])])
        new = len(self.inputs) - 1
        for layer, threshold in enumerate(thresholds):
            if self.policy == "exact":
                for token in range(new):
                    if len(self.inputs[token]) == layer + 1:
                        self.inputs[token].append(self._step(layer, token, token + 1))
            state = self._step(layer, new, new + 1)
            similarity = cosine_similarity(state, self.inputs[new][layer], dim=0).item()
            self.inputs[new].append(state)
            if similarity > threshold:
                break
        return linear(decoder.layer_norm(state), self.model.lm_head.weight), layer + 1
