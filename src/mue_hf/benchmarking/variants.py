"""The ways to generate that `mue-hf bench` times beside each other, and forced depths that differ between rows."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import nextafter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .stock import StockModel, nothing_kept

# In the order of the tables.
ARMS = ("stock", "plain", "lossless", "enabled", "half", "spread", "synchronised")
# Below 1, so that every similarity is computed, and 1 when rounded to float32 or below, so that none is above it.
NEVER_TAKEN = nextafter(1.0, 0.0)


@dataclass(frozen=True)
class DepthPattern:
    """
    Layers to run, given instead of decided.

    Args:
        image (`LongTensor` [batch]): encoder layers of each image.
        text (`int`): encoder layers of the prompt, which all rows share.
        decoder (`LongTensor` [steps, rows]): decoder layers of each row at each step; rows are batch x beams.
    """

    image: Tensor
    text: int
    decoder: Tensor

    def synchronised(self) -> "DepthPattern":
        """What a batch runs whose rows all wait for the deepest of them, in each stream and at each step."""
        return DepthPattern(
            self.image.max().expand_as(self.image),
            self.text,
            self.decoder.amax(dim=1, keepdim=True).expand_as(self.decoder),
        )

    def options(self, config: Any) -> dict[str, Any]:
        """The exit options that give it, but for the decoder, which the options know one depth for."""
        low, high = int(self.image.min()), int(self.image.max())
        image = self.image if low < high else high
        options = {"exit_criterion": "fixed", "decoder_exit_layer": int(self.decoder.max())}
        if config.modality_decomposition:
            return options | {"image_exit_layer": image, "text_exit_layer": self.text}
        return options | {"encoder_exit_layer": image}


def half_pattern(config: Any, batch: int, beams: int, steps: int) -> DepthPattern:
    """Half of the layers of every stack, rounded up."""
    encoder, decoder = (config.encoder_layers + 1) // 2, (config.decoder_layers + 1) // 2
    return DepthPattern(torch.full((batch,), encoder), encoder, torch.full((steps, batch * beams), decoder))


def spread_pattern(config: Any, batch: int, beams: int, steps: int) -> DepthPattern:
    """Every depth from 1 to all layers but one equally often, half of the layers on average; neighbouring rows and
    steps differ."""

    def depths(places: Tensor, layers: int) -> Tensor:
        # A single layer is all there is.
        choices = max(layers - 1, 1)
        return 1 + (places + max(layers // 2 - 1, 0)) % choices

    samples, rows = torch.arange(batch), torch.arange(batch * beams)
    return DepthPattern(
        depths(samples, config.encoder_layers),
        (config.encoder_layers + 1) // 2,
        depths(rows + 2 * torch.arange(steps).unsqueeze(1), config.decoder_layers),
    )


@contextmanager
def forced_depths(model: PreTrainedModel, pattern: DepthPattern) -> Iterator[None]:
    """Within it, one `generate` call with a pattern's options runs the decoder as deep as the pattern says.

    Nothing is left on the model.
    """
    step = 0

    def set_policy(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        nonlocal step
        depth, step = pattern.decoder[step], step + 1
        return args, kwargs | {"policy": replace(kwargs["policy"], depth=depth)}

    handle = model.get_decoder().register_forward_pre_hook(set_policy, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def plain_paths(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model has eager attention, keeps nothing between calls, and folds no batch norm."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with nothing_kept(model.get_encoder()):
            yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Arm:
    """
    One way to generate.

    Args:
        name (`str`): what it is called in the record.
        model (`PreTrainedModel`): whose `generate` is called.
        inputs (`dict`): what it is called with.
        options (`dict`): options of `generate` beyond those of all arms.
        pattern (`DepthPattern`, *optional*): forced depths.
        plain (`bool`): whether to run under [`plain_paths`].
    """

    name: str
    model: PreTrainedModel
    inputs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: DepthPattern | None = None
    plain: bool = False

    def run(self, decoding: Mapping[str, Any]) -> Any:
        """The output of one `generate` call under the options that all arms share."""
        with ExitStack() as stack:
            if self.plain:
                stack.enter_context(plain_paths(self.model))
            if self.pattern is not None:
                # Forced depths of one call count its steps.
                stack.enter_context(forced_depths(self.model, self.pattern))
            return self.model.generate(**self.inputs, **decoding, **self.options)


def make_arms(
    names: list[str],
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    exits: Mapping[str, Mapping[str, Any]],
    *,
    beams: int,
    steps: int,
) -> list[Arm]:
    """
    The arms of one cell on one model.

    Args:
        names (list of `str`): among `ARMS`.
        model (`MuEForConditionalGeneration`): the model.
        inputs (`dict`): inputs of its `generate`.
        exits (`dict`): name -> exit options, for one more arm each.
        beams, steps (`int`): of `generate`; steps are new tokens.
    """
    config, batch = model.config, inputs["input_ids"].shape[0]
    off = {"exit_criterion": "never"}
    spread = spread_pattern(config, batch, beams, steps)
    patterns = {
        "half": half_pattern(config, batch, beams, steps),
        "spread": spread,
        "synchronised": spread.synchronised(),
    }
    made = {
        "stock": Arm("stock", StockModel(model), inputs),
        "plain": Arm("plain", model, inputs, off, plain=True),
        "lossless": Arm("lossless", model, inputs, off),
        "enabled": Arm("enabled", model, inputs, _never_taken(config)),
    }
    made |= {name: Arm(name, model, inputs, pattern.options(config), pattern) for name, pattern in patterns.items()}
    chosen = [made[name] for name in ARMS if name in names]
    return chosen + [Arm(name, model, inputs, options) for name, options in exits.items()]


def _never_taken(config: Any) -> dict[str, Any]:
    streams = ("image", "text", "decoder") if config.modality_decomposition else ("encoder", "decoder")
    thresholds = {f"{stream}_exit_threshold": NEVER_TAKEN for stream in streams}
    # Whatever the checkpoint has saved.
    return thresholds | {"exit_criterion": "similarity", "exit_decay_beta": 1.0, "exit_warmup": 0.0}


__all__ = [
    "ARMS",
    "Arm",
    "DepthPattern",
    "forced_depths",
    "half_pattern",
    "make_arms",
    "plain_paths",
    "spread_pattern",
]
