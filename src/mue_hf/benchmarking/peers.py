"""Captioners of other families as transformers ships them, at their published shapes with random weights: what does a
caption of as many image tokens and new tokens take elsewhere? Their captions are noise."""

from collections.abc import Callable

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
# A model, its image tokens, and the input ids of one image.
Built = tuple[PreTrainedModel, int, Tensor]


def florence_2_base(image_size: int) -> Built:
    """Florence-2-base: DaViT (stride 32) into a BART of six and six layers."""
    sizes = {"layers": 6, "ffn_dim": 3072, "attention_heads": 12}
    stacks = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in sizes.items()}
    config = Florence2Config(
        vision_config={"model_type": "florence_vision", "projection_dim": 768},
        text_config={"model_type": "bart", "vocab_size": 51290, "d_model": 768, **stacks},
        image_token_id=51289,
    )
    # One more token stands for the whole image.
    tokens = (image_size // 32) ** 2 + 1
    ids = torch.arange(4, 4 + tokens + FLORENCE_PROMPT).unsqueeze(0)
    ids[:, :tokens] = config.image_token_id
    return Florence2ForConditionalGeneration(config), tokens, ids


def blip_base(image_size: int) -> Built:
    """BLIP-base for captions: ViT-B/16 into a decoder of twelve layers."""
    config = BlipConfig(vision_config={"image_size": image_size})
    ids = torch.full((1, BLIP_PROMPT), config.text_config.bos_token_id)
    return BlipForConditionalGeneration(config), (image_size // 16) ** 2 + 1, ids


# Name -> builder, its stride, and the size that it was published with.
PEERS: dict[str, tuple[Callable[[int], Built], int, int]] = {
    "florence-2-base": (florence_2_base, 32, 768),
    "blip-base": (blip_base, 16, 384),
}


class Peer:
    """A model of another family with random weights, built once.

    Args:
        spec (`str`): NAME in `PEERS`, at an image size that gives as many image tokens; NAME:PIXELS, or NAME:native.
        image_tokens (`int`): image tokens of the model that it is compared with.
        like (`Tensor`): its device and dtype are the model's.

    Raises:
        ValueError: for an unknown name or size.
    """

    def __init__(self, spec: str, image_tokens: int, like: Tensor):
        name, _, size = spec.partition(":")
        if name not in PEERS:
            raise ValueError(f"`peers` must name some of {sorted(PEERS)}, got {name!r}.")
        build, stride, native = PEERS[name]
        if size not in ("", "native") and (not size.isdecimal() or int(size) < stride or int(size) % stride):
            raise ValueError(f"`peers` {name}:SIZE must have a multiple of {stride} or 'native', got {size!r}.")
        self.name = spec
        self.image_size = {"": stride * round(image_tokens**0.5), "native": native}.get(size) or int(size)
        torch.manual_seed(0)
        model, self.image_tokens, self.input_ids = build(self.image_size)
        self.model = model.to(like.device, like.dtype).eval()

    def variant(self, pixel_values: Tensor) -> Variant:
        """Its variant on images [batch, 3, height, width], which are resized."""
        ids = self.input_ids.to(self.model.device).repeat(len(pixel_values), 1)
        resized = torch.nn.functional.interpolate(pixel_values, (self.image_size, self.image_size), mode="bilinear")
        inputs = {"pixel_values": resized, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Variant(self.name, self.model, inputs)

    def facts(self) -> dict[str, int]:
        """What the record says about it."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"image_size": self.image_size, "image_tokens": self.image_tokens, "parameters": parameters}


__all__ = ["PEERS", "Peer"]
