"""OFA's building blocks: attention with scaled heads and an additive position bias, and the two kinds of layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_mue import MuECache
from .views_mue import ImageView, TokenView


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + attention_mask) v. Takes [batch, heads, tokens, head dim], returns the output as
    [batch, tokens, heads, head dim] and the weights [batch, heads, queries, keys]."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# Values of a matrix that caches do not hold.
LARGE = 2**22


class MuELinear(nn.Linear):
    """A linear layer that two to five rows pass at little more than the price of one, in inference on a CPU.

    MKL's product of so few rows with a matrix reads that matrix up to once per row. The transposed product does not;
    it wins by 1.1 to 3 where the layer does not narrow (docs/speed.md)."""

    def forward(self, states: Tensor) -> Tensor:
        return few_rows_linear(states, self.weight, self.bias)


def few_rows_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """states [..., in] @ weight [out, in]^T + bias, see [`MuELinear`]."""
    width = states.shape[-1]
    rows = states.numel() // max(width, 1)
    if (
        # first: a comparison of rows would become part of the graph
        torch.compiler.is_compiling()
        or not 2 <= rows <= 5
        or not (width <= weight.shape[0] <= 4 * width or weight.numel() >= LARGE)
        or states.dtype != torch.float32
        or states.device.type != "cpu"
        or torch.is_grad_enabled()
        or not torch.backends.mkl.is_available()
    ):
        return nn.functional.linear(states, weight, bias)
    columns = states.reshape(rows, width).t()
    product = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.t().contiguous().unflatten(0, states.shape[:-1])


class MuEOutputHead(MuELinear):
    """The output head, which computes the asked-for rows of the vocabulary only."""

    takes_ids = True

    def forward(self, states: Tensor, ids: slice | Tensor | None = None) -> Tensor:
        """States [..., d] -> logits [..., vocabulary]; -inf outside of the token `ids`, which are all by default."""
        if ids is None:
            return super().forward(states)
        some = few_rows_linear(states, self.weight[ids], None if self.bias is None else self.bias[ids])
        logits = some.new_full((*some.shape[:-1], self.out_features), -torch.inf)
        logits[..., ids] = some
        return logits


class CandidateHead:
    """The rows of an output head that belong to some tokens, taken out once.

    Args:
        head (`nn.Module`): the output head.
        ids (`LongTensor` [candidates], *optional*): the tokens; all by default.
    """

    def __init__(self, head: nn.Module, ids: Tensor | None):
        self.head, self.ids, self.weight, self.bias = head, ids, None, None
        # offloaded weights are there inside the head's own call alone, and a replaced head may be more than a matrix
        if getattr(head, "takes_ids", False) and not head.weight.is_meta:
            rows = slice(None) if ids is None else ids.to(head.weight.device)
            bias = getattr(head, "bias", None)
            self.weight, self.bias = head.weight[rows], None if bias is None else bias[rows]

    def __call__(self, states: Tensor) -> Tensor:
        """States [rows, d] -> logits [rows, candidates]."""
        if self.ids is None:
            return self.head(states)
        if self.weight is None:
            return self.head(states)[:, self.ids.to(states.device)]
        return few_rows_linear(states, self.weight, self.bias)

    def at(self, states: Tensor, places: Tensor) -> Tensor:
        """States [rows, d] -> logits of a few candidates of each row, by their places [rows, few]."""
        if self.weight is None:
            return self(states).gather(1, places)
        # this way round, which is the faster one for several rows
        logits = torch.bmm(states.unsqueeze(1), self.weight[places].transpose(1, 2)).squeeze(1)
        return logits if self.bias is None else logits + self.bias[places]


class NormedHead:
    """A layer norm, and a head on what it gives: states [rows, d] -> logits, as a [`CandidateHead`] does."""

    def __init__(self, norm: nn.Module, head: Callable[[Tensor], Tensor]):
        self.norm, self.head = norm, head

    def __call__(self, states: Tensor) -> Tensor:
        return self.head(self.norm(states))

    def at(self, states: Tensor, places: Tensor) -> Tensor:
        states = self.norm(states)
        if isinstance(self.head, CandidateHead):
            return self.head.at(states, places)
        return self.head(states).gather(1, places)


class MuEAttention(nn.Module):
    """Multi-head attention of OFA: content and position scores are added, each head has a learned scale `c_attn`."""

    def __init__(self, config: Any, num_heads: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = config.d_model // num_heads
        self.scaling = (self.head_dim * config.attn_scale_factor) ** -0.5
        self.is_causal = False
        self.k_proj = MuELinear(config.d_model, config.d_model)
        self.v_proj = MuELinear(config.d_model, config.d_model)
        self.q_proj = MuELinear(config.d_model, config.d_model)
        self.out_proj = MuELinear(config.d_model, config.d_model)
        self.c_attn = nn.Parameter(torch.ones(num_heads))

    def split_heads(self, states: Tensor) -> Tensor:
        """[batch, tokens, d] -> [batch, heads, tokens, head dim]."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, tokens, head dim] of states [batch, tokens, d]."""
        return self.split_heads(self.k_proj(states)), self.split_heads(self.v_proj(states))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Heads-first tensors and an additive bias [batch or 1, heads, queries, keys] -> [batch, queries, d]."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask=None if bias is None else bias.to(query.dtype),
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        return (output * self.c_attn.unsqueeze(-1)).flatten(2), weights

    def forward(
        self, hidden_states: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, view: ImageView | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries from hidden_states [batch, tokens, d] over given keys and values. Returns output and weights.

        Args:
            view (`ImageView`, *optional*): which keys and values each row attends to: rows that share them are folded
                into the query length, as `bias` is. By default each row has its own.
        """
        query = self.split_heads(self.q_proj(hidden_states))
        if view is None:
            output, weights = self.attend(query, keys, values, bias)
            return self.out_proj(output), weights
        query = view.fold(query)
        parts = (
            self.attend(query[q], keys[kv], values[kv], bias if bias.shape[0] == 1 else bias[q]) for q, kv in view.runs
        )
        outputs, folded = zip(*parts, strict=True)
        output = view.unfold(torch.cat(outputs) if len(outputs) > 1 else outputs[0])
        return self.out_proj(output), view.unfold_weights(folded)


def drop_path(states: Tensor, rate: float) -> Tensor:
    """Stochastic depth: zeroes whole samples of a residual branch [batch, ...] with probability `rate`."""
    if rate == 0.0:
        return states
    keep = states.new_empty(states.shape[0], *[1] * (states.dim() - 1)).bernoulli_(1.0 - rate)
    return states * keep / (1.0 - rate)


class _MuELayer(GradientCheckpointingLayer):
    """What both kinds of layer share: the self-attention's projections and the feed-forward block (NormFormer)."""

    def __init__(self, config: Any, num_heads: int, ffn_dim: int, drop_path_rate: float):
        super().__init__()
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.drop_path_rate = drop_path_rate
        self.self_attn = MuEAttention(config, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn_mid_layer_norm = nn.LayerNorm(config.d_model)
        self.activation_fn = ACT2FN[config.activation_function]
        self.fc1 = MuELinear(config.d_model, ffn_dim)
        self.ffn_layer_norm = nn.LayerNorm(ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def residual(self, states: Tensor, branch: Tensor) -> Tensor:
        if self.training:
            branch = drop_path(nn.functional.dropout(branch, self.dropout), self.drop_path_rate)
        return states + branch

    def feed_forward(self, states: Tensor) -> Tensor:
        hidden = self.activation_fn(self.fc1(self.final_layer_norm(states)))
        if self.training:
            hidden = nn.functional.dropout(hidden, self.activation_dropout)
        return self.residual(states, self.fc2(self.ffn_layer_norm(hidden)))


class MuEEncoderLayer(_MuELayer):
    """One encoder layer, used by the image stream, the text stream, and the joint sequence alike."""

    def __init__(self, config: Any, layer_idx: int):
        rate = config.encoder_drop_path_rate * layer_idx / max(config.encoder_layers - 1, 1)
        super().__init__(config, config.encoder_attention_heads, config.encoder_ffn_dim, rate)

    def forward(
        self, hidden_states: Tensor, position_bias: Tensor, output_attentions: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """States [rows, tokens, d] and an additive bias [rows or 1, heads, tokens, tokens] that also masks -> states,
        and attention weights if asked for."""
        states = self.self_attn_layer_norm(hidden_states)
        output, weights = self.self_attn(states, *self.self_attn.keys_values(states), position_bias)
        states = self.feed_forward(self.residual(hidden_states, self.self_attn_mid_layer_norm(output)))
        return (states, weights) if output_attentions else states


class MuEDecoderLayer(_MuELayer):
    """One decoder layer: causal self-attention, attention to the encoder's output, feed-forward."""

    def __init__(self, config: Any, layer_idx: int):
        rate = config.decoder_drop_path_rate * layer_idx / max(config.decoder_layers - 1, 1)
        super().__init__(config, config.decoder_attention_heads, config.decoder_ffn_dim, rate)
        self.layer_idx = layer_idx
        self.cross_attn = MuEAttention(config, config.decoder_attention_heads)
        self.cross_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attn_mid_layer_norm = nn.LayerNorm(config.d_model)

    def project_self(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention keys and values [rows, heads, tokens, head dim] that this layer makes of its input."""
        return self.self_attn.keys_values(self.self_attn_layer_norm(states))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        self_bias: Tensor,
        cross_bias: Tensor,
        tokens: TokenView,
        images: ImageView,
        cache: MuECache | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """States [rows, tokens, d] -> states, and weights of both attentions if asked for.

        Args:
            encoder_hidden_states (`Tensor` [images, source, d]): what cross-attention keys are made of, once.
            self_bias (`Tensor` [rows or 1, heads, tokens, keys]): additive bias of the self-attention; it also masks.
                Folded where the view of the tokens says how.
            cross_bias (`Tensor` [images or 1, heads, folded tokens or 1, source]): the same for cross-attention.
            tokens (`TokenView`): which rows and positions these are.
            images (`ImageView`): which image each row belongs to.
            cache (`MuECache`, *optional*): takes the new keys and values and returns them with the older ones.
        """
        states = self.self_attn_layer_norm(hidden_states)
        keys, values = self.self_attn.keys_values(states)
        if cache is not None:
            keys, values = cache.update_self(self.layer_idx, keys, values, tokens, self.project_self)
        # the export of a layer passes no tokens
        fold = None if tokens is None else tokens.fold
        output, self_weights = self.self_attn(states, keys, values, self_bias, fold)
        hidden_states = self.residual(hidden_states, self.self_attn_mid_layer_norm(output))

        if cache is None:
            keys, values = self.cross_attn.keys_values(encoder_hidden_states)
        else:
            project = self.cross_attn.keys_values
            keys, values = cache.cross(self.layer_idx, project, encoder_hidden_states, images.images)
        states = self.cross_attn_layer_norm(hidden_states)
        output, cross_weights = self.cross_attn(states, keys, values, cross_bias, images)
        hidden_states = self.residual(hidden_states, self.cross_attn_mid_layer_norm(output))
        states = self.feed_forward(hidden_states)
        return (states, self_weights, cross_weights) if output_attentions else states


def position_scores(
    query: nn.Linear,
    key: nn.Linear,
    q_states: Tensor,
    k_states: Tensor,
    heads: int,
    factor: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """OFA's decoupled absolute positions: position embeddings [queries, d] and [keys, d] -> scores [heads, q, k],
    computed in `dtype` where it is given."""
    head_dim = query.out_features // heads
    q = (query(q_states) * (head_dim * factor) ** -0.5).unflatten(-1, (heads, head_dim)).transpose(0, 1)
    k = key(k_states).unflatten(-1, (heads, head_dim)).transpose(0, 1)
    if dtype is not None:
        q, k = q.to(dtype), k.to(dtype)
    return q @ k.transpose(-1, -2)


def table_rows(table: nn.Embedding, device: torch.device, count: int | None = None) -> Tensor:
    """The first `count` rows [count, d] of an embedding, all by default. The module is called, since the hooks that
    bring offloaded weights do not see a weight being read."""
    return table(torch.arange(table.num_embeddings if count is None else count, device=device))


def relative_bias(table: nn.Embedding, index: Tensor) -> Tensor:
    """Looks up indices [queries, keys] in a table [buckets, heads]; returns [heads, queries, keys]."""
    return table_rows(table, index.device).t()[:, index]


def known_true(mask: Tensor) -> bool:
    """Whether a mask is True everywhere; False where nobody knows, on the meta device and in a graph."""
    return not mask.is_meta and not torch.compiler.is_compiling() and bool(mask.all())


def text_relative_index(length: int, bucket_size: int, max_positions: int, device: torch.device) -> Tensor:
    """Indices [length, length] (query, key) into the text's relative position table of 2 * bucket_size - 1 rows.

    Distances up to half of bucket_size have a bucket each, farther ones share logarithmic buckets.
    """
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    middle = bucket_size // 2
    far = (distance.abs().clamp_min(1).double() / middle).log() / math.log((max_positions - 1) / middle)
    far = ((far * (middle - 1)).ceil().long() + middle).clamp(max=bucket_size - 1) * distance.sign()
    return (torch.where(distance.abs() <= middle, distance, far) + bucket_size - 1).to(device)


def mask_value(bias: Tensor) -> float:
    """What a masked place of a bias holds. It is finite, so that a row with nothing to attend to gives no NaN."""
    return torch.finfo(bias.dtype).min


__all__ = [
    "CandidateHead",
    "MuEAttention",
    "MuEDecoderLayer",
    "MuEEncoderLayer",
    "MuELinear",
    "MuEOutputHead",
    "NormedHead",
    "known_true",
    "mask_value",
    "position_scores",
    "relative_bias",
    "table_rows",
    "text_relative_index",
]
