"""MuE's layer-wise loss in bounded memory, and self-distillation from the last decoder layer.

The output head of OFA has 59,457 rows: the logits of six decoder layers at once would be most of a step's memory.
`layerwise_loss` therefore makes the logits of one piece (some tokens of one layer) at a time and takes the gradients
of that piece while its logits exist, so that neither they nor a second pass over the head is needed later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
# Logits that exist at a time; of OFA's vocabulary 141 tokens of one layer, 32 MiB in float32.
PIECE_LOGITS = 2**23
# Entries of the head's gradient that are made in half precision before they are added up in full.
BLOCK_ENTRIES = 2**22


class LayerwiseLoss(NamedTuple):
    """What [`layerwise_loss`] returns; `loss` [] is what is minimised, the others are detached.

    Args:
        loss_sums (`Tensor` [layers]): each layer's label-smoothed cross-entropy summed over its tokens.
        correct, tokens (`Tensor` [layers]): how many tokens each layer predicts correctly, of how many.
    """

    loss: Tensor
    loss_sums: Tensor
    correct: Tensor
    tokens: Tensor

    @property
    def layer_losses(self) -> Tensor:
        """Mean label-smoothed cross-entropy per layer [layers], in nats per token."""
        return self.loss_sums / self.tokens.clamp_min(1)

    @property
    def layer_accuracies(self) -> Tensor:
        """Share of tokens that each layer predicts correctly [layers]."""
        return self.correct / self.tokens.clamp_min(1)


def layerwise_loss(
    states: Sequence[Tensor],
    norm: Callable[[Tensor], Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
    layer_weights: Sequence[float] | None = None,
    self_distillation: float = 0.0,
    intermediate_token_share: float = 1.0,
    row_weights: Tensor | None = None,
    piece_tokens: int | None = None,
) -> LayerwiseLoss:
    """Sum over all decoder layers of the cross-entropy of head(norm(state)), divided by the number of target tokens
    (MuE, section 3.3, without its factor 1/N, as in the authors' code). Gradients are those of the plain sum.

    Under autocast the products with the head run in autocast's dtype, softmax and sums in float32. The gradients are
    made in the forward pass: they can be asked for once, and not be differentiated again.

    Args:
        states (sequence of `Tensor` [rows, tokens, d]): outputs of the decoder layers, before the final LayerNorm.
        norm (`Callable`): the final LayerNorm.
        weight (`Tensor` [vocabulary, d]): the output head.
        labels (`LongTensor` [rows, tokens]): targets; those of -100 cost nothing, also in time.
        num_items_in_batch (`int` or `Tensor` [], *optional*): target tokens to divide by, where these rows are a part
            of a batch (gradient accumulation, several processes). Default: those in `labels`.
        label_smoothing (`float` in [0, 1)): share of the target's probability that goes to all tokens alike.
        layer_weights (sequence of `float`, *optional*): a factor per layer of its cross-entropy; 1 by default. A
            layer of weight 0 is only evaluated, and trained by `self_distillation` if at all.
        self_distillation (`float`): weight of KL(last layer || layer), the last layer being detached.
        intermediate_token_share (`float` in (0, 1]): share of the tokens, drawn at random, on which the layers before
            the last are trained; their mean counts for all.
        row_weights (`Tensor` [rows], *optional*): a factor per row of its cross-entropy, e.g. a caption's advantage.
        piece_tokens (`int`, *optional*): tokens of one layer whose logits exist at a time.

    Raises:
        ValueError: for shapes that do not fit, targets outside the vocabulary, and weights out of range.
    """
    _check(states, weight, labels, label_smoothing, layer_weights, intermediate_token_share, row_weights)
    places = labels.flatten().ne(IGNORED).nonzero().squeeze(1)
    total, drawn = len(places), len(places)
    if intermediate_token_share < 1.0 and total:
        drawn = max(1, round(intermediate_token_share * total))
        # the drawn tokens come first, so that every layer reads a head of the same list
        places = places[torch.randperm(total, device=places.device)]
    targets = labels.flatten()[places]
    if total and not 0 <= int(targets.amin()) <= int(targets.amax()) < weight.shape[0]:
        raise ValueError(
            f"`labels` must lie in the vocabulary [0, {weight.shape[0]}) or be {IGNORED}, got "
            f"{int(targets.amin())} to {int(targets.amax())}; use the tokenizer that belongs to this model."
        )
    counts = [drawn] * (len(states) - 1) + [total]
    taken = [state.flatten(0, 1)[places[:count]] for state, count in zip(states, counts, strict=True)]
    device = weight.device.type
    plan = _Plan(
        scales=[total / max(count, 1) for count in counts],
        factors=[1.0] * len(states) if layer_weights is None else layer_weights,
        smoothing=label_smoothing,
        distillation=self_distillation,
        piece=piece_tokens or max(1, PIECE_LOGITS // weight.shape[0]),
        dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype,
        with_grad=torch.is_grad_enabled(),
    )
    if row_weights is not None:
        row_weights = row_weights.to(weight.device)[places // labels.shape[1]].unsqueeze(1)
    hidden = [norm(state) for state in taken]
    with torch.autocast(device, enabled=False):
        summed, loss_sums, predictions = _HeadLoss.apply(weight, targets, row_weights, plan, *hidden)
    loss = summed / (max(total, 1) if num_items_in_batch is None else num_items_in_batch)
    return LayerwiseLoss(loss, loss_sums, (predictions == targets).sum(1), torch.tensor(counts, device=labels.device))


@dataclass(frozen=True)
class _Plan:
    """The numbers of one call: what a token of each layer stands for, a factor per layer of its cross-entropy, the
    weight of divergences, tokens of a piece, dtype of the products."""

    scales: Sequence[float]
    factors: Sequence[float]
    smoothing: float
    distillation: float
    piece: int
    dtype: torch.dtype
    with_grad: bool


class _HeadLoss(torch.autograd.Function):
    """Weighted sum over layers and tokens of cross-entropy and divergence, from normalised states; also the
    cross-entropy of each layer [layers], and the predictions [layers, tokens], -1 where a layer has no such token:
    layers before the last may have fewer, the first ones of the list."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, targets: Tensor, row_weights: Tensor | None, plan: _Plan, *hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        head = weight.to(plan.dtype)
        total = torch.zeros((), dtype=wide, device=weight.device)
        loss_sums = torch.zeros(len(hidden), dtype=wide, device=weight.device)
        predictions = targets.new_full((len(hidden), len(targets)), -1)
        weight_grad: Tensor | None = None
        hidden_grads: list[Tensor] = []
        if plan.with_grad:
            hidden_grads = [torch.zeros_like(states) for states in hidden]
            if ctx.needs_input_grad[0]:
                weight_grad = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for start in range(0, len(targets), plan.piece):
            # the last layer first: its probabilities [tokens, classes], and their negative entropy, teach the others
            teacher: tuple[Tensor, Tensor] | None = None
            for layer in reversed(range(len(hidden))):
                states = hidden[layer][start : start + plan.piece].to(plan.dtype)
                if len(states) == 0:
                    continue
                rows, scale = slice(start, start + len(states)), plan.scales[layer]
                target = targets[rows].unsqueeze(1)
                factor: float | Tensor = plan.factors[layer]
                if row_weights is not None:
                    factor = factor * row_weights[rows]
                logits = states @ head.t()
                predictions[layer, rows] = logits.argmax(-1)
                log_probs = logits.log_softmax(-1, dtype=wide)
                del logits
                losses = _cross_entropy(log_probs, target, plan.smoothing)
                loss_sums[layer] += losses.sum()
                total += scale * (factor * losses).sum()
                soft: Tensor | None = None
                if teacher is not None:
                    soft, negative_entropy = (part[: len(states)] for part in teacher)
                    total += scale * plan.distillation * (negative_entropy - _dot(soft, log_probs)).sum()
                elif plan.distillation:
                    probs = log_probs.exp()
                    teacher = (probs, _dot(probs, log_probs))
                if plan.with_grad and (plan.factors[layer] != 0 or soft is not None):
                    gradient = _logit_gradient(log_probs, target, factor, plan, soft).to(plan.dtype)
                    hidden_grads[layer][rows] = scale * (gradient @ head)
                    if weight_grad is not None:
                        _add_product(weight_grad, gradient.t(), states, scale)
        ctx.grads = (weight_grad, hidden_grads)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(loss_sums, predictions)
        return total, loss_sums, predictions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("`layerwise_loss` gives its gradients once; call it again for a second backward pass.")
        weight_grad, hidden_grads = ctx.grads
        # scaled in place and given away: a copy of the head's gradient is what this function saves
        ctx.grads = None
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grad_total).to(ctx.dtype)
        return weight_grad, None, None, None, *(gradient.mul_(grad_total) for gradient in hidden_grads)


def _cross_entropy(log_probs: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy [tokens, 1] from log-probabilities [tokens, classes] and targets [tokens, 1]."""
    losses = (smoothing - 1) * log_probs.gather(1, target)
    return losses - smoothing * log_probs.mean(1, keepdim=True) if smoothing else losses


def _logit_gradient(
    log_probs: Tensor, target: Tensor, factor: float | Tensor, plan: _Plan, teacher: Tensor | None
) -> Tensor:
    """d loss / d logits [tokens, classes], written over `log_probs`; `factor` of the cross-entropy is a number or
    [tokens, 1]. Not divided by the number of tokens: in half precision the small quotients would be lost."""
    gradient = log_probs.exp_()
    if teacher is None:
        gradient.mul_(factor)
    else:
        gradient.mul_(factor + plan.distillation).sub_(teacher, alpha=plan.distillation)
    if plan.smoothing:
        gradient.sub_(factor * (plan.smoothing / gradient.shape[1]))
    return gradient.scatter_add_(1, target, gradient.new_full(target.shape, plan.smoothing - 1).mul_(factor))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Products [tokens, 1] of the rows of two tensors [tokens, classes], without a third of their size."""
    return (left.unsqueeze(1) @ right.unsqueeze(2)).squeeze(2)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total += scale * left @ right; `total` may be of a wider dtype, and has no second of its size beside it then."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
        return
    rows = max(1, BLOCK_ENTRIES // total.shape[1])
    for start in range(0, len(total), rows):
        block = slice(start, start + rows)
        total[block].add_(left[block] @ right, alpha=scale)


def _check(
    states: Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float,
    layer_weights: Sequence[float] | None,
    intermediate_token_share: float,
    row_weights: Tensor | None,
) -> None:
    shape, layers = [*labels.shape, weight.shape[1]], len(states)
    if not states or any(list(state.shape) != shape for state in states):
        raise ValueError(
            f"`states` must be one tensor {shape} per decoder layer, as `labels` and the head have it, got "
            f"{[list(state.shape) for state in states]}; leave out the input of the first layer."
        )
    if layer_weights is not None and len(layer_weights) != layers:
        got = list(layer_weights)
        raise ValueError(f"`layer_weights` must hold one factor for each of the {layers} decoder layers, got {got}.")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}; pass 0 for none.")
    if not 0.0 < intermediate_token_share <= 1.0:
        raise ValueError(
            f"`intermediate_token_share` must be in (0, 1], got {intermediate_token_share}; pass 1 for all tokens, or "
            "`layer_weights` of 0 to train the last layer alone."
        )
    if row_weights is not None and row_weights.shape != labels.shape[:1]:
        raise ValueError(
            f"`row_weights` must hold one factor for each of the {labels.shape[0]} rows of `labels`, got the shape "
            f"{list(row_weights.shape)}."
        )


__all__ = ["IGNORED", "LayerwiseLoss", "layerwise_loss"]
