"""The exit criteria: each is one class that says which options it takes, what it looks at, when a row exits, and which
thresholds are worth a try. Registering one makes it known to `generate`, `evaluate`, `calibrate`, `bench` and docs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

# The exit options of each stream, by what they say.
THRESHOLD_OPTIONS = {
    "image": "image_exit_threshold",
    "text": "text_exit_threshold",
    "encoder": "encoder_exit_threshold",
    "decoder": "decoder_exit_threshold",
}
LAYER_OPTIONS = {
    "image": "image_exit_layer",
    "text": "text_exit_layer",
    "encoder": "encoder_exit_layer",
    "decoder": "decoder_exit_layer",
}
STREAMS = tuple(THRESHOLD_OPTIONS)
# Taken by every criterion that can exit, and by those that compare a score with a decaying threshold.
SHARED_OPTIONS = frozenset({"exit_criterion", "exit_kv", "exit_min_layers", "exit_rescore", "exit_warmup"})
ENCODER_THRESHOLDS = frozenset(name for stream, name in THRESHOLD_OPTIONS.items() if stream != "decoder")
DECODER_THRESHOLD = frozenset({"decoder_exit_threshold", "exit_decay_beta", "exit_decay_tau"})

Depth = int | Tensor | None


@dataclass(frozen=True)
class ExitPolicy:
    """When the rows of one stream exit. The default never does.

    Args:
        criterion (`str`): a name in `CRITERIA`.
        thresholds (tuple of `float` or None): one per layer; None never exits.
        depth (`int` or `LongTensor` [rows], *optional*): criterion "fixed", layers to run.
        patience (`int`): criterion "patience", layers in a row that must agree.
        min_layers (`int`): no row exits before this many layers.
        beta, tau, warmup (`float`): of the decay over decoding steps, see `at_step`.
        step (`int` or `LongTensor` [rows]): tokens of the output before the one that is decided about.
        fit (array [layers - 1, inputs + 1], *optional*): criterion "agreement", weights and bias of each layer.
        allowed (`BoolTensor` [rows, classes], *optional*): of the intermediate logits, those that count; all by
            default.
    """

    criterion: str = "never"
    thresholds: tuple[float | None, ...] = ()
    depth: Depth = None
    patience: int = 0
    min_layers: int = 1
    beta: float = 1.0
    tau: float = 1.0
    warmup: float = 0.0
    step: int | Tensor = 0
    fit: Any = None
    allowed: Tensor | None = None

    @property
    def is_never(self) -> bool:
        return self.criterion == "never"

    def at_step(self, step: int, num_steps: int) -> "ExitPolicy":
        """The policy of decoding step t = `step` of at most N = `num_steps`, with the thresholds
        Theta(t) = beta theta + (1 - beta) exp(-tau t / N) (MuE, section 3)."""
        if self.is_never or step < self.warmup * num_steps:
            return ExitPolicy()
        if self.beta == 1.0:
            return replace(self, step=step)
        decay = math.exp(-self.tau * step / num_steps)
        # An early step is stricter: its threshold is nearer to 1 where rows exit above it, to 0 where they exit below.
        decay = decay if CRITERIA[self.criterion].exits_above else 1.0 - decay
        thresholds = tuple(None if x is None else self.beta * x + (1.0 - self.beta) * decay for x in self.thresholds)
        return replace(self, thresholds=thresholds, beta=1.0, step=step)


@dataclass
class LayerStates:
    """What a criterion sees after a layer.

    Args:
        layer (`int`): the layer's index, from 0.
        previous, current (`Tensor` [rows, positions, d]): its input and output.
        mask (`BoolTensor` [rows, positions], *optional*): positions that count; all by default.
        rows (`LongTensor` [rows], *optional*): which rows of the call these are; all by default.
        predict (`Callable`, *optional*): states [rows, d] -> logits [rows, classes] of the output at this depth.
        allowed (`BoolTensor` [rows, classes], *optional*): classes that count; all by default.
    """

    layer: int
    previous: Tensor
    current: Tensor
    mask: Tensor | None = None
    rows: Tensor | None = None
    predict: Callable[[Tensor], Tensor] | None = None
    allowed: Tensor | None = None

    def logits(self, places: Tensor | None = None) -> Tensor:
        """The intermediate logits [rows, classes] at each row's last valid position, at least in float32. Classes are
        the tokens of `exit_candidates` in ascending order, or the whole vocabulary; those of answers in scoring. With
        `places` [rows, few] among the classes, the logits of these alone, which cost less."""
        states, allowed = last_valid(self.current, self.mask), self.allowed
        if places is None:
            logits = self.predict(states)
        else:
            at = getattr(self.predict, "at", None)
            logits = self.predict(states).gather(1, places) if at is None else at(states, places)
            allowed = None if allowed is None else allowed.gather(1, places)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        # not -inf, of which entropy is not a number
        return logits if allowed is None else logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)


class Criterion:
    """Base of the exit criteria: a score per row is compared with the layer's threshold.

    A subclass gives the attributes below and `score`, and is made known by `@register_criterion`. One object serves
    one call of one stack, so that it may remember what earlier layers said; rows are told apart by `states.rows`.

    Attributes:
        name (`str`): what `exit_criterion` calls it.
        summary (`str`): half a sentence for help and docs.
        options (set of `str`): exit options that it takes.
        needed (tuple of `str`): of these, the ones of which one must be given.
        remedy (`str`): what to do where none of them is.
        needs_logits (`bool`): whether it needs the output head after every layer.
        in_encoder (`bool`): whether encoder streams follow it; otherwise they follow similarity.
        exits_above (`bool`): whether rows exit above the threshold or below it.
        bound (`float`, *optional*): what no score exceeds (or falls below): at such a threshold nothing is computed.
        sweep_options (dict stream -> option): the option that a sweep varies, in each stream that follows it.
        candidates (sequence): values of it that are worth a try, from careful to fast; see `sweep`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[frozenset[str]] = SHARED_OPTIONS | ENCODER_THRESHOLDS | DECODER_THRESHOLD
    needed: ClassVar[tuple[str, ...]] = ()
    remedy: ClassVar[str] = "pass a number of layers."
    needs_logits: ClassVar[bool] = False
    in_encoder: ClassVar[bool] = False
    exits_above: ClassVar[bool] = True
    bound: ClassVar[float | None] = None
    sweep_options: ClassVar[dict[str, str]] = {"decoder": "decoder_exit_threshold"}
    candidates: ClassVar[Sequence[Any]] = ()

    def __init__(self, policy: ExitPolicy):
        self.policy = policy

    @classmethod
    def sweep(cls, num_layers: int) -> Sequence[Any]:
        """Values of `sweep_options` that are worth a try in a stack of `num_layers`, from careful to fast."""
        return cls.candidates

    @classmethod
    def check_options(cls, given: Mapping[str, Any], config: Any) -> None:
        """Raises a ValueError if `given`, the exit options of a call for a model of `config`, do not suit it; names,
        types and ranges that all criteria share have been checked."""

    @classmethod
    def head_rows(cls, looks: int, classes: int) -> int:
        """Rows of the output head that are computed to look at one row's logits of `classes` after so many layers."""
        return looks * classes if cls.needs_logits else 0

    @classmethod
    def is_asked_for(cls, policy: ExitPolicy) -> bool:
        """Whether the policy of a stream holds what lets rows exit by this criterion."""
        return any(threshold is not None for threshold in policy.thresholds)

    @classmethod
    def passes(cls, scores: Tensor, thresholds: float | Tensor) -> Tensor:
        """Where rows with these scores exit: the one comparison, for running models and for recorded scores."""
        return scores > thresholds if cls.exits_above else scores < thresholds

    def score(self, states: LayerStates) -> Tensor:
        """How sure the criterion is of each row, [rows]."""
        raise NotImplementedError

    def exits(self, states: LayerStates) -> Tensor | None:
        """Which rows exit after this layer, as a BoolTensor [rows]; None for no row."""
        if states.layer + 1 < self.policy.min_layers:
            return None
        threshold = self.policy.thresholds[states.layer]
        if threshold is None or self._is_out_of_reach(threshold):
            return None
        return self.passes(self.score(states), threshold)

    def _is_out_of_reach(self, threshold: float) -> bool:
        if self.bound is None:
            return False
        return threshold >= self.bound if self.exits_above else threshold <= self.bound


CRITERIA: dict[str, type[Criterion]] = {}


def register_criterion(criterion: type[Criterion]) -> type[Criterion]:
    """Makes a subclass of [`Criterion`] known under its name; a decorator.

    Raises:
        ValueError: if the name is taken.
    """
    if criterion.name in CRITERIA:
        raise ValueError(f"`name` must be new, got {criterion.name!r}, which is taken; choose another.")
    CRITERIA[criterion.name] = criterion
    return criterion


@register_criterion
class Similarity(Criterion):
    name = "similarity"
    summary = "the layer hardly changes the state: cosine of its input and output (MuE)"
    in_encoder = True
    bound = 1.0
    sweep_options = THRESHOLD_OPTIONS
    candidates = (0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8)

    def score(self, states: LayerStates) -> Tensor:
        return similarity(states.previous, states.current, states.mask)


@register_criterion
class Confidence(Criterion):
    name = "confidence"
    summary = "the best token of the intermediate logits is probable enough"
    needs_logits = True
    bound = 1.0
    candidates = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)

    def score(self, states: LayerStates) -> Tensor:
        return states.logits().softmax(-1).amax(-1)


@register_criterion
class Margin(Criterion):
    name = "margin"
    summary = "the probabilities of the two best tokens are far enough apart"
    needs_logits = True
    bound = 1.0
    candidates = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)

    def score(self, states: LayerStates) -> Tensor:
        top = states.logits().softmax(-1).topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]


@register_criterion
class Entropy(Criterion):
    name = "entropy"
    summary = "the entropy of the intermediate logits, divided by ln(classes), is low enough"
    needs_logits = True
    exits_above = False
    candidates = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)

    def score(self, states: LayerStates) -> Tensor:
        log_probs = states.logits().log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1) / math.log(max(log_probs.shape[-1], 2))


@register_criterion
class Patience(Criterion):
    name = "patience"
    summary = "enough layers in a row have the same best token (PABEE)"
    options = SHARED_OPTIONS | ENCODER_THRESHOLDS | {"exit_patience"}
    needed = ("exit_patience",)
    needs_logits = True
    sweep_options: ClassVar[dict[str, str]] = {"decoder": "exit_patience"}

    def __init__(self, policy: ExitPolicy):
        super().__init__(policy)
        # by row of the call; rows that take no part hold places that nobody reads
        self.best: Tensor | None = None
        self.agreeing: Tensor | None = None

    @classmethod
    def sweep(cls, num_layers: int) -> Sequence[int]:
        return range(num_layers - 1, 0, -1)

    @classmethod
    def is_asked_for(cls, policy: ExitPolicy) -> bool:
        return policy.patience > 0

    def score(self, states: LayerStates) -> Tensor:
        """Layers up to this one, [rows], whose best token is that of the layer before."""
        best = states.logits().argmax(-1)
        rows = torch.arange(len(best)) if states.rows is None else states.rows
        rows = rows.to(best.device)
        if self.best is None:
            size = int(rows.max()) + 1
            self.best, self.agreeing = best.new_full((size,), -1), best.new_zeros(size)
        same = best == self.best[rows]
        self.agreeing[rows] = torch.where(same, self.agreeing[rows] + 1, 0)
        self.best[rows] = best
        return self.agreeing[rows]

    def exits(self, states: LayerStates) -> Tensor | None:
        # every layer counts, also those too shallow to exit from
        patient = self.score(states) >= self.policy.patience
        return patient if states.layer + 1 >= self.policy.min_layers else None


@register_criterion
class Fixed(Criterion):
    name = "fixed"
    summary = "a given number of layers has run"
    options = SHARED_OPTIONS | frozenset(LAYER_OPTIONS.values())
    needed = tuple(LAYER_OPTIONS.values())
    in_encoder = True
    sweep_options = LAYER_OPTIONS

    @classmethod
    def sweep(cls, num_layers: int) -> Sequence[int]:
        return range(num_layers - 1, 0, -1)

    @classmethod
    def is_asked_for(cls, policy: ExitPolicy) -> bool:
        return policy.depth is not None

    def exits(self, states: LayerStates) -> Tensor | None:
        depth = self.policy.depth
        if states.layer + 1 < self.policy.min_layers:
            return None
        if isinstance(depth, Tensor):
            depth = depth.cpu()
            return (depth if states.rows is None else depth[states.rows]) <= states.layer + 1
        return torch.full((states.current.shape[0],), states.layer + 1 >= depth)


@register_criterion
class Never(Criterion):
    name = "never"
    summary = "no row exits: the plain model, the off switch"
    options = frozenset({"exit_criterion", "exit_kv"})
    in_encoder = True
    sweep_options: ClassVar[dict[str, str]] = {}

    def exits(self, states: LayerStates) -> Tensor | None:
        return None


def similarity(previous: Tensor, current: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine of a layer's input and output, one vector per row: all valid positions x d (MuE, equation 4).

    Args:
        previous, current (`Tensor` [rows, positions, d]): states in any floating dtype; half precision is summed in
            float32.
        mask (`BoolTensor` [rows, positions], *optional*): positions that count.

    Returns:
        `Tensor` [rows], at most 1; 0 where a state is the zero vector.
    """
    if previous.dtype in (torch.float16, torch.bfloat16):
        previous, current = previous.float(), current.float()
    if mask is None:
        previous, current = previous.flatten(1), current.flatten(1)
        norms = torch.linalg.vector_norm(previous, dim=1) * torch.linalg.vector_norm(current, dim=1)
        dot = torch.linalg.vecdot(previous, current)
    else:
        # masked by position, so that no state is copied
        norms = 1.0
        for states in (previous, current):
            norms = norms * torch.linalg.vector_norm(torch.linalg.vector_norm(states, dim=2) * mask, dim=1)
        dot = (torch.linalg.vecdot(previous, current) * mask).sum(1)
    return (dot / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)


def last_valid(states: Tensor, mask: Tensor | None) -> Tensor:
    """The state [rows, d] at each row's last valid position of states [rows, positions, d]."""
    if mask is None:
        return states[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(-1).clamp_min(0)
    return states[torch.arange(states.shape[0], device=states.device), last]


__all__ = [
    "CRITERIA",
    "LAYER_OPTIONS",
    "STREAMS",
    "THRESHOLD_OPTIONS",
    "Criterion",
    "ExitPolicy",
    "LayerStates",
    "last_valid",
    "register_criterion",
    "similarity",
]
