"""What inference makes of weights alone, kept as long as the weights stay as they are."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Values that a look at the weights reads: writes through `.data`, as of averaged weights, count in no version.
PROBES = 8
# Where modules come from that compute the same of the same weights.
PLAIN = ("torch.nn.modules.", "transformers.", "timm.")


class WeightMemo:
    """A few values computed from weights, each with the state of these weights.

    A value is made anew when a weight was written to, cast, moved or replaced. Entries are replaced as a whole, so
    threads see the old or the new one. Copies and pickles of a memo are empty.

    Args:
        size (`int`): most values to keep; the oldest goes first.
    """

    def __init__(self, size: int):
        self.size = size
        # by key: the state of the weights, what was made of them, and the weights, whose addresses no others may take
        self._entries: dict[Hashable, tuple[tuple, Any, list[Tensor]]] = {}

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
        state = None if weights is None else weights_state(weights)
        if state is None:
            return None
        entry = self._entries.get(key)
        if entry is None or entry[0] != state:
            entry = (state, make(), weights)
            kept = {name: value for name, value in self._entries.items() if name != key}
            self._entries = dict([*kept.items(), (key, entry)][-self.size :])
        return entry[1]


def plain_weights(modules: Iterable[nn.Module]) -> list[Tensor] | None:
    """Parameters and buffers of modules that are functions of these and of their input alone.

    None if one of the modules has hooks, or is of a class that may have switches of its own, as adapters have.
    """
    weights: list[Tensor | None] = []
    for module in modules:
        kind = type(module).__module__
        known = kind.startswith(PLAIN) or kind.rpartition(".")[0] == __name__.rpartition(".")[0]
        if not known or module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return None
        weights += [*module._parameters.values(), *module._buffers.values()]
    return [weight for weight in weights if weight is not None]


def weights_state(weights: list[Tensor]) -> tuple | None:
    """What changes where weights are replaced, moved, cast or written to; None where nobody could tell."""
    if any(weight.is_inference() or weight.is_meta for weight in weights):
        # tensors made in inference mode count no writes
        return None
    probed = weights[:: max(1, len(weights) // PROBES)]
    values = torch.stack([weight.detach().reshape(-1)[-1].double() for weight in probed]).tolist()
    return (*values, *((weight.data_ptr(), weight._version, weight.dtype, weight.device) for weight in weights))


__all__ = ["WeightMemo", "plain_weights", "weights_state"]
