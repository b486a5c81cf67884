"""Batch norms of an image trunk folded into the convolutions before them, for inference, and the way back."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Folding reorders additions: features may differ by this many times the dtype's precision of their largest value.
TOLERANCE = 1000


class BatchNormFolding:
    """The batch norms of a trunk, folded in place: a convolution takes over the scale and shift of the norm behind it.

    What runs is what the trunk's own weights say, before and after a write to them. The original weights are kept for
    `undo` and for fingerprints.

    Args:
        trunk (`nn.Module`): in evaluation mode; transformers' backbone interface.
        image_size (`int`): side of the random picture that shows which norm follows which convolution.
    """

    def __init__(self, trunk: nn.Module, image_size: int = 64):
        self.trunk = trunk
        weight = next(trunk.parameters())
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, 3, image_size, image_size, generator=generator).to(weight.device, weight.dtype)
        self.pairs = _convolutions_and_norms(trunk, pixels)
        self.originals = [(convolution.weight, convolution.bias) for convolution, _ in self.pairs]
        self.places = [_place(trunk, norm) for _, norm in self.pairs]
        self.activations = [m for m in trunk.modules() if isinstance(m, nn.ReLU | nn.ReLU6) and not m.inplace]
        expected = trunk(pixels).feature_maps[-1]
        for (convolution, norm), (parent, name) in zip(self.pairs, self.places, strict=True):
            convolution.weight, convolution.bias = _fused(convolution, norm)
            # timm's batch norms bring their activation along
            setattr(parent, name, nn.Sequential(*(getattr(norm, x) for x in ("drop", "act") if hasattr(norm, x))))
        self._run_in_place(True)
        error = (trunk(pixels).feature_maps[-1] - expected).abs().max()
        if not error <= TOLERANCE * torch.finfo(pixels.dtype).eps * expected.abs().max():
            self.undo(check=False)
            self.pairs, self.originals, self.places = [], [], []

    def _run_in_place(self, folded: bool) -> None:
        """Activations overwrite their input, and on a CPU channels come last."""
        for module in self.activations:
            module.inplace = folded
        if next(self.trunk.parameters()).device.type == "cpu":
            self.trunk.to(memory_format=torch.channels_last if folded else torch.contiguous_format)

    def undo(self, check: bool = True) -> None:
        """Puts the original weights and the norms back, on the device and in the dtype of the trunk.

        Raises:
            ValueError: if a weight was written to since it was folded, which would be lost.
        """
        if check and not self._is_untouched():
            raise ValueError(
                "the trunk must be unfolded before its weights are changed, got other weights than folding had made; "
                "call `unfold_batch_norms()` first, or load the model anew."
            )
        for (convolution, norm), (weight, bias), (parent, name) in zip(
            self.pairs, self.originals, self.places, strict=True
        ):
            now = convolution.weight
            convolution.weight, convolution.bias = _like(weight, now), None if bias is None else _like(bias, now)
            setattr(parent, name, norm.to(now.device, now.dtype))
        self._run_in_place(False)

    def _is_untouched(self) -> bool:
        for (convolution, norm), (weight, bias) in zip(self.pairs, self.originals, strict=True):
            folded = convolution.weight, convolution.bias
            convolution.weight, convolution.bias = weight, bias
            fused = _fused(convolution, norm)
            convolution.weight, convolution.bias = folded
            if not all(torch.equal(_like(one, now), now) for one, now in zip(fused, folded, strict=True)):
                return False
        return True

    def original_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """The weights and buffers of the trunk before folding that differ now, by their name in it; None for one that
        folding added."""
        names = {module: name for name, module in self.trunk.named_modules()}
        for (convolution, norm), (weight, bias), (parent, name) in zip(
            self.pairs, self.originals, self.places, strict=True
        ):
            yield f"{names[convolution]}.weight", weight
            yield f"{names[convolution]}.bias", bias
            prefix = f"{names[parent]}.{name}" if names[parent] else name
            for key, value in (*norm.named_parameters(), *norm.named_buffers()):
                yield f"{prefix}.{key}", value


def can_fold(trunk: nn.Module) -> bool:
    """Whether folding is worth a try: there are batch norms, and weights in memory of at least float32 (half precision
    would round them once more)."""
    norms = any(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    return norms and all(
        not weight.is_meta and weight.dtype in (torch.float32, torch.float64) for weight in trunk.parameters()
    )


def _fused(convolution: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    fused = fuse_conv_bn_eval(convolution, norm)
    return fused.weight.requires_grad_(False), fused.bias.requires_grad_(False)


def _like(weight: Tensor, other: Tensor) -> Any:
    """The weight on the device and in the dtype of another: itself, where it is."""
    if (weight.device, weight.dtype) == (other.device, other.dtype):
        return weight
    return nn.Parameter(weight.detach().to(other.device, other.dtype), weight.requires_grad)


def _place(trunk: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """The parent of a module, and its name there."""
    return next(
        (parent, name) for parent in trunk.modules() for name, child in parent.named_children() if child is module
    )


def _convolutions_and_norms(trunk: nn.Module, pixels: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """The batch norms whose input is the output of a convolution, found by running the trunk."""
    pairs: list[tuple[nn.Module, nn.Module]] = []
    latest: list[tuple[nn.Module, Tensor]] = []

    def note_output(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        latest[:] = [(module, output)]

    def note_norm(module: nn.Module, inputs: tuple) -> None:
        if latest and latest[0][1] is inputs[0] and module.running_var is not None:
            pairs.append((latest[0][0], module))

    handles = [m.register_forward_hook(note_output) for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(note_norm) for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    trunk(pixels)
    for handle in handles:
        handle.remove()
    return pairs


__all__ = ["BatchNormFolding", "can_fold"]
