"""Muon against timm's: the same steps, in bfloat16 and in float32, without a change to timm's module."""

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mue_hf.training.muon import Muon, orthogonalized

# Matrices, wide and tall, a kernel, and what AdamW trains: a vector, a depthwise kernel, a matrix that is too narrow.
SHAPES = [(8, 8), (6, 20), (30, 5), (8, 4, 3, 3), (7,), (8, 1, 3, 3), (3, 9), (4, 600)]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(weights: list[Tensor]) -> list[dict]:
    table = torch.nn.Parameter(torch.ones(9, 9))
    return [
        {"params": weights, "lr": 0.02},
        {"params": [table], "use_fallback": True, "weight_decay": 0.0},
    ]


def steps(optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        for group in optimizer.param_groups:
            for index, weight in enumerate(group["params"]):
                weight.grad = torch.randn(weight.shape, generator=generator)
                # A layer that a step leaves out.
                if (number + index) % 3 == 2:
                    weight.grad = None
        optimizer.step()


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight.detach() for group in optimizer.param_groups for weight in group["params"]]


OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}


@pytest.fixture
def timm_muon():
    timm = pytest.importorskip("timm", reason="Muon is compared with timm's: pip install mue-hf[timm]")
    # older ones take other steps of AdamW for what is no matrix
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31):
        pytest.skip(f"Muon takes the steps of timm 1.0.31, got {timm.__version__}")
    return import_module("timm.optim.muon")


def test_steps_are_those_of_timm(timm_muon):
    usual = timm_muon.zeropower_via_newtonschulz
    expected = timm_muon.Muon(groups(parameters()), nesterov=True, **OPTIONS)
    ours = Muon(groups(parameters()), **OPTIONS)
    for optimizer in (expected, ours):
        steps(optimizer, 5)
    for found, weight in zip(weights_of(ours), weights_of(expected), strict=True):
        # Products are in bfloat16, but a different order of the same operations would show.
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)
    assert timm_muon.zeropower_via_newtonschulz is usual


def test_state_of_timm_is_resumed(timm_muon):
    expected = timm_muon.Muon(groups(parameters()), nesterov=True, **OPTIONS)
    steps(expected, 3)
    weights = weights_of(expected)
    ours = Muon(groups([torch.nn.Parameter(weight.clone()) for weight in weights[: len(SHAPES)]]), **OPTIONS)
    ours.param_groups[1]["params"][0].data.copy_(weights[-1])
    ours.load_state_dict(deepcopy(expected.state_dict()))
    for optimizer in (expected, ours):
        steps(optimizer, 3, seed=2)
    for found, weight in zip(weights_of(ours), weights_of(expected), strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (30, 5)])
def test_orthogonalisation_is_that_of_timm(shape, dtype, timm_muon):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coefficients = timm_muon.resolve_ns_coefficients("quintic", timm_muon._COEFFICIENTS)
    expected = timm_muon.zeropower_via_newtonschulz(matrix, 5, coefficients, dtype=dtype)
    found = orthogonalized(matrix, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.linalg.svdvals(found.float()).sub(1).abs().max() < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_products_are_in_the_dtype(dtype):
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    weight.grad = 2 * torch.eye(8) + torch.eye(8).roll(1, 0)
    optimizer, seen = Muon([weight], lr=0.1, dtype=dtype), set()

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **kwargs or {})
            seen.update(one.dtype for one in tree_leaves(output) if isinstance(one, torch.Tensor))
            return output

    with Look():
        optimizer.step()
    assert (torch.bfloat16 in seen) == (dtype == torch.bfloat16)
    # Newton-Schulz leaves singular values near 1, times the scale of an 8 x 8 matrix.
    values = torch.linalg.svdvals(weight.detach() / (0.1 * 0.2 * 8**0.5))
    assert values.sub(1).abs().max() < 0.4


def test_closure_gives_the_loss():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Muon([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert weight.detach().allclose(torch.full((3,), 0.81), atol=1e-3)
