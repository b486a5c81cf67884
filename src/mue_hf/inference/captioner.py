"""A few images captioned with exits and at full depth: depths, FLOPs and seconds of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .depths import Depths, layers_skipped, new_tokens, read_depths
from .flops import FlopCount
from .predict import run_task, task_options
from .timing import compare


@dataclass
class Captioner:
    """Captions images both ways under options of `generate`, exits and others, with `repeats` timed runs each."""

    model: MuEForConditionalGeneration
    processor: MuEProcessor
    exits: dict[str, Any]
    options: dict[str, Any]
    repeats: int

    def __post_init__(self) -> None:
        self.options = task_options("captioning", self.options)
        self.flops = FlopCount(self.model, self.exits | self.options)

    def caption(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        """One record per image: captions, depths, shares skipped and seconds."""
        inputs = self.processor(images=images).to(self.model.device, self.model.dtype)
        ways = {"exits": self.options | self.exits, "full": self.options | {"exit_criterion": "never"}}
        calls = {way: partial(run_task, self.model, inputs, options) for way, options in ways.items()}
        outputs, seconds = compare(calls, self.repeats, self.model.device)
        texts = [self.processor.post_process_image_text_to_text(outputs[way].sequences) for way in ways]
        text_tokens, run = inputs["attention_mask"].sum(1).tolist(), outputs["exits"]
        columns = zip(*texts, text_tokens, read_depths(run), new_tokens(run), strict=True)
        return [
            {
                "caption": caption,
                "full_depth_caption": full_caption,
                **self._record(inputs["pixel_values"].shape[1:], tokens, depths, token_ids),
                "seconds": seconds["exits"] / len(images),
                "full_depth_seconds": seconds["full"] / len(images),
                "exits": self.exits,
                "batch_size": len(images),
                "device": str(self.model.device),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            for caption, full_caption, tokens, depths, token_ids in columns
        ]

    def _record(self, pixel_shape: Any, text_tokens: int, depths: Depths, token_ids: Sequence[int]) -> dict[str, Any]:
        """What one caption ran, and what that is worth."""
        config = self.model.config
        ran, full = self.flops(pixel_shape, text_tokens, depths)
        trunk, ran_total, full_total = ran["trunk"], sum(ran.values()), sum(full.values())
        return {
            "encoder_layers": config.encoder_layers,
            **{f"{stream}_layers": config.layers_of(stream) for stream in ("image", "text", "decoder")},
            "image_exit_layers": depths.image_exit_layers,
            "text_exit_layers": depths.text_exit_layers,
            "tokens": [
                {"id": token, "text": self.processor.decode([token]), "layers": depth}
                for token, depth in zip(token_ids, depths.decoder_exit_layers, strict=True)
            ],
            "layers_skipped": layers_skipped(config, depths),
            "flops_skipped": 1 - ran_total / full_total,
            "flops_skipped_without_trunk": 1 - (ran_total - trunk) / (full_total - trunk),
            "flops": ran,
            "full_depth_flops": full,
        }


__all__ = ["Captioner"]
