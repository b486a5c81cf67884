"""The ways to generate that `mue-hf bench` times beside each other, and forced depths that differ between rows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.agreement_mue import blank_fit
from ..model.criteria_mue import CRITERIA, THRESHOLD_OPTIONS, Criterion
from ..model.exit_options_mue import ExitOptions
from .probes import hooked
from .stock import StockModel, unfolded_copy

# Those that are timed by default, in the order of the tables.
DEFAULT_VARIANTS = ("stock", "plain", "lossless", "enabled", "half", "spread", "synchronised")
# Of these, references and a test rig: torch alone runs them.
TORCH_ONLY = ("stock", "plain", "synchronised")
# Candidate tokens of criteria with intermediate logits, where none are saved.
MADE_UP_TOKENS = 512
DEFAULT_CRITERION = ExitOptions().exit_criterion


def variant_names() -> list[str]:
    """All that there are by name: the default ones, and "enabled" by each further criterion that has a score."""
    scored = [name for name, one in CRITERIA.items() if one.score is not Criterion.score and name != DEFAULT_CRITERION]
    return [*DEFAULT_VARIANTS, *(f"enabled-{name}" for name in scored)]


@dataclass(frozen=True)
class DepthPattern:
    """Layers to run, given instead of decided.

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
        image, decoder = self.image.max(), self.decoder.amax(dim=1, keepdim=True)
        return DepthPattern(image.expand_as(self.image), self.text, decoder.expand_as(self.decoder))

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
    image, text, decoder = ((config.layers_of(stream) + 1) // 2 for stream in ("image", "text", "decoder"))
    return DepthPattern(torch.full((batch,), image), text, torch.full((steps, batch * beams), decoder))


def spread_pattern(config: Any, batch: int, beams: int, steps: int) -> DepthPattern:
    """Every depth from 1 to all layers but one equally often, half of the layers on average; neighbouring rows and
    steps differ."""

    def depths(places: Tensor, layers: int) -> Tensor:
        # A single layer is all there is.
        return 1 + (places + max(layers // 2 - 1, 0)) % max(layers - 1, 1)

    places = torch.arange(batch * beams) + 2 * torch.arange(steps).unsqueeze(1)
    image, decoder = depths(torch.arange(batch), config.layers_of("image")), depths(places, config.decoder_layers)
    return DepthPattern(image, (config.layers_of("text") + 1) // 2, decoder)


def unused_exits(config: Any, criterion: str, tokens: Sequence[int] | None = None) -> dict[str, Any]:
    """Exit options by which every stream computes the scores of a criterion (or of the default one, where the encoder
    does not follow it), and no row exits. Criteria with intermediate logits look at the candidate `tokens` that are
    saved with the model, or else at a few hundred; one that needs a fit has a made-up one."""
    cls = CRITERIA[criterion]
    # Whatever the checkpoint has saved.
    neutral = {"exit_decay_beta": 1.0, "exit_warmup": 0.0}
    options: dict[str, Any] = {"exit_criterion": criterion}
    options |= {name: neutral[name] for name in neutral if name in cls.options}
    if cls.needs_logits:
        options["exit_candidates"] = list(tokens or range(min(MADE_UP_TOKENS, config.vocab_size)))
    if "exit_fit" in cls.needed:
        options["exit_fit"] = blank_fit(config.decoder_layers, options["exit_candidates"], None)
    for stream in ("image", "text", "decoder") if config.modality_decomposition else ("encoder", "decoder"):
        followed = cls if stream in cls.sweep_options else CRITERIA[DEFAULT_CRITERION]
        option = followed.sweep_options[stream]
        if option in THRESHOLD_OPTIONS.values():
            options[option] = _out_of_reach(followed)
        else:
            options[option] = next(iter(followed.sweep(config.layers_of(stream))), 1)
    return options


def _out_of_reach(criterion: type[Criterion]) -> float:
    infinity = math.inf if criterion.exits_above else -math.inf
    if criterion.bound is None:
        return math.copysign(torch.finfo(torch.float32).max, infinity)
    # At the bound nothing would be computed. In float32 or below this is the bound, which no score passes.
    return math.nextafter(criterion.bound, -infinity)


def row_name(name: str, export: str | None) -> str:
    """What a variant is called in the record, in torch or on an export."""
    return name if export is None else f"{name} on {export}"


@dataclass(frozen=True)
class Variant:
    """One way to generate.

    Args:
        name (`str`): what it is called.
        model (`PreTrainedModel`), inputs (`dict`): whose `generate` is called, and what with.
        options (`dict`): options of `generate` beyond those of all variants.
        pattern (`DepthPattern`, *optional*): forced depths.
        export (`str`, *optional*): the name of the export whose graphs run it; None for torch.
    """

    name: str
    model: PreTrainedModel
    inputs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: DepthPattern | None = None
    export: str | None = None

    @property
    def row(self) -> str:
        """What it is called in the record."""
        return row_name(self.name, self.export)

    @property
    def place(self) -> dict[str, str]:
        """What runs it: "engine" and "precision", and for an export the name of the "variant" and of the "export"."""
        if self.export is None:
            return {"engine": "torch", "precision": str(self.model.dtype).removeprefix("torch.")}
        precision = self.model.engine.precision
        return {"engine": "onnxruntime", "precision": precision, "variant": self.name, "export": self.export}

    @property
    def encoder(self) -> nn.Module:
        """The module whose end is the beginning of the decode."""
        # BLIP's vision model feeds a decoder, there is no encoder-decoder around them.
        return self.model.vision_model if self.model.config.model_type == "blip" else self.model.get_encoder()

    def run(self, decoding: Mapping[str, Any]) -> Any:
        """The output of one `generate` call under the options that all variants share."""
        handles = []
        if self.pattern is not None:
            depths = iter(self.pattern.decoder)

            def force(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
                return args, kwargs | {"policy": replace(kwargs["policy"], depth=next(depths))}

            handles.append(self.model.get_decoder().register_forward_pre_hook(force, with_kwargs=True))
        with hooked(*handles):
            return self.model.generate(**self.inputs, **decoding, **self.options)


def make_variants(
    names: Iterable[str],
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    exits: Mapping[str, Mapping[str, Any]],
    *,
    beams: int,
    steps: int,
    export: str | None = None,
) -> list[Variant]:
    """The variants of one cell on one model.

    Args:
        names (iterable of `str`): among [`variant_names`]; with `export` those of `TORCH_ONLY` are left out.
        model (`MuEForConditionalGeneration`): with folded batch norms; "stock" and "plain" run without.
        inputs (`dict`): of its `generate`.
        exits (`dict`): name -> exit options, for one more variant each.
        beams, steps (`int`): of `generate`; steps are new tokens.
        export (`str`, *optional*): the name of the export that the model runs on.
    """
    config, sizes = model.config, (inputs["input_ids"].shape[0], beams, steps)
    off, spread = {"exit_criterion": "never"}, spread_pattern(config, *sizes)
    patterns = {"half": half_pattern(config, *sizes), "spread": spread, "synchronised": spread.synchronised()}

    def make(name: str) -> Variant:
        if name == "stock":
            return Variant(name, StockModel(model), inputs)
        if name == "plain":
            plain = unfolded_copy(model)
            plain.set_attn_implementation("eager")
            return Variant(name, plain, inputs, off)
        if name == "lossless":
            return Variant(name, model, inputs, off)
        if name in patterns:
            return Variant(name, model, inputs, patterns[name].options(config), patterns[name])
        criterion = name.partition("-")[2] or DEFAULT_CRITERION
        tokens = getattr(model.generation_config, "exit_candidates", None)
        return Variant(name, model, inputs, unused_exits(config, criterion, tokens))

    left_out = () if export is None else TORCH_ONLY
    chosen = [make(name) for name in variant_names() if name in names and name not in left_out]
    chosen += [Variant(name, model, inputs, options) for name, options in exits.items()]
    return [replace(one, export=export) for one in chosen]


__all__ = [
    "DEFAULT_VARIANTS",
    "TORCH_ONLY",
    "Variant",
    "half_pattern",
    "make_variants",
    "row_name",
    "spread_pattern",
    "variant_names",
]
