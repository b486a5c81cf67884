"""A few images captioned with exits and at full depth: depths, FLOPs and seconds of both."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..model.exit_options_mue import resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .flops import caption_flops, full_depth_flops, layers_skipped, trunk_flops
from .predict import one_caption
from .timing import in_turns


class CaptionCost:
    """
    FLOPs of captions, for the depths that were reached and at full depth.

    Args:
        model ([`MuEForConditionalGeneration`]): its trunk is run once for each shape of images.
        exits, decoding (`dict`): options of `generate`, exits and others.
    """

    def __init__(
        self, model: MuEForConditionalGeneration, exits: Mapping[str, Any], decoding: Mapping[str, Any]
    ) -> None:
        saved = model.generation_config.to_dict()
        settings = saved | dict(decoding)
        options = resolve_options(exits, {}, saved, model.config)
        self.model = model
        self.policy = {
            "exit_kv": options.exit_kv,
            "criterion": options.exit_criterion if options.active else "never",
        }
        self.sizes = {
            "max_tokens": settings.get("max_new_tokens") or (settings.get("max_length") or 20) - 1,
            "beams": settings.get("num_beams") or 1,
        }
        self.trunks: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def __call__(
        self,
        shape: Sequence[int],
        text_tokens: int,
        depths: Sequence[int],
        image_exit_layers: int,
        text_exit_layers: int,
    ) -> tuple[dict[str, int], dict[str, int]]:
        """What one caption took and would have taken at full depth, by parts; `shape` is (3, height, width)."""
        if tuple(shape) not in self.trunks:
            self.trunks[tuple(shape)] = trunk_flops(self.model, shape)
        trunk, channels, image_tokens = self.trunks[tuple(shape)]
        sizes = self.sizes | {
            "image_tokens": image_tokens,
            "text_tokens": text_tokens,
            "channels": channels,
            "trunk": trunk,
        }
        config = self.model.config
        ran = caption_flops(
            config,
            depths,
            image_exit_layers=image_exit_layers,
            text_exit_layers=text_exit_layers,
            **self.policy,
            **sizes,
        )
        return ran, full_depth_flops(config, len(depths), **sizes)


class Captioner:
    """
    Captions images both ways.

    Args:
        model ([`MuEForConditionalGeneration`]), processor ([`MuEProcessor`]): what captions.
        exits, options (`dict`): options of `generate`, exits and others.
        repeats (`int`): timed runs each.
    """

    def __init__(
        self,
        model: MuEForConditionalGeneration,
        processor: MuEProcessor,
        exits: Mapping[str, Any],
        options: Mapping[str, Any],
        repeats: int,
    ) -> None:
        self.model, self.processor = model, processor
        self.exits, self.options, self.repeats = dict(exits), one_caption(options), repeats
        self.cost = CaptionCost(model, exits, options)

    def caption(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        """One record per image: captions, depths, shares skipped and seconds."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        ways = {"exits": self.options | self.exits, "full": self.options | {"exit_criterion": "never"}}
        calls = {
            way: partial(self.model.generate, **inputs, **options, return_dict_in_generate=True)
            for way, options in ways.items()
        }
        outputs, seconds = in_turns(self.model, calls, self.repeats)
        captions, full_captions = (
            self.processor.post_process_image_text_to_text(outputs[way].sequences) for way in ways
        )
        records = []
        for row in range(len(images)):
            record = self.record({name: value[row] for name, value in inputs.items()}, outputs["exits"], row)
            texts = {"caption": captions[row], "full_depth_caption": full_captions[row]}
            times = {
                "seconds": seconds["exits"] / len(images),
                "full_depth_seconds": seconds["full"] / len(images),
            }
            records.append(texts | record | times | self.conditions(len(images)))
        return records

    def record(self, inputs: dict[str, torch.Tensor], output: Any, row: int) -> dict[str, Any]:
        """What sample `row` of `output` ran, and what that is worth."""
        config = self.model.config
        depths = [depth for depth in output.decoder_exit_layers[row].tolist() if depth]
        new_tokens = output.sequences[row][-output.decoder_exit_layers.shape[1] :][: len(depths)].tolist()
        image_exit_layers, text_exit_layers = int(output.image_exit_layers[row]), int(output.text_exit_layers[row])
        shape, text_tokens = inputs["pixel_values"].shape, int(inputs["attention_mask"].sum())
        ran, full = self.cost(shape, text_tokens, depths, image_exit_layers, text_exit_layers)
        trunk = ran["trunk"]
        ran_total, full_total = sum(ran.values()), sum(full.values())
        return {
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers,
            "image_exit_layers": image_exit_layers,
            "text_exit_layers": text_exit_layers,
            "tokens": [
                {"id": token, "text": self.processor.decode([token]), "layers": depth}
                for token, depth in zip(new_tokens, depths, strict=True)
            ],
            "layers_skipped": layers_skipped(config, depths, image_exit_layers, text_exit_layers),
            "flops_skipped": 1 - ran_total / full_total,
            "flops_skipped_without_trunk": 1 - (ran_total - trunk) / (full_total - trunk),
            "flops": ran,
            "full_depth_flops": full,
        }

    def conditions(self, batch_size: int) -> dict[str, Any]:
        """What the seconds were measured on."""
        return {
            "exits": self.exits,
            "batch_size": batch_size,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


__all__ = ["CaptionCost", "Captioner"]
