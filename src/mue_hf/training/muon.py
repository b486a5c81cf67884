"""Muon for matrices and AdamW for the rest, in one optimizer, with the dtype of Muon's products as an option."""

from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any

import torch
from torch import Tensor

# The quintic Newton-Schulz steps of modded-nanogpt, as timm has them.
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
MOMENTUM = 0.95
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) with the learning rates of AdamW (Liu et al., 2025): the steps of timm's
    `Muon(nesterov=True)`, whose state it can load, but timm has no option for the dtype of the products.

    Args:
        params: parameters or groups. What is no matrix, and all of a group with `use_fallback=True`, is trained with
            Nesterov's AdamW.
        lr, weight_decay, betas: learning rate, decoupled weight decay, and the two decays of AdamW.
        dtype (`torch.dtype`): of Muon's matrix products.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "use_fallback": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            # Groups of timm's state have the key only where it is True.
            is_matrix = [not group.get("use_fallback") and _is_matrix(one) for one in trained]
            for parameter in compress(trained, is_matrix):
                self._muon(parameter, parameter.grad, group["lr"])
            if others := [one for one, matrix in zip(trained, is_matrix, strict=True) if not matrix]:
                self._adamw(others, [one.grad for one in others], group["lr"], *group["betas"])
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        momentum = self._state(parameter, "momentum_buffer")
        momentum.lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalized(gradient.lerp(momentum, MOMENTUM).flatten(1), self.dtype)
        scale = 0.2 * max(update.shape) ** 0.5
        parameter.add_(update.view(parameter.shape), alpha=-lr * scale)

    def _adamw(self, parameters: list[Tensor], gradients: list[Tensor], lr: float, beta1: float, beta2: float) -> None:
        means = [self._state(parameter, "exp_avg") for parameter in parameters]
        squares = [self._state(parameter, "exp_avg_sq") for parameter in parameters]
        steps = [int(self.state[parameter].setdefault("step", torch.zeros(())).add_(1)) for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, [(1 - beta2**count) ** 0.5 for count in steps])
        torch._foreach_add_(scales, EPS)
        # Nesterov: one step further along the gradient.
        ahead = torch._foreach_lerp(means, gradients, 1 - beta1)
        torch._foreach_addcdiv_(parameters, ahead, scales, [-lr / (1 - beta1**count) for count in steps])

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def _is_matrix(parameter: Tensor) -> bool:
    """Whether it maps one space to another, as vectors, depthwise kernels and very narrow matrices do not."""
    if parameter.ndim < 2 or 1 in parameter.shape[:2]:
        return False
    small, large = sorted((len(parameter), parameter[0].numel()))
    return small >= 4 and large <= 128 * small


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, columns] with singular values near 1, in `dtype`, by five Newton-Schulz steps."""
    wide = matrix.mT if len(matrix) > matrix.shape[1] else matrix
    found = wide.to(dtype)
    found = found / found.norm().clamp(min=EPS)
    for a, b, c in COEFFICIENTS:
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found if wide is matrix else found.mT


__all__ = ["Muon", "orthogonalized"]
