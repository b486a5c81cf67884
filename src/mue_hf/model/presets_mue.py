"""Whether a model has the weights, and a call the settings, that an exit preset was calibrated for: what the preset
promises holds for these."""

import sys
import warnings
from collections.abc import Mapping
from hashlib import sha256
from itertools import chain
from typing import Any

import torch
from torch import nn

from .exit_options_mue import chosen_preset

# Values of each tensor that the fingerprint of the weights looks at: training changes all of them.
FINGERPRINT_SAMPLES = 64


def weights_fingerprint(model: nn.Module) -> str | None:
    """SHA-256 of the names, shapes and dtypes of a model's tensors and of up to 64 values of each, evenly spaced.

    It is cheap and tells models, dtypes and trained weights apart, but not every change of single values. Folded batch
    norms count as they were before, and under an engine those that its graphs were made of, with their precision. None
    where weights are not in memory.
    """
    if getattr(model, "engine", None) is not None:
        return model.engine.fingerprint
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    for name, module in model.named_modules():
        if getattr(module, "folding", None) is not None:
            for key, tensor in module.folding.original_tensors():
                key = f"{name}.embed_images.{key}"
                tensors.pop(key, None)
                if tensor is not None:
                    tensors[key] = tensor
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            return None
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, values.numel() // FINGERPRINT_SAMPLES)].cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def decoding_settings(config: Any) -> dict[str, Any]:
    """How `generate` decodes under a GenerationConfig, exits aside, as a preset notes it in `certified_for`.

    Where there is no `max_new_tokens`, they are what `max_length` leaves to a prompt of one token.
    """
    beams = config.num_beams or 1
    settings = {
        "num_beams": beams,
        "do_sample": bool(config.do_sample),
        "no_repeat_ngram_size": config.no_repeat_ngram_size or 0,
        "max_new_tokens": config.max_new_tokens or (config.max_length or 20) - 1,
    }
    # of no effect without beams
    return settings | (
        {"length_penalty": 1.0 if config.length_penalty is None else config.length_penalty} if beams > 1 else {}
    )


def other_settings(preset: Mapping[str, Any], config: Any, dtype: torch.dtype) -> dict[str, tuple[Any, Any]]:
    """In what a call differs from what a preset was calibrated for: name to both values, the preset's first.

    The size of the batch is noted and not compared: other rows change a row's output by rounding alone.

    Args:
        preset (`dict`): its `certified_for` is looked at; presets of earlier versions have none and differ in nothing.
        config (`GenerationConfig`, *optional*): of the call; None where answers are scored, which decodes nothing.
        dtype (`torch.dtype`): of the model.
    """
    actual = {"dtype": str(dtype).removeprefix("torch.")}
    if config is not None:
        actual |= vars(config) | decoding_settings(config)
    certified = preset.get("certified_for") or {}
    return {
        name: (value, actual[name])
        for name, value in certified.items()
        if name != "batch_size" and name in actual and actual[name] != value
    }


class PresetCheckMixin:
    """Remembers which weights a model was loaded with, and warns where a preset was calibrated on others.

    The weights are looked at when a model is loaded, when such a preset is first used after that, after `train()`,
    `eval()` and `load_state_dict`, and by `check_presets`. Writes in place are not noticed in between.
    """

    _fingerprint: tuple[torch.dtype, str | None] | None = None

    def check_presets(self) -> list[str]:
        """Looks at the weights as they are now.

        Returns:
            `list[str]`: the saved presets that were calibrated on other weights, or in another dtype; a warning names
            them. Presets that note no weights promise nothing, and are not among them.
        """
        self._fingerprint = None
        presets = getattr(self.generation_config, "exit_presets", None) or {}
        stale = [name for name, preset in presets.items() if not self._holds(preset)]
        if stale:
            self._warn(f"the exit presets {stale} were")
        return stale

    def _holds(self, preset: Mapping[str, Any]) -> bool:
        expected = preset.get("weights_fingerprint")
        if expected is None:
            return True
        if self._fingerprint is None or self._fingerprint[0] != self.dtype:
            self._fingerprint = self.dtype, weights_fingerprint(self)
        return self._fingerprint[1] in (None, expected)

    def _check_chosen_preset(self, config: Any, *sources: Mapping[str, Any]) -> None:
        """Warns, once per place in the caller's code, if the preset that these sources of options choose is stale, or
        was calibrated for other settings than those of a call under `config`; see [`other_settings`]."""
        preset = chosen_preset(*sources)
        others = other_settings(preset, config, self.dtype)
        if others:
            listed = ", ".join(
                f"{name}={value!r} where this call has {ours!r}" for name, (value, ours) in others.items()
            )
            warnings.warn(
                "the exit preset of this call was calibrated for other settings, and what it promises holds for those "
                f"alone: {listed}; call with its settings, or run `mue-hf calibrate` with those of this call.",
                stacklevel=_callers_level(),
            )
        # the weights in another dtype are others
        if "dtype" not in others and not self._holds(preset):
            self._warn("the exit preset of this call was")

    def _warn(self, subject: str) -> None:
        warnings.warn(
            f"{subject} calibrated on other weights, or in another dtype: what it promises does not hold for this "
            "model; run `mue-hf calibrate` again.",
            stacklevel=_callers_level(),
        )

    def train(self, mode: bool = True) -> nn.Module:
        self._fingerprint = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._fingerprint = None
        return super().load_state_dict(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the model as it was before folding; warns of presets that were calibrated on other weights."""
        self.check_presets()
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads the model and notes which weights it has."""
        loaded = super().from_pretrained(*args, **kwargs)
        # a tuple if loading information was asked for
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for preset in (getattr(model.generation_config, "exit_presets", None) or {}).values():
            model._holds(preset)
        return loaded


def _callers_level() -> int:
    """The `stacklevel`, for a warning of the calling function, of the first frame outside this package, torch and
    transformers."""
    frame, level = sys._getframe(1), 1
    inside = (__name__.partition(".")[0], "torch", "transformers")
    while frame.f_back is not None and (frame.f_globals.get("__name__") or "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    return level


__all__ = ["PresetCheckMixin", "decoding_settings", "other_settings", "weights_fingerprint"]
