"""The parts of a model between two exit decisions as modules that become one ONNX graph each, with example inputs.

Weights that follow each other are joined: queries, keys and values are one matrix, attention's scale is in the queries
and the scale of each head in the output projection.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model.graph_files_mue import LINEAR, OPSET
from ..model.modeling_mue import MuEForConditionalGeneration

# Weights of fewer bytes stay in the graph, whose shapes are among them; others begin at a page of memory.
SMALLEST, PAGE = 1024, 4096


class Matrix(nn.Module):
    """Linear layers side by side as one matrix [in, out], as int8 kernels want it: states [..., in] -> [..., out]."""

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        self.weight = nn.Buffer(torch.cat([layer.weight for layer in layers]).t().contiguous())
        biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        self.bias = nn.Buffer(torch.cat(biases)) if any(layer.bias is not None for layer in layers) else None

    def forward(self, states: Tensor) -> Tensor:
        product = states @ self.weight
        return product if self.bias is None else product + self.bias


class Attention(nn.Module):
    """The matrices of a `MuEAttention`, and the product of queries that are scaled already with keys and values."""

    def __init__(self, attention: nn.Module, joined: bool):
        super().__init__()
        self.heads, width = attention.num_heads, attention.head_dim
        self.query = Matrix(attention.q_proj)
        self.query.weight *= attention.scaling
        self.query.bias *= attention.scaling
        self.keys_values = Matrix(attention.k_proj, attention.v_proj)
        if joined:
            both = self.query, self.keys_values
            self.query_keys_values = Matrix(attention.q_proj, attention.k_proj, attention.v_proj)
            self.query_keys_values.weight = nn.Buffer(torch.cat([part.weight for part in both], dim=1))
            self.query_keys_values.bias = nn.Buffer(torch.cat([part.bias for part in both]))
            del self.query, self.keys_values
        self.output = Matrix(attention.out_proj)
        self.output.weight *= attention.c_attn.repeat_interleave(width).unsqueeze(1)

    def split(self, states: Tensor) -> Tensor:
        """[batch, tokens, d] -> [batch, heads, tokens, head dim]."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """[batch, tokens, d] over [batch, heads, keys, head dim], with a bias that broadcasts to the scores."""
        scores = self.split(query) @ keys.transpose(-1, -2) + bias
        return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """The feed-forward block of a layer, its residual included."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.first_norm, self.first = layer.final_layer_norm, Matrix(layer.fc1)
        self.activation = layer.activation_fn
        self.second_norm, self.second = layer.ffn_layer_norm, Matrix(layer.fc2)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.activation(self.first(self.first_norm(states)))
        return states + self.second(self.second_norm(hidden))


class EncoderProjection(nn.Module):
    """States [rows, tokens, d] -> queries, which are scaled, keys and values of the self-attention, side by side
    [rows, tokens, 3 d]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.norm, self.attention = layer.self_attn_layer_norm, Attention(layer.self_attn, joined=True)
        del self.attention.output

    def forward(self, states: Tensor) -> Tensor:
        return self.attention.query_keys_values(self.norm(states))


class EncoderLayer(nn.Module):
    """The rest of an encoder layer: states, and what their attention gave [rows, tokens, d] -> states."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention = Attention(layer.self_attn, joined=True)
        self.mid_norm, self.feed_forward = layer.self_attn_mid_layer_norm, FeedForward(layer)
        del self.attention.query_keys_values

    def forward(self, states: Tensor, attended: Tensor) -> Tensor:
        return self.feed_forward(states + self.mid_norm(self.attention.output(attended)))


class DecoderProjection(nn.Module):
    """States [rows, tokens, d] -> keys and values [rows, heads, tokens, head dim] of the self-attention, for tokens
    that skipped the layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.norm, self.attention = layer.self_attn_layer_norm, Attention(layer.self_attn, joined=False)
        del self.attention.query, self.attention.output

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.attention.keys_values(self.norm(states)).chunk(2, dim=-1)
        return self.attention.split(keys), self.attention.split(values)


def look_up(tokens: Tensor, states: Tensor) -> Tensor:
    """The states [..., d] of some tokens, by their places among the states [rows, tokens, d] of all."""
    return nn.functional.embedding(tokens, states.flatten(0, 1))


class DecoderLayer(nn.Module):
    """A whole decoder layer.

    Inputs: states [rows, tokens, d]; keys and values [rows, heads, past, head dim] of earlier positions; `own` [rows,
    new], the tokens of the call, counted over all rows, that each row has behind these; a bias [rows or 1, heads,
    tokens, past + new]; keys and values of the cross-attention [images, heads, source, head dim]; `fold` [images,
    queries], the token of each query of an image, any where a place is free; a bias [images or 1, heads, queries or 1,
    source] of these; and `unfold` [rows, tokens], the place of each token among all queries.

    Outputs: states, and keys and values [rows, heads, past + new, head dim].
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.norm, self.attention = layer.self_attn_layer_norm, Attention(layer.self_attn, joined=True)
        self.mid_norm = layer.self_attn_mid_layer_norm
        self.cross, self.cross_norm = Attention(layer.cross_attn, joined=False), layer.cross_attn_layer_norm
        self.cross_mid_norm, self.feed_forward = layer.cross_attn_mid_layer_norm, FeedForward(layer)
        del self.cross.keys_values

    def forward(
        self,
        states: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        own: Tensor,
        bias: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
        fold: Tensor,
        cross_bias: Tensor,
        unfold: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention, width = self.attention, states.shape[-1]
        query, new = attention.query_keys_values(self.norm(states)).split((width, 2 * width), dim=-1)
        # keys and values as twice as many heads
        new = look_up(own, new).unflatten(-1, (2 * attention.heads, -1)).transpose(1, 2)
        keys, values = (torch.cat(pair, dim=2) for pair in zip((past_keys, past_values), new.chunk(2, 1), strict=True))
        output = attention.attend(query, keys, values, bias)
        states = states + self.mid_norm(attention.output(output))
        query = look_up(fold, self.cross.query(self.cross_norm(states)))
        output = look_up(unfold, self.cross.attend(query, cross_keys, cross_values, cross_bias))
        states = self.feed_forward(states + self.cross_mid_norm(self.cross.output(output)))
        return states, keys, values


class CrossProjection(nn.Module):
    """The encoder's states [images, source, d] -> keys and values [images, heads, source, head dim] of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention = Attention(layer.cross_attn, joined=False)
        del self.attention.query, self.attention.output

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.attention.keys_values(states).chunk(2, dim=-1)
        return self.attention.split(keys), self.attention.split(values)


class Trunk(nn.Module):
    """Pixels [images, 3, height, width] -> the last feature map [images, channels, rows, columns]."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        return self.trunk(pixels).feature_maps[-1]


@dataclass
class Part:
    """What becomes one graph.

    Args:
        module (`nn.Module`), example (tuple of `Tensor`): what is traced, and on what.
        inputs, outputs (tuple of `str`): their names in the graph.
        fixed (`dict`): input -> axes that stay as in the example; all others are dynamic.
        like (`str`, *optional*): a part whose graph is the same but for the weights.
    """

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fixed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    like: str | None = None


KEYS = ("keys", "values")
LAYER_INPUTS = (
    *("states", "past_keys", "past_values", "own", "bias"),
    *("cross_keys", "cross_values", "fold", "cross_bias", "unfold"),
)


@torch.no_grad()
def parts_of(model: MuEForConditionalGeneration, image_size: Sequence[int] | None) -> Iterator[tuple[str, Part]]:
    """Name -> part, one after the other: "trunk", the names in `LINEAR`, "encoder_N_project", "encoder_N",
    "decoder_N_project", "cross_N", "decoder_N", "head".

    Args:
        model (`MuEForConditionalGeneration`): in evaluation mode, float32.
        image_size ((height, width), *optional*): pixels of the example for the trunk, which is no part without them.
    """
    config, encoder, decoder = model.config, model.get_encoder(), model.get_decoder()
    width, draw = config.d_model, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    if image_size is not None:
        example, fixed = (random(2, 3, *image_size),), {"pixels": (1,)}
        yield "trunk", Part(Trunk(encoder.embed_images), example, ("pixels",), ("features",), fixed)
    for stack, names in ((encoder, LINEAR["encoder"]), (decoder, LINEAR["decoder"])):
        for name in names:
            layer = getattr(stack, name)
            example, fixed = (random(3, layer.in_features),), {"states": (1,)}
            yield name, Part(Matrix(layer), example, ("states",), (name,), fixed)
    fixed = {"states": (2,), "attended": (2,)}
    for number, layer in enumerate(encoder.layers):
        states, both = (random(3, 7, width),), (random(3, 7, width), random(3, 7, width))
        of = [f"encoder_0{end}" if number else None for end in ("_project", "")]
        projection = Part(EncoderProjection(layer), states, ("states",), ("query_keys_values",), fixed, of[0])
        yield f"encoder_{number}_project", projection
        yield f"encoder_{number}", Part(EncoderLayer(layer), both, tuple(fixed), ("output",), fixed, of[1])
    heads = config.decoder_attention_heads
    # 5 rows of 2 images, 3 and 2, with 4 tokens; each attends to 6 earlier positions, 3 tokens, and 11 of the source
    own, unfold = torch.arange(15).view(5, 3), torch.arange(20).view(5, 4)
    fold = torch.cat([unfold.flatten(), unfold[0]]).view(2, 12)
    past, source = (5, heads, 6, width // heads), (2, heads, 11, width // heads)
    fixed = {"states": (2,)} | dict.fromkeys(("past_keys", "past_values", "cross_keys", "cross_values"), (1, 3))
    fixed |= {"bias": (1,), "cross_bias": (1,)}
    for number, layer in enumerate(decoder.layers):
        states = (random(5, 4, width),)
        of = [f"{name}_0{end}" if number else None for name, end in (("decoder", "_project"), ("cross", ""))]
        yield f"decoder_{number}_project", Part(DecoderProjection(layer), states, ("states",), KEYS, fixed, of[0])
        yield f"cross_{number}", Part(CrossProjection(layer), (random(2, 11, width),), ("states",), KEYS, fixed, of[1])
        example = (
            *(*states, random(*past), random(*past), own, random(5, heads, 4, 9)),
            *(random(*source), random(*source), fold, random(2, heads, 12, 11), unfold),
        )
        like = "decoder_0" if number else None
        outputs = ("output", *KEYS)
        yield f"decoder_{number}", Part(DecoderLayer(layer), example, LAYER_INPUTS, outputs, fixed, like)
    head = nn.Linear(width, config.num_text_tokens, bias=model.lm_head.bias is not None)
    head.weight.copy_(model.lm_head.weight[: config.num_text_tokens])
    if model.lm_head.bias is not None:
        head.bias.copy_(model.lm_head.bias[: config.num_text_tokens])
    yield "head", Part(Matrix(head), (random(3, width),), ("states",), ("logits",), {"states": (1,)})


@contextmanager
def quiet() -> Iterator[None]:
    """Exporter and quantizer warn and log about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def graph_of(part: Part) -> Any:
    """The ONNX model of a part, its shapes dynamic.

    Raises:
        Exception: whatever torch's exporter raises for a module that it cannot trace.
    """
    dynamic = [
        {axis: torch.export.Dim.DYNAMIC for axis in range(value.dim()) if axis not in part.fixed.get(name, ())}
        for name, value in zip(part.inputs, part.example, strict=True)
    ]
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            part.module.eval(),
            part.example,
            dynamo=True,
            dynamic_shapes=tuple(dynamic),
            opset_version=OPSET,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            verbose=False,
        )
    graph = program.model_proto
    _fix_reshapes(graph.graph)
    # the tracer takes axes that are equal in the example for equal always, but a bias may broadcast
    for value in (*graph.graph.input, *graph.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = f"{value.name}_{axis}"
    del graph.graph.value_info[:]
    return graph


def _fix_reshapes(graph: Any) -> None:
    """Shapes of reshapes are computed by nodes, of which a small layer has more than of others: where one dimension at
    most is neither known nor that of the input, a constant does."""
    from onnx import numpy_helper

    shapes = {value.name: _dims(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    constants = {value.name for value in graph.initializer}
    for node in graph.node:
        before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
        if node.op_type != "Reshape" or node.input[1] in constants or before is None or after is None:
            continue
        # 0 is the dimension of the input at that place, -1 what is left
        known = [
            dim if isinstance(dim, int) else 0 if before[place : place + 1] == [dim] else -1
            for place, dim in enumerate(after)
        ]
        if known.count(-1) > 1 or 0 in after:
            continue
        node.input[1] = f"{node.output[0]}/shape"
        graph.initializer.append(numpy_helper.from_array(np.array(known), node.input[1]))
        # 0 as a length of its own
        del node.attribute[:]
    _drop_unused(graph)


def _pad_in_convolutions(graph: Any) -> None:
    """Convolutions of timm that pad as TensorFlow does, by the size of the image, as the operator does by itself: the
    runtime's layout for convolutions then goes through, and there are no padded copies."""
    from onnx import helper

    padded = {node.output[0]: node for node in graph.node if node.op_type == "Pad"}
    constants = {value.name for value in graph.initializer}
    for node in graph.node:
        pad = padded.get(node.input[0]) if node.op_type == "Conv" else None
        if pad is None or pad.input[1] in constants:
            continue
        kept = [attribute for attribute in node.attribute if attribute.name not in ("pads", "auto_pad")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("auto_pad", "SAME_UPPER")])
        node.input[0] = pad.input[0]
    _drop_unused(graph)


def _dims(value: Any) -> list[Any] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    # a dimension without a name is equal to no other
    return [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else object()) for dim in kind.shape.dim]


def _drop_unused(graph: Any) -> None:
    """Removes the nodes and initializers that nobody takes."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [value for value in graph.initializer if value.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def trunk_graph(part: Part, config: Any) -> tuple[Any, list[int] | None]:
    """The ONNX model of a trunk, and the image size [height, width] that it needs, None where any will do.

    Raises:
        ValueError: if the trunk cannot be exported.
    """
    height, width = part.example[0].shape[2:]
    try:
        graph = graph_of(part)
        if any(type(module).__name__ == "Conv2dSame" for module in part.module.modules()):
            _pad_in_convolutions(graph.graph)
        return graph, None
    # torch's exporter and a trunk's own code raise what they like
    except Exception:
        part.fixed["pixels"] = (1, 2, 3)
    try:
        return graph_of(part), [height, width]
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"the trunk must be one that torch can export to ONNX, got {config.backbone_config.model_type!r}: "
            f"{reason}; pass --torch-trunk, which leaves it to torch."
        ) from error


def apart(graph: Any, file: str) -> tuple[bytes, bytes]:
    """A graph whose larger weights are in a file of this name beside it, and the content of that file: the runtime
    maps it to memory, and holds no copy besides its own."""
    from onnx import TensorProto
    from onnx.external_data_helper import set_external_data

    copy, content = type(graph)(), bytearray()
    copy.CopyFrom(graph)
    for weight in copy.graph.initializer:
        if len(weight.raw_data) >= SMALLEST:
            content += bytes(-len(content) % PAGE)
            set_external_data(weight, file, len(content), len(weight.raw_data))
            content += weight.raw_data
            weight.ClearField("raw_data")
            weight.data_location = TensorProto.EXTERNAL
    return copy.SerializeToString(), bytes(content)


@torch.no_grad()
def with_weights(graph: Any, module: nn.Module) -> Any | None:
    """A copy of a graph with the weights of another module of the same kind; None where their names do not say which
    is which."""
    copy, weights = type(graph)(), module.state_dict()
    copy.CopyFrom(graph)
    for initializer in copy.graph.initializer:
        weight = weights.pop(initializer.name, None)
        if weight is None:
            continue
        if list(weight.shape) != list(initializer.dims) or not initializer.raw_data:
            return None
        initializer.raw_data = weight.contiguous().numpy().tobytes()
    return None if weights else copy


__all__ = ["Part", "apart", "graph_of", "parts_of", "quiet", "trunk_graph", "with_weights"]
