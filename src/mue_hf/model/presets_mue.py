"""Whether a model has the weights that its exit presets were calibrated on: what a preset promises holds for these."""

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

    def _check_chosen_preset(self, *sources: Mapping[str, Any]) -> None:
        """Warns, once per place in the caller's code, if the preset that these sources of options choose is stale."""
        if not self._holds(chosen_preset(*sources)):
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


__all__ = ["PresetCheckMixin", "weights_fingerprint"]
