"""The ways to generate that `mue-hf bench` times beside each other, and forced depths that differ between rows."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.criteria_mue import CRITERIA, THRESHOLD_OPTIONS, Criterion
from ..model.exit_options_mue import ExitOptions
from .stock import StockModel

# Those that are timed by default, in the order of the tables.
DEFAULT_VARIANTS = ("stock", "plain", "lossless", "enabled", "half", "spread", "synchronised")
DEFAULT_CRITERION = ExitOptions().exit_criterion


def variant_names() -> list[str]:
    """All that there are by name: the default ones, and "enabled" by each further criterion that has a score."""
    scored = [name for name, one in CRITERIA.items() if one.score is not Criterion.score and name != DEFAULT_CRITERION]
    return [*DEFAULT_VARIANTS, *(f"enabled-{name}" for name in scored)]


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
    """Within it, one `generate` call with a pattern's options runs the decoder at the depths of the pattern."""
    depths = iter(pattern.decoder)

    def set_policy(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"policy": replace(kwargs["policy"], depth=next(depths))}

    handle = model.get_decoder().register_forward_pre_hook(set_policy, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def unused_exits(config: Any, criterion: str) -> dict[str, Any]:
    """Exit options by which every stream computes the scores of a criterion (or of the default one, where the encoder
    does not follow it), and no row exits."""
    cls = CRITERIA[criterion]
    options: dict[str, Any] = {"exit_criterion": criterion}
    # Whatever the checkpoint has saved.
    options |= {
        name: value for name, value in {"exit_decay_beta": 1.0, "exit_warmup": 0.0}.items() if name in cls.options
    }
    for stream in ("image", "text", "decoder") if config.modality_decomposition else ("encoder", "decoder"):
        followed = cls if stream in cls.sweep_options else CRITERIA[DEFAULT_CRITERION]
        name = followed.sweep_options[stream]
        layers = config.decoder_layers if stream == "decoder" else config.encoder_layers
        options[name] = _out_of_reach(followed, name, layers)
    return options


def _out_of_reach(criterion: type[Criterion], option: str, num_layers: int) -> Any:
    if option not in THRESHOLD_OPTIONS.values():
        return next(iter(criterion.sweep(num_layers)), 1)
    infinity = math.inf if criterion.exits_above else -math.inf
    if criterion.bound is None:
        return math.copysign(torch.finfo(torch.float32).max, infinity)
    # At the bound nothing would be computed. In float32 or below this is the bound, which no score passes.
    return math.nextafter(criterion.bound, -infinity)


def unfolded_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with the same weights, which it shares but for those of the trunk: there batch norms are not
    folded."""
    own = {id(tensor) for tensor in _tensors(model.get_encoder().embed_images)}
    copy = deepcopy(model, {id(tensor): tensor for tensor in _tensors(model) if id(tensor) not in own})
    copy.unfold_batch_norms()
    return copy


def _tensors(module: torch.nn.Module) -> Iterable[Tensor]:
    return [*module.parameters(), *module.buffers()]


@dataclass(frozen=True)
class Variant:
    """
    One way to generate.

    Args:
        name (`str`): what it is called in the record.
        model (`PreTrainedModel`): whose `generate` is called.
        inputs (`dict`): what it is called with.
        options (`dict`): options of `generate` beyond those of all variants.
        pattern (`DepthPattern`, *optional*): forced depths.
    """

    name: str
    model: PreTrainedModel
    inputs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: DepthPattern | None = None

    def run(self, decoding: Mapping[str, Any]) -> Any:
        """The output of one `generate` call under the options that all variants share."""
        # Forced depths of one call count its steps.
        with nullcontext() if self.pattern is None else forced_depths(self.model, self.pattern):
            return self.model.generate(**self.inputs, **decoding, **self.options)


def make_variants(
    names: Iterable[str],
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    exits: Mapping[str, Mapping[str, Any]],
    *,
    beams: int,
    steps: int,
) -> list[Variant]:
    """
    The variants of one cell on one model.

    Args:
        names (iterable of `str`): among [`variant_names`].
        model (`MuEForConditionalGeneration`): the model, with folded batch norms; "stock" and "plain" run without.
        inputs (`dict`): inputs of its `generate`.
        exits (`dict`): name -> exit options, for one more variant each.
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

    def make(name: str) -> Variant:
        if name == "stock":
            return Variant(name, StockModel(unfolded_copy(model)), inputs)
        if name == "plain":
            plain = unfolded_copy(model)
            plain.set_attn_implementation("eager")
            return Variant(name, plain, inputs, off)
        if name == "lossless":
            return Variant(name, model, inputs, off)
        if name in patterns:
            return Variant(name, model, inputs, patterns[name].options(config), patterns[name])
        criterion = name.partition("-")[2] or DEFAULT_CRITERION
        return Variant(name, model, inputs, unused_exits(config, criterion))

    chosen = [make(name) for name in variant_names() if name in names]
    return chosen + [Variant(name, model, inputs, options) for name, options in exits.items()]


__all__ = [
    "DEFAULT_VARIANTS",
    "DepthPattern",
    "Variant",
    "forced_depths",
    "half_pattern",
    "make_variants",
    "spread_pattern",
    "unfolded_copy",
    "unused_exits",
    "variant_names",
]
