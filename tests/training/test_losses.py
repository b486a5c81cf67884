"""The layer-wise loss against the plain sum over layers, in values and gradients, with each of its options."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mue_hf.training.losses import layerwise_loss

LAYERS, ROWS, TOKENS, WIDTH, VOCABULARY = 3, 4, 5, 6, 11


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], nn.LayerNorm, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(ROWS, TOKENS, WIDTH, generator=generator, dtype=dtype) for _ in range(LAYERS)]
    norm = nn.LayerNorm(WIDTH, dtype=dtype)
    norm.weight.data = 1 + torch.randn(WIDTH, generator=generator, dtype=dtype) / 5
    norm.bias.data = torch.randn(WIDTH, generator=generator, dtype=dtype) / 5
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels[1, 2:], labels[2, :] = -100, -100
    for state in states:
        state.requires_grad_()
    return states, norm, weight, labels


def plain_loss(
    states: list[Tensor],
    norm: nn.LayerNorm,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: int | None = None,
    label_smoothing: float = 0.0,
    layer_weights: list[float] | None = None,
    self_distillation: float = 0.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """The sum written down as the paper has it, all logits at once."""
    valid = labels != -100
    items = num_items_in_batch or valid.sum()
    weights = torch.ones(ROWS, 1) if row_weights is None else row_weights.unsqueeze(1)
    weights = weights.expand(ROWS, TOKENS)[valid]
    teacher = F.linear(norm(states[-1]), weight).detach()[valid].log_softmax(-1)
    total = 0.0
    for layer, state in enumerate(states):
        logits = F.linear(norm(state), weight)[valid]
        losses = F.cross_entropy(logits, labels[valid], label_smoothing=label_smoothing, reduction="none")
        total = total + (1.0 if layer_weights is None else layer_weights[layer]) * (losses * weights).sum()
        if layer + 1 < len(states):
            divergence = (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1)
            total = total + self_distillation * divergence.sum()
    return total / items


def gradients(loss: Tensor, states: list[Tensor], norm: nn.LayerNorm, weight: Tensor) -> list[Tensor]:
    # a factor, because the loss need not be the end of the graph
    return torch.autograd.grad(0.7 * loss, [*states, norm.weight, norm.bias, weight])


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "items": {"num_items_in_batch": 40},
    "weights": {"layer_weights": [0.5, 0.0, 2.0], "label_smoothing": 0.2},
    "distillation": {"self_distillation": 1.5, "label_smoothing": 0.1},
    "distillation-alone": {"layer_weights": [0.0, 0.0, 1.0], "self_distillation": 0.5},
    "row-weights": {"row_weights": torch.tensor([1.0, -0.5, 2.0, 0.0], dtype=torch.float64), "self_distillation": 0.5},
}


class TestLayerwiseLoss:
    @pytest.mark.parametrize("piece_tokens", [None, 1, 4], ids=["one-piece", "single-tokens", "pieces"])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_values_and_gradients_are_those_of_the_plain_sum(self, options, piece_tokens):
        inputs = problem()
        expected = plain_loss(*inputs, **options)
        result = layerwise_loss(*inputs, **options, piece_tokens=piece_tokens)
        torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
        for ours, plain in zip(gradients(result.loss, *inputs[:3]), gradients(expected, *inputs[:3]), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-12)

    def test_layer_losses_and_accuracies(self):
        states, norm, weight, labels = problem()
        result = layerwise_loss(states, norm, weight, labels, label_smoothing=0.1, piece_tokens=3)
        valid = labels != -100
        for layer, state in enumerate(states):
            logits = F.linear(norm(state), weight)[valid]
            loss = F.cross_entropy(logits, labels[valid], label_smoothing=0.1)
            torch.testing.assert_close(result.layer_losses[layer], loss.detach())
            assert result.layer_accuracies[layer] == (logits.argmax(-1) == labels[valid]).double().mean().float()
        assert not result.layer_losses.requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_autocast(self, dtype, monkeypatch):
        monkeypatch.setattr("mue_hf.training.losses.BLOCK_ENTRIES", 4 * WIDTH)
        inputs = problem(torch.float32)
        with torch.autocast("cpu", dtype):
            expected = plain_loss(*inputs, label_smoothing=0.1, self_distillation=1.0)
            # as a loss scaler would have it: tiny gradients must survive half precision
            result = layerwise_loss(*inputs, label_smoothing=0.1, self_distillation=1.0, num_items_in_batch=12 * 2**20)
        torch.testing.assert_close(result.loss * 2**20, expected, rtol=1e-2, atol=1e-2)
        scaled = gradients(result.loss * 2**20, *inputs[:3])
        for ours, plain in zip(scaled, gradients(expected, *inputs[:3]), strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, plain, rtol=3e-2, atol=1e-2)

    def test_half_precision_weights(self):
        inputs = problem(torch.bfloat16)
        result = layerwise_loss(*inputs, piece_tokens=4)
        assert [gradient.dtype for gradient in gradients(result.loss, *inputs[:3])] == [torch.bfloat16] * 6
        torch.testing.assert_close(result.loss, plain_loss(*inputs).float(), rtol=2e-2, atol=2e-2)

    def test_frozen_head_gets_no_gradient(self):
        states, norm, weight, labels = problem()
        layerwise_loss(states, norm, weight.detach(), labels).loss.backward()
        assert weight.grad is None
        assert all(state.grad.abs().sum() > 0 for state in states)

    def test_without_gradients(self):
        inputs = problem()
        with torch.no_grad():
            result = layerwise_loss(*inputs)
        assert not result.loss.requires_grad
        torch.testing.assert_close(result.loss, plain_loss(*inputs).detach())

    def test_rows_without_targets(self):
        states, norm, weight, labels = problem()
        result = layerwise_loss(states, norm, weight, torch.full_like(labels, -100))
        assert result.loss == 0
        assert result.layer_losses.tolist() == result.layer_accuracies.tolist() == [0.0] * LAYERS
        assert all((gradient == 0).all() for gradient in gradients(result.loss, states, norm, weight))

    def test_second_backward_pass_is_refused(self):
        loss = layerwise_loss(*problem()).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="call it again for a second backward pass"):
            loss.backward()

    def test_token_share(self):
        states, norm, weight, labels = problem()
        tokens = int((labels != -100).sum())
        torch.manual_seed(0)
        results = [
            layerwise_loss(states, norm, weight, labels, intermediate_token_share=0.4, self_distillation=1.0)
            for _ in range(400)
        ]
        assert results[0].tokens.tolist() == [round(0.4 * tokens)] * 2 + [tokens]
        losses = torch.stack([result.loss.detach() for result in results])
        # drawn tokens stand for all: right on average, and the last layer is always there in full
        expected = plain_loss(states, norm, weight, labels, self_distillation=1.0).detach()
        assert losses.std() > 0
        assert abs(losses.mean() - expected) < 4 * losses.std() / 20
        for result in results[:3]:
            torch.testing.assert_close(result.layer_losses[-1], layerwise_loss(*problem()).layer_losses[-1])
        result.loss.backward()
        assert (states[-1].grad.abs().sum(-1) > 0).equal(labels != -100)
        assert int((states[0].grad.abs().sum(-1) > 0).sum()) == round(0.4 * tokens)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": torch.zeros(ROWS, TOKENS - 1, dtype=torch.long)}, "`states` must be one tensor"),
            ({"labels": torch.full((ROWS, TOKENS), VOCABULARY)}, r"`labels` must lie in the vocabulary \[0, 11\)"),
            ({"labels": torch.full((ROWS, TOKENS), -1)}, r"`labels` must lie in the vocabulary \[0, 11\)"),
            ({"layer_weights": [1.0]}, "`layer_weights` must hold one factor for each of the 3 decoder layers"),
            ({"label_smoothing": 1.0}, r"`label_smoothing` must be in \[0, 1\), got 1.0"),
            ({"intermediate_token_share": 0.0}, r"`intermediate_token_share` must be in \(0, 1\]"),
            ({"row_weights": torch.ones(2)}, "`row_weights` must hold one factor for each of the 4 rows"),
        ],
        ids=["shape", "token", "negative-token", "layer-weights", "smoothing", "share", "row-weights"],
    )
    def test_bad_input(self, change, message):
        inputs = dict(zip(("states", "norm", "weight", "labels"), problem(), strict=True)) | change
        with pytest.raises(ValueError, match=message):
            layerwise_loss(**inputs)
