"""The exponential moving average of the weights, as a callback of the trainer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from ..files import whole_file


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trained weights, which takes their place when training ends.

    Args:
        model (`nn.Module`): whose parameters are averaged, those that have `requires_grad`.
        decay (`float`): share of the average that a step keeps. The first steps keep less, (1 + step) / (10 + step),
            so that the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.decay = decay
        self.averages: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Those of a checkpoint are on the CPU, and in an order of their own.
        loaded = self.averages
        self.averages = {
            name: loaded[name].to(p.device) if name in loaded else p.detach().clone()
            for name, p in self.parameters.items()
        }

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        kept = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - kept)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._swap()
        self.averages = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, if training goes on."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, average in self.averages.items():
            weight = self.parameters[name].detach().clone()
            self.parameters[name].data.copy_(average)
            average.copy_(weight)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the averages as safetensors, whole or not at all."""
        with whole_file(path) as part:
            save_file({name: average.contiguous() for name, average in self.averages.items()}, part)

    def load(self, path: str | os.PathLike) -> None:
        """Reads what `save` wrote; ValueError if the file is missing or belongs to other parameters."""
        if not os.path.isfile(path):
            raise ValueError(
                f"`ema_decay` needs the average that a checkpoint of such a run has, but {path} does not exist; "
                "resume without `ema_decay`, or from another checkpoint."
            )
        self.averages = load_file(path)
        if self.averages.keys() != self.parameters.keys():
            differing = sorted(self.averages.keys() ^ self.parameters.keys())
            raise ValueError(
                f"{path} must average the parameters that are trained; only one of them has {differing[:5]}; "
                "freeze the same parts as before."
            )


__all__ = ["WeightAverage"]
