"""Captioners of other families as transformers ships them, at their published shapes with random weights.

They answer one question: what does a caption of as many image tokens and new tokens take elsewhere? Their
captions are noise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedModel,
)

from .variants import Variant

# Tokens of Florence-2's sentence for a caption, and of an empty prompt's [BOS] [SEP] for BLIP.
FLORENCE_PROMPT, BLIP_PROMPT = 8, 2


def florence_2_base(image_size: int) -> tuple[PreTrainedModel, int, dict[str, Tensor]]:
    """Florence-2-base: DaViT (stride 32) into a BART of six and six layers. Returns the model, its image tokens, and
    the inputs of one image."""
    config = Florence2Config(
        vision_config={"model_type": "florence_vision", "projection_dim": 768},
        text_config={
            "model_type": "bart",
            "vocab_size": 51290,
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
        },
        image_token_id=51289,
    )
    model = Florence2ForConditionalGeneration(config)
    # One more token stands for the whole image.
    tokens = (image_size // 32) ** 2 + 1
    ids = torch.arange(4, 4 + tokens + FLORENCE_PROMPT).unsqueeze(0)
    ids[:, :tokens] = config.image_token_id
    return model, tokens, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def blip_base(image_size: int) -> tuple[PreTrainedModel, int, dict[str, Tensor]]:
    """BLIP-base for captions: ViT-B/16 into a decoder of twelve layers. Returns what [`florence_2_base`] does."""
    config = BlipConfig(vision_config={"image_size": image_size})
    model = BlipForConditionalGeneration(config)
    ids = torch.full((1, BLIP_PROMPT), config.text_config.bos_token_id)
    return model, (image_size // 16) ** 2 + 1, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# Name -> builder, its stride, and the size that it was published with.
PEERS: dict[str, tuple[Callable[[int], tuple[PreTrainedModel, int, dict[str, Tensor]]], int, int]] = {
    "florence-2-base": (florence_2_base, 32, 768),
    "blip-base": (blip_base, 16, 384),
}


@dataclass(frozen=True)
class Peer:
    """
    A model of another family, built once.

    Args:
        name (`str`): as it was asked for.
        model (`PreTrainedModel`): with random weights.
        prompt (`dict`): its inputs for one image, without the image.
        image_size (`int`): pixels of both sides of the image that it is given.
        image_tokens (`int`): encoder tokens that come out.
    """

    name: str
    model: PreTrainedModel
    prompt: Mapping[str, Tensor]
    image_size: int
    image_tokens: int

    def variant(self, pixel_values: Tensor) -> Variant:
        """Its variant on images [batch, 3, height, width], which are resized."""
        batch, size = pixel_values.shape[0], (self.image_size, self.image_size)
        inputs = {name: value.to(self.model.device).repeat(batch, 1) for name, value in self.prompt.items()}
        resized = torch.nn.functional.interpolate(pixel_values, size, mode="bilinear")
        return Variant(self.name, self.model, {"pixel_values": resized, **inputs})

    def facts(self) -> dict[str, int]:
        """What the record says about it."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"image_size": self.image_size, "image_tokens": self.image_tokens, "parameters": parameters}


def make_peer(spec: str, image_tokens: int, like: Tensor) -> Peer:
    """
    Builds a peer.

    Args:
        spec (`str`): a name of `PEERS` for an image size that gives as many image tokens, `NAME:PIXELS` for one of
            that size, or `NAME:native` for the published one.
        image_tokens (`int`): image tokens of the model that it is compared with.
        like (`Tensor`): its device and dtype are the model's.

    Raises:
        ValueError: for an unknown name or size.
    """
    name, _, size = spec.partition(":")
    if name not in PEERS:
        raise ValueError(f"`peers` must name some of {sorted(PEERS)}, got {name!r}.")
    build, stride, native = PEERS[name]
    if size not in ("", "native") and (not size.isdecimal() or int(size) < stride or int(size) % stride):
        raise ValueError(f"`peers` {name}:SIZE must have a multiple of {stride} or 'native', got {size!r}.")
    pixels = {"": stride * round(image_tokens**0.5), "native": native}.get(size) or int(size)
    torch.manual_seed(0)
    model, tokens, prompt = build(pixels)
    return Peer(spec, model.to(like.device, like.dtype).eval(), prompt, pixels, tokens)


__all__ = ["PEERS", "Peer", "make_peer"]
