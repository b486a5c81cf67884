"""The exit decision, once: options, thresholds, criteria, and the one layer loop that drops rows which left.

Encoder streams and decoder call `run_stack`; nothing else in the package decides when a row stops.
"""

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .costs_mue import check_costs, shrinking_pays

CRITERIA = ("similarity", "confidence", "margin", "entropy", "patience", "fixed", "never")
KV_POLICIES = ("project", "copy", "exact")
STREAMS = ("image", "text", "encoder", "decoder")

# MuE appendix A, and the authors' released scripts (first third of the steps without exits).
SHIPPED_PRESETS: dict[str, dict[str, Any]] = {
    "paper-captioning": {
        "image_exit_threshold": 0.90,
        "text_exit_threshold": 0.95,
        "decoder_exit_threshold": 0.99,
        "exit_decay_beta": 0.95,
        "exit_decay_tau": 1.0,
    },
    "paper-entailment": {
        "image_exit_threshold": 0.90,
        "text_exit_threshold": 0.95,
        "decoder_exit_threshold": 0.95,
    },
    "released-captioning": {
        "image_exit_threshold": 0.99,
        "text_exit_threshold": 0.70,
        "decoder_exit_threshold": 0.90,
        "exit_decay_beta": 0.9,
        "exit_decay_tau": 1.0,
        "exit_warmup": 1 / 3,
    },
    "released-entailment": {
        "image_exit_threshold": 0.70,
        "text_exit_threshold": 0.99,
        "decoder_exit_threshold": 0.70,
    },
}

Threshold = float | tuple[float | None, ...] | None
Depth = int | Tensor | None


@dataclass(frozen=True)
class ExitOptions:
    """Every exit option of a call, validated. None means: never leave.

    Args:
        image_exit_threshold, text_exit_threshold (`float` or one per layer):
            Cosine above which the stream of that modality leaves (decomposed encoder).
        encoder_exit_threshold (`float` or one per layer):
            The same for the joint encoder.
        decoder_exit_threshold (`float` or one per layer):
            Threshold of the decoder's criterion; the decay applies to each.
        exit_decay_beta, exit_decay_tau (`float`, in [0, 1] and at least 0):
            Theta(t) = beta * threshold + (1 - beta) * exp(-tau * t / N) at decoding step t of at most N (MuE, sec. 3).
        exit_warmup (`float` in [0, 1]):
            Share of the decoding steps, from the first, without exits.
        exit_criterion (`str`):
            One of `CRITERIA`, for the decoder. The encoder knows similarity (also when the decoder follows confidence,
            margin, entropy or patience), fixed and never.
        exit_patience (`int`):
            Criterion "patience": number of consecutive layers whose prediction is that of the layer before (PABEE).
        image_exit_layer, text_exit_layer, encoder_exit_layer, decoder_exit_layer (`int`):
            Criterion "fixed": number of layers to run. `forward` also takes a LongTensor [batch] for the encoder.
        exit_min_layers (`int`):
            No row leaves before this many layers.
        exit_kv (`str`):
            Self-attention keys and values of skipped layers: "project" (from the exit state), "copy" (of the exit
            layer) or "exact" (the skipped layers are run when a later token needs them).
        exit_costs (`dict`):
            What layer calls take on some device, as `measure_costs` returns it; says when rows that left are taken out
            of the batch. It changes what is run, never what comes out. Default: at once.
    """

    image_exit_threshold: Threshold = None
    text_exit_threshold: Threshold = None
    encoder_exit_threshold: Threshold = None
    decoder_exit_threshold: Threshold = None
    exit_decay_beta: float = 1.0
    exit_decay_tau: float = 1.0
    exit_warmup: float = 0.0
    exit_criterion: str = "similarity"
    exit_patience: int | None = None
    image_exit_layer: Depth = None
    text_exit_layer: Depth = None
    encoder_exit_layer: Depth = None
    decoder_exit_layer: Depth = None
    exit_min_layers: int = 1
    exit_kv: str = "project"
    exit_costs: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], config: Any) -> "ExitOptions":
        """Builds and validates options against a `MuEConfig`; entries that are None count as absent.

        Raises:
            ValueError: for an unknown name, a wrong type or range, options that contradict each other, or options of
                the other encoder mode. The message names field, rule, value and remedy.
        """
        given = {name: value for name, value in options.items() if value is not None}
        check_names(given)
        layers = {"image": config.encoder_layers, "text": config.encoder_layers, "encoder": config.encoder_layers}
        layers["decoder"] = config.decoder_layers
        for stream, count in layers.items():
            name = f"{stream}_exit_threshold"
            if name in given:
                given[name] = _checked_threshold(name, given[name], count)
            name = f"{stream}_exit_layer"
            if name in given:
                _check_depth(name, given[name], count)
        _check_scalars(given, max(config.encoder_layers, config.decoder_layers))
        if "exit_costs" in given:
            check_costs(given["exit_costs"])
        _check_mode(given, config.modality_decomposition)
        _check_contradictions(given)
        return cls(**given)

    @property
    def active(self) -> bool:
        """Whether any row could leave early under these options."""
        names = [f"{stream}_exit_{what}" for stream in STREAMS for what in ("threshold", "layer")]
        return self.exit_criterion != "never" and (
            self.exit_patience is not None or any(getattr(self, name) is not None for name in names)
        )

    def policy(self, stream: str, num_layers: int) -> "ExitPolicy":
        """The policy of one stream ("image", "text", "encoder" or "decoder")."""
        criterion = self.exit_criterion
        if stream != "decoder" and criterion not in ("fixed", "never"):
            criterion = "similarity"
        threshold, depth = getattr(self, f"{stream}_exit_threshold"), getattr(self, f"{stream}_exit_layer")
        if criterion == "fixed":
            off = depth is None
        elif criterion == "patience":
            off = self.exit_patience is None
        else:
            off = threshold is None
        if off or criterion == "never":
            return ExitPolicy()
        schedule = (self.exit_decay_beta, self.exit_decay_tau, self.exit_warmup) if stream == "decoder" else ()
        policy = ExitPolicy(
            criterion,
            threshold if isinstance(threshold, tuple) else (threshold,) * num_layers,
            depth,
            self.exit_patience or 0,
            self.exit_min_layers,
            *schedule,
        )
        return replace(
            policy, costs={device: of[stream] for device, of in (self.exit_costs or {}).items() if stream in of}
        )


@dataclass(frozen=True)
class ExitPolicy:
    """When the rows of one stream leave. The default never does."""

    criterion: str = "never"
    thresholds: tuple[float | None, ...] = ()
    depth: Depth = None
    patience: int = 0
    min_layers: int = 1
    beta: float = 1.0
    tau: float = 1.0
    warmup: float = 0.0
    # by device; they change what is run, not what comes out
    costs: Mapping[str, Mapping[str, float]] | None = field(default=None, compare=False)

    @property
    def is_never(self) -> bool:
        return self.criterion == "never"

    def at_step(self, step: int, num_steps: int) -> "ExitPolicy":
        """The policy with the thresholds Theta(t) of decoding step t = `step` of at most N = `num_steps`."""
        if self.is_never or step < self.warmup * num_steps:
            return ExitPolicy()
        if self.beta == 1.0:
            return self
        # Entropy leaves below its threshold, the others above theirs: mirrored, an early step is stricter in both.
        decay = math.exp(-self.tau * step / num_steps)
        decay = 1.0 - decay if self.criterion == "entropy" else decay
        thresholds = tuple(None if x is None else self.beta * x + (1.0 - self.beta) * decay for x in self.thresholds)
        return replace(self, thresholds=thresholds, beta=1.0)


class ExitSchedule(LogitsProcessor):
    """Carries Theta(t) through `generate`: `policy` is the decoder's policy of the step that comes next.

    It leaves the scores as they are. One object serves one call.

    Args:
        policy (`ExitPolicy`): the decoder's policy, undecayed.
        prompt_length (`int`): decoder tokens before the first new one.
        num_steps (`int`): N, the greatest number of new tokens of the call.
    """

    def __init__(self, policy: ExitPolicy, prompt_length: int, num_steps: int):
        self.base_policy = policy
        self.prompt_length = prompt_length
        self.num_steps = max(num_steps, 1)
        self.step = 0

    @property
    def policy(self) -> ExitPolicy:
        return self.base_policy.at_step(self.step, self.num_steps)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # `input_ids` is the prefix of the step that has just been scored.
        self.step = input_ids.shape[1] - self.prompt_length + 1
        return scores


class ExitDecider:
    """Decides layer by layer which rows leave, for one call of one stack.

    Args:
        policy (`ExitPolicy`): what to decide by.
        mask (`BoolTensor` [rows, positions], *optional*): the positions that count; all by default.
        predict (`Callable`, *optional*): states [rows, d] -> logits [rows, classes] of that depth's output. Needed for
            confidence, margin, entropy and patience.
    """

    def __init__(self, policy: ExitPolicy, mask: Tensor | None = None, predict: Callable | None = None):
        self.policy = policy
        self.mask = mask
        self.predict = predict
        self.predictions: Tensor | None = None
        self.agreeing: Tensor | None = None

    def __call__(self, layer: int, previous: Tensor, current: Tensor, rows: Tensor | None) -> Tensor | None:
        """Which rows leave after layer `layer` (0-based), as a BoolTensor [rows]; None for no row.

        Args:
            previous, current (`Tensor` [rows, positions, d]): the layer's input and output.
            rows (`LongTensor` [rows], *optional*): which rows of the call these are; all by default.
        """
        policy = self.policy
        if policy.is_never:
            return None
        if policy.criterion == "patience":
            # Every layer is looked at, also those too shallow to leave from.
            settled = self._count_agreeing(current, rows) >= policy.patience
            return settled if layer + 1 >= policy.min_layers else None
        if layer + 1 < policy.min_layers:
            return None
        if policy.criterion == "fixed":
            return self._fixed(layer, current.shape[0], rows)
        threshold = policy.thresholds[layer]
        if threshold is None or (policy.criterion == "similarity" and threshold >= 1.0):
            return None
        if policy.criterion == "similarity":
            return similarity(previous, current, self._rows_of(self.mask, rows)) > threshold
        score = output_score(policy.criterion, self._logits(current, rows))
        return score < threshold if policy.criterion == "entropy" else score > threshold

    @staticmethod
    def _rows_of(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
        return values if values is None or rows is None else values[rows]

    def _fixed(self, layer: int, count: int, rows: Tensor | None) -> Tensor:
        depth = self.policy.depth
        if isinstance(depth, Tensor):
            return self._rows_of(depth.cpu(), rows) <= layer + 1
        return torch.full((count,), layer + 1 >= depth)

    def _logits(self, states: Tensor, rows: Tensor | None) -> Tensor:
        return self.predict(last_valid(states, self._rows_of(self.mask, rows)))

    def _count_agreeing(self, states: Tensor, rows: Tensor | None) -> Tensor:
        prediction = self._logits(states, rows).argmax(-1)
        if self.predictions is None:
            self.predictions, self.agreeing = prediction, torch.zeros_like(prediction)
            if rows is not None:
                # rows that take no part hold places nobody reads
                size = int(rows.max()) + 1
                self.predictions = prediction.new_zeros(size).index_put((rows.to(prediction.device),), prediction)
                self.agreeing = prediction.new_zeros(size)
            return self._rows_of(self.agreeing, rows)
        index = slice(None) if rows is None else rows
        same = prediction == self.predictions[index]
        self.agreeing[index] = torch.where(same, self.agreeing[index] + 1, 0)
        self.predictions[index] = prediction
        return self.agreeing[index]


class StackResult(NamedTuple):
    """What `run_stack` returns: states [rows, positions, d] of each row's exit, depths [rows] (on the CPU), how often
    a layer ran (rows x positions, rows that had left included), and the states after every layer if asked for."""

    states: Tensor
    depths: Tensor
    executed: int
    hidden_states: tuple[Tensor, ...] | None


class _Batch:
    """The rows that a stack still runs, and what became of the others.

    Rows that left and are still in the batch are passengers: they cost time, and nothing looks at their states.
    """

    def __init__(self, states: Tensor, rows: Tensor | None):
        self.final, self.rows = states, rows
        self.states = states if rows is None else states[rows]
        self.depths = torch.zeros(states.shape[0], dtype=torch.long)
        self.staying: Tensor | None = None

    def settle(self, leave: Tensor, states: Tensor, depth: int) -> bool:
        """Notes that rows `leave` [rows in the batch] have left at `depth` with their place in `states`; returns
        whether anybody stays."""
        leave = leave if self.staying is None else leave & self.staying
        if leave.any():
            if leave.all() and self.rows is None:
                self.final, gone = states, slice(None)
            else:
                gone = self._rows()[leave]
                self.final = _put_rows(self.final, gone, states[leave])
            self.depths[gone] = depth
            self.staying = ~leave if self.staying is None else self.staying & ~leave
        return self.staying is None or bool(self.staying.any())

    def shrink(self) -> Tensor:
        """Takes the passengers out; returns which rows of the batch stayed."""
        staying, self.staying = self.staying, None
        self.rows, self.states = self._rows()[staying], self.states[staying]
        return staying

    def finish(self, depth: int) -> None:
        """Notes that the rows that stayed ran until `depth`."""
        everybody = torch.ones(self.states.shape[0], dtype=torch.bool)
        self.settle(everybody, self.states, depth)

    def _rows(self) -> Tensor:
        return torch.arange(len(self.depths)) if self.rows is None else self.rows


def run_stack(
    states: Tensor,
    num_layers: int,
    run_layer: Callable[[int, Tensor, Tensor | None], Tensor],
    decider: ExitDecider,
    rows: Tensor | None = None,
    output_hidden_states: bool = False,
    at_once: bool = False,
) -> StackResult:
    """Runs a stack of layers; rows that leave are taken out of the batch when that pays.

    On a CPU each decision is read at once. Elsewhere that would hold up the device, so a decision is read when the
    next layer is on its way: a row runs at most one layer in vain, which `executed` counts.

    Args:
        states (`Tensor` [batch, positions, d]): input of the first layer.
        num_layers (`int`): layers in the stack.
        run_layer (`Callable`): (layer, states [rows, positions, d], rows or None for all) -> states of that layer.
        decider (`ExitDecider`): which rows leave.
        rows (`LongTensor`, *optional*): the rows that take part, in ascending order; the others keep their input and
            have depth 0.
        output_hidden_states (`bool`): return input and output of all layers; a row that left repeats its exit state.
        at_once (`bool`): read every decision at once, and take rows that left out at once.

    Raises:
        ValueError: if the policy has depths for another number of rows.
    """
    depths = decider.policy.depth
    if isinstance(depths, Tensor) and len(depths) != len(states):
        raise ValueError(
            f"an exit layer that is a tensor must hold one depth per row of its stream, {len(states)}, got "
            f"{len(depths)}; pass as many, or one number for all."
        )
    at_once = at_once or output_hidden_states
    late = not at_once and reads_late(states.device)
    history = [states] if output_hidden_states else None
    batch, executed, depth = _Batch(states, rows), 0, 0
    # decisions not yet read: how to read them, and the states that they are about
    unread: tuple[Callable[[], Tensor], Tensor] | None = None
    while depth < num_layers and batch.states.shape[0]:
        previous = batch.states
        batch.states = run_layer(depth, previous, batch.rows)
        executed += batch.states.shape[:2].numel()
        depth += 1
        if output_hidden_states:
            history.append(_put_rows(history[-1], batch.rows, batch.states))
        leave = decider(depth - 1, previous, batch.states, batch.rows) if depth < num_layers else None
        if late:
            decided, unread = unread, None if leave is None else (_read_later(leave), batch.states)
            decided = decided and (decided[0](), decided[1], depth - 1)
        else:
            decided = None if leave is None else (leave.cpu(), batch.states, depth)
        if decided is None:
            continue
        if not batch.settle(*decided):
            break
        left = 0 if batch.staying is None else int((~batch.staying).sum())
        if left and (
            at_once or shrinking_pays(decider.policy.costs, states.device, left, states.shape[1], num_layers - depth)
        ):
            staying = batch.shrink()
            if unread is not None:
                read, about = unread
                unread = (lambda read=read, staying=staying: read()[staying]), about[staying]
    batch.finish(depth)
    return StackResult(batch.final, batch.depths, executed, history and tuple(history))


def reads_late(device: torch.device) -> bool:
    """Whether decisions on this device are read one layer late."""
    return device.type != "cpu"


def _read_later(leave: Tensor) -> Callable[[], Tensor]:
    """Starts to bring a decision to the CPU; what is returned waits for that, and for nothing that comes later."""
    if leave.device.type != "cuda":
        return leave.cpu
    copy = torch.empty(leave.shape, dtype=leave.dtype, pin_memory=True)
    copy.copy_(leave, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> Tensor:
        arrived.synchronize()
        return copy

    return read


def _put_rows(states: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    return values if rows is None else states.index_put((rows.to(states.device),), values)


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


def output_score(criterion: str, logits: Tensor) -> Tensor:
    """How sure a depth's output is, from logits [rows, classes]: the largest probability ("confidence"), the gap of
    the two largest ("margin"), or the entropy divided by ln(classes) ("entropy", smaller is surer). Returns [rows]."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if criterion == "entropy":
        log_probs = logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1) / math.log(max(logits.shape[-1], 2))
    probs = logits.softmax(-1)
    if criterion == "confidence":
        return probs.amax(-1)
    top = probs.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def last_valid(states: Tensor, mask: Tensor | None) -> Tensor:
    """The state [rows, d] at each row's last valid position of states [rows, positions, d]."""
    if mask is None:
        return states[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(-1).clamp_min(0)
    return states[torch.arange(states.shape[0], device=states.device), last]


# --- options: where they come from, and what is wrong with them -----------------------------------------------------

OPTION_NAMES = frozenset(field.name for field in fields(ExitOptions))
CONFIG_NAMES = OPTION_NAMES | {"exit_preset", "exit_presets"}
# names of transformers that hold "exit" too
_FOREIGN_NAMES = frozenset({"assistant_early_exit"})

_THRESHOLDS = {f"{stream}_exit_threshold" for stream in STREAMS[:3]}
_SCORED = {"decoder_exit_threshold", "exit_decay_beta", "exit_decay_tau"}
_COMMON = {"exit_criterion", "exit_kv", "exit_costs", "exit_min_layers", "exit_warmup"}
# The exit options that a criterion takes.
USED_BY = {
    **dict.fromkeys(("similarity", "confidence", "margin", "entropy"), _COMMON | _THRESHOLDS | _SCORED),
    "patience": _COMMON | _THRESHOLDS | {"exit_patience"},
    "fixed": _COMMON | {f"{stream}_exit_layer" for stream in STREAMS},
    "never": {"exit_criterion", "exit_kv", "exit_costs"},
}


def check_names(names: Iterable[str], allowed: Iterable[str] = OPTION_NAMES) -> None:
    """Raises a ValueError for a name that speaks of exits and is no option, with the nearest one as remedy."""
    allowed = set(allowed)
    for name in names:
        if "exit" in name and name not in allowed and name not in _FOREIGN_NAMES and not name.startswith("_"):
            near = difflib.get_close_matches(name, sorted(allowed), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"use one of {sorted(allowed)}."
            raise ValueError(f"`{name}` is not an exit option; {hint}")


def resolve_options(
    call: Mapping[str, Any], passed: Mapping[str, Any], saved: Mapping[str, Any], config: Any
) -> ExitOptions:
    """Merges the exit options of a `generate` call, its GenerationConfig and the model's own, the earlier winning.

    A preset takes the place of what is saved, but for the costs of the device. A criterion other than the saved one
    sets aside the saved options that it does not use, so that `exit_criterion="never"` or "fixed" can be asked for on
    any checkpoint. In a GenerationConfig, "never" is the off switch: the thresholds beside it rest.
    """
    for source in (call, passed, saved):
        check_names(source, CONFIG_NAMES)
    call, passed, saved = (
        {name: value for name, value in source.items() if name in CONFIG_NAMES and value is not None}
        for source in (call, passed, saved)
    )
    passed, saved = (
        {name: value for name, value in source.items() if name in USED_BY["never"] or "preset" in name}
        if source.get("exit_criterion") == "never"
        else source
        for source in (passed, saved)
    )
    presets = SHIPPED_PRESETS | _presets(saved.pop("exit_presets", {})) | _presets(passed.pop("exit_presets", {}))
    saved_preset = saved.pop("exit_preset", None)
    asked = call.pop("exit_preset", None) or passed.pop("exit_preset", None)
    if asked or saved_preset:
        kept = {name: value for name, value in saved.items() if not asked or name == "exit_costs"}
        saved = _preset(asked or saved_preset, presets) | kept
    for explicit in (passed, call):
        criterion = explicit.get("exit_criterion")
        if isinstance(criterion, str) and criterion in USED_BY:
            saved = {name: value for name, value in saved.items() if name in USED_BY[criterion]}
        saved = saved | explicit
    return ExitOptions.from_dict(saved, config)


def chosen_preset(call: Mapping[str, Any], passed: Mapping[str, Any], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The saved preset that `resolve_options` takes for the same sources, with all that is noted in it; empty without
    one."""
    name = next((source["exit_preset"] for source in (call, passed, saved) if source.get("exit_preset")), None)
    if not isinstance(name, str):
        return {}
    return ((saved.get("exit_presets") or {}) | (passed.get("exit_presets") or {})).get(name) or {}


def _presets(value: Any) -> Mapping[str, Mapping[str, Any]]:
    if not (isinstance(value, Mapping) and all(isinstance(options, Mapping) for options in value.values())):
        raise ValueError(f"`exit_presets` must be a dict of name to a dict of options, got {value!r}; correct it.")
    return value


def _preset(name: Any, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"`exit_preset` must name a preset of this model, {sorted(presets)}, got {name!r}.")
    return {key: value for key, value in presets[name].items() if "exit" in key}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _checked_threshold(name: str, value: Any, num_layers: int) -> Threshold:
    if isinstance(value, list | tuple):
        if len(value) != num_layers or not all(x is None or _is_number(x) for x in value):
            raise ValueError(
                f"`{name}` as a list must hold one finite number or None for each of the {num_layers} layers, "
                f"got {value!r}; pass one number for all layers, or {num_layers} entries."
            )
        return tuple(value)
    if not _is_number(value):
        raise ValueError(
            f"`{name}` must be a finite number, a list with one per layer, or None (never leave), got {value!r}; "
            "a number above 1 never leaves, one below -1 leaves after the first layer."
        )
    return float(value)


def _check_depth(name: str, value: Any, num_layers: int) -> None:
    if isinstance(value, Tensor):
        if name != "decoder_exit_layer" and not value.is_floating_point() and value.dim() == 1 and value.numel():
            low, high = int(value.min()), int(value.max())
            if 1 <= low and high <= num_layers:
                return
    elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= num_layers:
        return
    raise ValueError(
        f"`{name}` must be a number of layers from 1 to {num_layers}, got {value!r}; "
        f"pass {num_layers} or None to run all."
    )


def _check_scalars(given: Mapping[str, Any], most_layers: int) -> None:
    rules = {
        "exit_decay_beta": (lambda x: _is_number(x) and 0 <= x <= 1, "a number in [0, 1] (1 is no decay)"),
        "exit_decay_tau": (lambda x: _is_number(x) and x >= 0, "a finite number of at least 0"),
        "exit_warmup": (lambda x: _is_number(x) and 0 <= x <= 1, "a share of the steps in [0, 1] (0 is none)"),
        "exit_criterion": (lambda x: x in CRITERIA, f"one of {list(CRITERIA)}"),
        "exit_kv": (lambda x: x in KV_POLICIES, f"one of {list(KV_POLICIES)}"),
    }
    for name in ("exit_patience", "exit_min_layers"):
        rules[name] = (
            lambda x: isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= most_layers,
            f"an integer from 1 to {most_layers}, the number of layers",
        )
    for name, (holds, rule) in rules.items():
        if name in given and not holds(given[name]):
            raise ValueError(f"`{name}` must be {rule}, got {given[name]!r}.")


def _check_mode(given: Mapping[str, Any], decomposed: bool) -> None:
    foreign = ("encoder",) if decomposed else ("image", "text")
    remedy = "`image_exit_*` and `text_exit_*`" if decomposed else "`encoder_exit_*`"
    for stream in foreign:
        for name in (f"{stream}_exit_threshold", f"{stream}_exit_layer"):
            if name in given:
                raise ValueError(
                    f"`{name}` needs `modality_decomposition={not decomposed}`, but this model has {decomposed} "
                    f"(got {given[name]!r}); use {remedy}."
                )


def _check_contradictions(given: Mapping[str, Any]) -> None:
    criterion = given.get("exit_criterion", "similarity")
    for name in given:
        if name not in USED_BY[criterion]:
            takers = [other for other in CRITERIA if name in USED_BY[other]]
            raise ValueError(
                f"`{name}` (got {given[name]!r}) contradicts `exit_criterion={criterion!r}`, which does not use it; "
                f"drop it, or pass `exit_criterion` as one of {takers}."
            )
    if criterion == "patience" and "exit_patience" not in given:
        raise ValueError('`exit_criterion="patience"` needs `exit_patience`, got None; pass a number of layers.')
    if criterion == "fixed":
        depths = {name: value for name, value in given.items() if name.endswith("_exit_layer")}
        if not depths:
            raise ValueError('`exit_criterion="fixed"` needs a depth, got none; pass e.g. `decoder_exit_layer=3`.')
        for name, depth in depths.items():
            if int(depth.min() if isinstance(depth, Tensor) else depth) < given.get("exit_min_layers", 1):
                raise ValueError(
                    f"`{name}` (got {depth!r}) must not be below `exit_min_layers={given['exit_min_layers']}`; "
                    "lower the minimum."
                )


__all__ = [
    "CONFIG_NAMES",
    "CRITERIA",
    "KV_POLICIES",
    "OPTION_NAMES",
    "SHIPPED_PRESETS",
    "USED_BY",
    "ExitDecider",
    "ExitOptions",
    "ExitPolicy",
    "ExitSchedule",
    "StackResult",
    "check_names",
    "chosen_preset",
    "last_valid",
    "output_score",
    "reads_late",
    "resolve_options",
    "run_stack",
    "similarity",
]
