"""How many operations one caption takes, from the sizes of the model and the depths that were reached.

Counted are matrix products and convolutions, one multiply-add as 2 FLOP; norms, activations, softmax and table
look-ups are left out, as `torch.utils.flop_counter` leaves them out.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.criteria_mue import CRITERIA
from ..model.exit_options_mue import resolve_options
from ..model.vision_mue import load_trunk
from .depths import Depths
from .loading import evaluating


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """[rows, heads, tokens, head dim] each; scores and their products with the values, masked places included."""
    rows, heads, queries, width = query
    return 2 * rows * heads * queries * key[2] * (width + value[3])


# torch's counter knows the fused attention of GPUs and not that of CPUs.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def trunk_flops(model: PreTrainedModel, pixel_shape: Sequence[int]) -> tuple[int, int, int]:
    """FLOPs of one image [3, height, width] in the trunk, which is run once; channels and tokens that come out."""
    trunk = model.get_encoder().embed_images
    if next(trunk.parameters(), None) is None:
        # an engine's: operations are counted on a trunk of torch, whose weights do not matter
        with torch.random.fork_rng(devices=[]):
            trunk = load_trunk(model.config)
    weight = next(trunk.parameters())
    pixels = torch.zeros(1, *pixel_shape, dtype=weight.dtype, device=weight.device)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with evaluating(trunk), torch.no_grad(), counter:
        features = trunk(pixels).feature_maps[-1]
    return counter.get_total_flops(), features.shape[1], features.shape[2] * features.shape[3]


def encoder_flops(config: PreTrainedConfig, tokens: int, layers: int) -> int:
    """FLOPs of `layers` encoder layers on one stream of `tokens` tokens, its shared position bias included."""
    if not layers or not tokens:
        return 0
    width = config.d_model
    projections = 4 * 2 * tokens * width**2
    attention = 2 * 2 * tokens**2 * width
    feed_forward = 2 * 2 * tokens * width * config.encoder_ffn_dim
    positions = 2 * 2 * tokens * width**2 + 2 * tokens**2 * width
    return layers * (projections + attention + feed_forward) + positions


def decoder_layer_flops(config: PreTrainedConfig, position: int, encoder_tokens: int) -> int:
    """FLOPs of one decoder layer on the token at `position` (from 0), which attends to `encoder_tokens` as well."""
    width = config.d_model
    self_attention = 4 * 2 * width**2 + 2 * 2 * (position + 1) * width
    cross_attention = 2 * 2 * width**2 + 2 * 2 * encoder_tokens * width
    return self_attention + cross_attention + 2 * 2 * width * config.decoder_ffn_dim


def filled_layers(depths: Sequence[int]) -> list[int]:
    """Layers that each token was given keys and values for after its exit, because a later token went deeper."""
    deepest = list(accumulate(reversed(depths), max))[::-1]
    return [most - depth for most, depth in zip(deepest, depths, strict=True)]


def caption_flops(
    config: PreTrainedConfig,
    decoder_exit_layers: Sequence[int],
    *,
    image_tokens: int,
    text_tokens: int,
    image_exit_layers: int,
    text_exit_layers: int,
    channels: int,
    max_tokens: int,
    trunk: int = 0,
    beams: int = 1,
    exit_kv: str = "project",
    criterion: str = "similarity",
    rescore: bool = False,
    candidates: int | None = None,
) -> dict[str, int]:
    """FLOPs of one caption by its parts, for the depths that were reached and an image that is alone in its batch.

    Args:
        config (`MuEConfig`): sizes of the model.
        decoder_exit_layers (`Sequence[int]`): layers of each generated token; with beams, of the returned sequence.
        image_tokens, text_tokens (`int`): encoder tokens of the image and of the prompt.
        image_exit_layers, text_exit_layers (`int`): encoder layers that each stream ran; equal in the joint mode.
        channels (`int`): channels of the trunk's output.
        max_tokens (`int`): tokens that the call could have generated: it prepares that many positions.
        trunk (`int`, *optional*, defaults to 0): FLOPs of the trunk for this image.
        beams (`int`, *optional*, defaults to 1): rows that are decoded for the image.
        exit_kv (`str`, *optional*, defaults to `"project"`): a skipped layer that is needed later costs its key and
            value projections ("project"), nothing ("copy") or the layer itself ("exact").
        criterion (`str`, *optional*, defaults to `"similarity"`): one that needs intermediate logits runs the output
            head after every layer but the last; what `generate` emits takes the rows of text alone.
        candidates (`int`, *optional*): tokens that it then looks at; the whole vocabulary by default.
        rescore (`bool`, *optional*, defaults to False): whether all beams, as long as the returned one, run once more
            at full depth, all tokens at once (`exit_rescore`).

    Returns:
        `dict[str, int]`: "trunk", "image_encoder", "text_encoder" ("encoder" in the joint mode), "cross_keys",
        "decoder", "fill", "head".

    Raises:
        ValueError: if `exit_kv` is not one of the three policies.
    """
    if exit_kv not in ("copy", "exact", "project"):
        raise ValueError(f'`exit_kv` must be "project", "copy" or "exact", got {exit_kv!r}.')
    width, encoder_tokens = config.d_model, image_tokens + text_tokens
    projection = 2 * image_tokens * channels * width
    parts = {"trunk": trunk}
    if config.modality_decomposition:
        parts["image_encoder"] = projection + encoder_flops(config, image_tokens, image_exit_layers)
        parts["text_encoder"] = encoder_flops(config, text_tokens, text_exit_layers)
    else:
        parts["encoder"] = projection + encoder_flops(config, encoder_tokens, max(image_exit_layers, text_exit_layers))
    # The position keys of the encoder tokens are shared by all layers.
    deepest = config.decoder_layers if rescore else max(decoder_exit_layers, default=0)
    parts["cross_keys"] = (2 * deepest + 1) * 2 * encoder_tokens * width**2
    layers = fill = 0
    for position, filled in enumerate(filled_layers(decoder_exit_layers)):
        layer = decoder_layer_flops(config, position, encoder_tokens)
        layers += decoder_exit_layers[position] * layer
        fill += filled * {"project": 2 * 2 * width**2, "copy": 0, "exact": layer}[exit_kv]
    # Position biases are made once for all layers, rows and steps.
    positions = 3 * 2 * max_tokens * width**2 + 2 * max_tokens * (max_tokens + encoder_tokens) * width
    parts["decoder"] = beams * layers + positions
    parts["fill"] = beams * fill
    rows = len(decoder_exit_layers) * config.num_text_tokens
    rows += intermediate_logits(config, decoder_exit_layers, criterion, candidates or config.vocab_size)
    parts["head"] = beams * 2 * width * rows
    if rescore:
        tokens = len(decoder_exit_layers)
        # All tokens at once attend to places that lie after them, masked but multiplied.
        layer = decoder_layer_flops(config, tokens - 1, encoder_tokens)
        parts["decoder"] += beams * tokens * config.decoder_layers * layer
        parts["head"] += beams * tokens * config.num_text_tokens * 2 * width
    return parts


def intermediate_logits(
    config: PreTrainedConfig, decoder_exit_layers: Sequence[int], criterion: str, classes: int
) -> int:
    """How many logits a criterion computes to decide about these tokens, of `classes` that it looks at."""
    looks = (min(depth, config.decoder_layers - 1) for depth in decoder_exit_layers)
    return sum(CRITERIA[criterion].head_rows(number, classes) for number in looks)


def full_depth_flops(
    config: PreTrainedConfig, tokens: int, count: Callable[..., dict[str, int]] = caption_flops, **sizes: int
) -> dict[str, int]:
    """[`caption_flops`], or another `count`, of as many tokens with every layer of both stacks run."""
    depths = {f"{stream}_exit_layers": config.layers_of(stream) for stream in ("image", "text")}
    return count(config, [config.decoder_layers] * tokens, **depths, criterion="never", **sizes)


def max_new_tokens(model: PreTrainedModel, options: Mapping[str, Any]) -> int:
    """N: the most tokens that `generate` gives under these options and those saved with the model."""
    settings = model.generation_config.to_dict() | dict(options)
    return settings.get("max_new_tokens") or (settings.get("max_length") or 20) - 1


class FlopCount:
    """FLOPs of outputs, for the depths that were reached and at full depth.

    Args:
        model (`MuEForConditionalGeneration`), options (`dict`): what runs, and its options of `generate`.
        count (`Callable`, *optional*): what counts one output: [`caption_flops`], or what takes its arguments.
    """

    def __init__(
        self, model: PreTrainedModel, options: Mapping[str, Any], count: Callable[..., dict[str, int]] = caption_flops
    ) -> None:
        saved = model.generation_config.to_dict()
        exits = resolve_options(options, {}, saved, model.config)
        self.config, self.count = model.config, count
        self.policy: dict[str, Any] = {
            "exit_kv": exits.exit_kv,
            "criterion": exits.exit_criterion if exits.active else "never",
            "rescore": exits.exit_rescore,
        }
        if exits.exit_candidates is not None:
            self.policy["candidates"] = len(exits.exit_candidates)
        self.max_tokens = max_new_tokens(model, options)
        self.beams = (saved | dict(options)).get("num_beams") or 1
        self.trunk = cache(partial(trunk_flops, model))

    def __call__(
        self, pixel_shape: Sequence[int] | None, text_tokens: int, depths: Depths
    ) -> tuple[dict[str, int], dict[str, int]]:
        """What an output took and would have taken at full depth, by parts; without an image the shape is None."""
        trunk, channels, image_tokens = (0, 0, 0) if pixel_shape is None else self.trunk(tuple(pixel_shape))
        sizes = {"max_tokens": self.max_tokens, "beams": self.beams, "text_tokens": text_tokens}
        sizes |= {"trunk": trunk, "channels": channels, "image_tokens": image_tokens}
        encoder = {"image_exit_layers": depths.image_exit_layers, "text_exit_layers": depths.text_exit_layers}
        tokens = depths.decoder_exit_layers
        ran = self.count(self.config, tokens, **encoder, **sizes, **self.policy)
        return ran, full_depth_flops(self.config, len(tokens), self.count, **sizes)


__all__ = [
    "CPU_ATTENTION",
    "FlopCount",
    "caption_flops",
    "decoder_layer_flops",
    "intermediate_logits",
    "max_new_tokens",
]
