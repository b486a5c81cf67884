"""What inference makes of weights alone, kept as long as the weights stay as they are."""

from collections.abc import Callable, Hashable, Iterable
from ctypes import c_char
from functools import lru_cache
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

# Where modules come from that compute the same of the same weights.
PLAIN = ("torch.nn.modules.", "transformers.", "timm.")
STATE = attrgetter("_version", "dtype")


class _Seen:
    """Weights as they were. Their versions do not count all writes: not those through `.data`, of merged adapters, nor
    those of fused optimizers. So the first value of each weight is looked at too."""

    def __init__(self, weights: list[Tensor]):
        # what is held here keeps its address to itself, also when a weight gets other data
        self.weights, self.held = weights, [weight.detach() for weight in weights]
        # first values: where they lie in the memory that Python reads, and by device where it cannot
        self.bytes: list[Any] = []
        self.values: dict[torch.device, list[Tensor]] = {}
        for weight in self.held:
            if not weight.numel():
                continue
            if weight.device.type == "cpu" and type(weight) is Tensor:
                # not through numpy, after which nobody can resize the storage any more
                self.bytes.append((c_char * weight.element_size()).from_address(weight.data_ptr()))
            else:
                self.values.setdefault(weight.device, []).append(weight[(0,) * weight.dim()])
        self.places, self.first = self._places(), self._first()

    def still(self, weights: list[Tensor]) -> bool:
        """Whether these are the same weights, and nobody has replaced, moved, cast or written to one."""
        same = len(weights) == len(self.weights) and all(map(is_, weights, self.weights))
        # an address is read only where it is still that of a weight
        return same and self.places == self._places() and self.first == self._first()

    # Every call of `generate` waits for these: each is a few passes in C.
    def _places(self) -> tuple:
        return list(map(Tensor.data_ptr, self.weights)), list(map(STATE, self.weights))

    def _first(self) -> tuple:
        return b"".join(self.bytes), [torch.stack(some).tolist() for some in self.values.values()]


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
        entry = self._entries.get(key)
        if weights is not None and entry is not None and entry[0].still(weights):
            return entry[1]
        if weights is None or not all(map(_can_be_watched, weights)):
            return None
        entry = (_Seen(weights), make())
        kept = {name: value for name, value in self._entries.items() if name != key}
        self._entries = dict([*kept.items(), (key, entry)][-self.size :])
        return entry[1]


def _can_be_watched(weight: Tensor) -> bool:
    # tensors made in inference mode count no writes
    if weight.is_inference() or weight.is_meta:
        return False
    if weight.device.type != "cpu" or type(weight.detach()) is not Tensor or not weight.numel():
        return True
    # FSDP frees weights that are not in use
    return weight.untyped_storage().nbytes() >= (weight.storage_offset() + 1) * weight.element_size()


def plain_weights(modules: Iterable[nn.Module]) -> list[Tensor] | None:
    """Parameters and buffers of modules that are functions of these and of their input alone.

    None if one of the modules has hooks, or is of a class that may have switches of its own, as adapters have.
    """
    modules = list(modules)
    for module in modules:
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        if hooked or not _is_plain(type(module)):
            return None
    return weights_of(modules)


@lru_cache
def _is_plain(kind: type[nn.Module]) -> bool:
    package = __name__.rpartition(".")[0]
    return kind.__module__.startswith(PLAIN) or kind.__module__.rpartition(".")[0] == package


def weights_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers that modules hold themselves, tied ones more than once."""
    held = chain.from_iterable((module._parameters.values(), module._buffers.values()) for module in modules)
    return [weight for weight in chain.from_iterable(held) if weight is not None]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()` in another order, and in a fraction of its time."""
    found, seen = [model], {model}
    for module in found:
        new = [one for one in module._modules.values() if one is not None and one not in seen]
        found.extend(new)
        seen.update(new)
    return found


__all__ = ["WeightMemo", "modules_of", "plain_weights", "weights_of"]
