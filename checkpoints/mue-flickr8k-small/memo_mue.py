"""What inference makes of weights alone, kept as long as the weights stay as they are."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Where modules come from that compute the same of the same weights.
PLAIN = ("torch.nn.modules.", "transformers.", "timm.")


class _Seen:
    """Weights as they were. Their versions do not count all writes: not those through `.data`, of merged adapters, nor
    those of fused optimizers. So the first value of each weight is looked at too."""

    def __init__(self, weights: list[Tensor]):
        # the addresses of what is held here no others may take
        self.weights = weights
        self.first: dict[torch.device, list[Tensor]] = {}
        for weight in weights:
            if weight.numel():
                self.first.setdefault(weight.device, []).append(weight.detach()[(0,) * weight.dim()])
        self.state = self._state(weights)

    def still(self, weights: list[Tensor]) -> bool:
        """Whether these are the same weights, and nobody has replaced, moved, cast or written to one."""
        return self.state == self._state(weights)

    def _state(self, weights: list[Tensor]) -> tuple:
        values = [torch.stack(some).tolist() for some in self.first.values()]
        return values, [(weight.data_ptr(), weight._version, weight.dtype, weight.device) for weight in weights]


class WeightMemo:
    """A few values computed from weights, each with the state of these weights.

    A value is made anew when a weight was written to, cast, moved or replaced. Entries are replaced as a whole, so
    threads see the old or the new one. Copies and pickles of a memo are empty.

    Args:
        size (`int`): most values to keep; the oldest goes first.
    """

    def __init__(self, size: int):
        self.size = size
        # by key: the weights as they were, and what was made of them
        self._entries: dict[Hashable, tuple[_Seen, Any]] = {}

    def __reduce__(self) -> tuple:
        return type(self), (self.size,)

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets all values."""
        self._entries = {}

    def get(self, key: Hashable, weights: list[Tensor] | None, make: Callable[[], Any]) -> Any:
        """The value of `key`: the kept one if it was made of `weights` as they are now, else what `make` returns.
        None where changes of the weights would go unseen."""
        # tensors made in inference mode count no writes
        if weights is None or any(weight.is_inference() or weight.is_meta for weight in weights):
            return None
        entry = self._entries.get(key)
        if entry is None or not entry[0].still(weights):
            entry = (_Seen(weights), make())
            kept = {name: value for name, value in self._entries.items() if name != key}
            self._entries = dict([*kept.items(), (key, entry)][-self.size :])
        return entry[1]


def plain_weights(modules: Iterable[nn.Module]) -> list[Tensor] | None:
    """Parameters and buffers of modules that are functions of these and of their input alone.

    None if one of the modules has hooks, or is of a class that may have switches of its own, as adapters have.
    """
    modules = list(modules)
    for module in modules:
        kind = type(module).__module__
        known = kind.startswith(PLAIN) or kind.rpartition(".")[0] == __name__.rpartition(".")[0]
        if not known or module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return None
    return weights_of(modules)


def weights_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers that modules hold themselves, tied ones more than once; in one pass, for every call."""
    held = (weight for module in modules for weight in (*module._parameters.values(), *module._buffers.values()))
    return [weight for weight in held if weight is not None]


__all__ = ["WeightMemo", "plain_weights", "weights_of"]
