"""The exit options of a call: what they are called, where they come from, and what can be wrong with them."""

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .agreement_mue import fit_weights
from .criteria_mue import CRITERIA, LAYER_OPTIONS, STREAMS, THRESHOLD_OPTIONS, Depth, ExitPolicy

KV_POLICIES = ("project", "copy", "exact")
# What belongs to a checkpoint and not to one setting: neither a preset nor another criterion sets it aside.
CHECKPOINT_OPTIONS = frozenset({"exit_candidates"})
# Options of earlier versions, which are ignored.
DROPPED_OPTIONS = frozenset({"exit_costs"})

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


@dataclass(frozen=True)
class ExitOptions:
    """Every exit option of a call, validated. None means: never exit.

    Args:
        image_exit_threshold, text_exit_threshold (`float` or one per layer):
            Cosine above which the stream of that modality exits (decomposed encoder).
        encoder_exit_threshold (`float` or one per layer):
            The same for the joint encoder.
        decoder_exit_threshold (`float` or one per layer):
            Threshold of the decoder's criterion; the decay applies to each.
        exit_decay_beta, exit_decay_tau (`float`, in [0, 1] and at least 0):
            Theta(t) = beta * threshold + (1 - beta) * exp(-tau * t / N) at decoding step t of at most N (MuE, sec. 3).
        exit_warmup (`float` in [0, 1]):
            Share of the decoding steps, from the first, without exits.
        exit_criterion (`str`):
            A name in `CRITERIA`, for the decoder. The encoder follows it where the criterion has `in_encoder`, and
            similarity otherwise.
        exit_patience (`int`):
            Criterion "patience": number of consecutive layers whose prediction is that of the layer before (PABEE).
        image_exit_layer, text_exit_layer, encoder_exit_layer, decoder_exit_layer (`int`):
            Criterion "fixed": number of layers to run. `forward` also takes a LongTensor [batch] for the encoder.
        exit_min_layers (`int`):
            No row exits before this many layers.
        exit_kv (`str`):
            Self-attention keys and values of skipped layers: "project" (from the exit state), "copy" (of the exit
            layer) or "exact" (the skipped layers are run in the call of a later token that needs them).
        exit_rescore (`bool`):
            Beam search: the final hypotheses are scored anew at full depth, in one pass, and the best are returned.
        exit_candidates (sequence of `int`):
            The tokens that criteria with intermediate logits look at, saved once with the checkpoint; all by default.
            They inform the decision alone: what is emitted comes from the whole head. `score_answers` looks at the
            tokens of its answers instead.
        exit_fit (`dict`):
            Criterion "agreement": what `mue-hf calibrate` has fitted, see `agreement_mue.py`.
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
    exit_rescore: bool = False
    exit_candidates: tuple[int, ...] | None = None
    exit_fit: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], config: Any) -> "ExitOptions":
        """Builds and validates options against a `MuEConfig`; entries that are None count as absent.

        Raises:
            ValueError: for an unknown name, a wrong type or range, options that contradict each other, or options of
                the other encoder mode. The message names field, rule, value and remedy.
        """
        given = {name: value for name, value in without_dropped(options).items() if value is not None}
        check_names(given)
        for stream in STREAMS:
            count = config.layers_of(stream)
            if (name := THRESHOLD_OPTIONS[stream]) in given:
                given[name] = _checked_threshold(name, given[name], count)
            if (name := LAYER_OPTIONS[stream]) in given:
                _check_depth(name, given[name], count)
        if (tokens := given.get("exit_candidates")) is not None:
            given["exit_candidates"] = _checked_candidates(tokens, config.vocab_size)
        _check_scalars(given, max(config.encoder_layers, config.decoder_layers))
        _check_mode(given, config.modality_decomposition)
        _check_contradictions(given)
        criterion = CRITERIA[given.get("exit_criterion", cls.exit_criterion)]
        criterion.check_options(given, config)
        if not criterion.needs_logits:
            given.pop("exit_candidates", None)
        return cls(**given)

    @property
    def active(self) -> bool:
        """Whether any row could exit early under these options."""
        return any(not self.policy(stream, 1).is_never for stream in STREAMS)

    @property
    def active_in_decoder(self) -> bool:
        """Whether decoder rows could exit early under these options."""
        return not self.policy("decoder", 1).is_never

    def policy(self, stream: str, num_layers: int) -> ExitPolicy:
        """The policy of one stream ("image", "text", "encoder" or "decoder") of `num_layers` layers."""
        name = self.exit_criterion
        if stream != "decoder" and not CRITERIA[name].in_encoder:
            name = "similarity"
        threshold = getattr(self, THRESHOLD_OPTIONS[stream])
        schedule = {}
        if stream == "decoder":
            schedule = {"beta": self.exit_decay_beta, "tau": self.exit_decay_tau, "warmup": self.exit_warmup}
        policy = ExitPolicy(
            name,
            threshold if isinstance(threshold, tuple) else (threshold,) * num_layers,
            getattr(self, LAYER_OPTIONS[stream]),
            self.exit_patience or 0,
            self.exit_min_layers,
            fit=None if self.exit_fit is None else fit_weights(self.exit_fit),
            **schedule,
        )
        return policy if CRITERIA[name].is_asked_for(policy) else ExitPolicy()


OPTION_NAMES = frozenset(field.name for field in fields(ExitOptions))
CONFIG_NAMES = OPTION_NAMES | DROPPED_OPTIONS | {"exit_preset", "exit_presets"}
# names of transformers that hold "exit" too
_FOREIGN_NAMES = frozenset({"assistant_early_exit"})


def without_dropped(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those of earlier versions that have no effect any more, which are warned of."""
    for name in DROPPED_OPTIONS & options.keys():
        if options[name] is not None:
            warnings.warn(
                f"`{name}` has no effect any more: exited rows leave the batch at once; drop it.",
                FutureWarning,
                stacklevel=3,
            )
    return {name: value for name, value in options.items() if name not in DROPPED_OPTIONS}


def check_names(names: Iterable[str], allowed: Iterable[str] = OPTION_NAMES) -> None:
    """Raises a ValueError for a name that speaks of exits and is no option, with the nearest one as remedy."""
    allowed = set(allowed)
    for name in names:
        if "exit" in name and name not in allowed and name not in _FOREIGN_NAMES and not name.startswith("_"):
            near = difflib.get_close_matches(name, sorted(allowed), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"use one of {sorted(allowed)}."
            raise ValueError(f"`{name}` is not an exit option; {hint}")


def check_no_search(call: Mapping[str, Any], where: str) -> None:
    """Raises a ValueError for options of a call of `where` that only a search can follow; in a preset they rest."""
    if call.get("exit_rescore"):
        raise ValueError(
            f"`exit_rescore` must be left out of `{where}`, which has no hypotheses to score anew, got "
            f"{call['exit_rescore']!r}; pass it to `generate` with `num_beams` above 1."
        )


def resolve_options(
    call: Mapping[str, Any], passed: Mapping[str, Any], saved: Mapping[str, Any], config: Any
) -> ExitOptions:
    """Merges the exit options of a `generate` call, its GenerationConfig and the model's own, the earlier winning.

    A preset takes the place of what is saved. A criterion other than the saved one sets aside the saved options that
    it does not use, so that `exit_criterion="never"` or "fixed" can be asked for on any checkpoint. In a
    GenerationConfig, "never" is the off switch: the thresholds beside it rest.
    """
    for source in (call, passed, saved):
        check_names(source, CONFIG_NAMES)
    call, passed, saved = (
        {name: value for name, value in without_dropped(source).items() if name in CONFIG_NAMES and value is not None}
        for source in (call, passed, saved)
    )
    passed, saved = (
        _used_by("never", source) if source.get("exit_criterion") == "never" else source for source in (passed, saved)
    )
    presets = SHIPPED_PRESETS | _presets(saved.pop("exit_presets", {})) | _presets(passed.pop("exit_presets", {}))
    saved_preset = saved.pop("exit_preset", None)
    kept = {name: saved.pop(name) for name in CHECKPOINT_OPTIONS & saved.keys()}
    asked = call.pop("exit_preset", None) or passed.pop("exit_preset", None)
    if asked or saved_preset:
        saved = _preset(asked or saved_preset, presets) | ({} if asked else saved)
    saved = kept | saved
    for explicit in (passed, call):
        criterion = explicit.get("exit_criterion")
        if isinstance(criterion, str) and criterion in CRITERIA:
            saved = _used_by(criterion, saved)
        saved = saved | explicit
    return ExitOptions.from_dict(saved, config)


def _used_by(criterion: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of options, those that a criterion takes, and presets."""
    used = CRITERIA[criterion].options | CHECKPOINT_OPTIONS | {"exit_preset", "exit_presets"}
    return {name: value for name, value in options.items() if name in used}


def chosen_preset(call: Mapping[str, Any], passed: Mapping[str, Any], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The saved preset that `resolve_options` takes for the same sources, with all that is noted in it; empty without
    one."""
    name = next((source["exit_preset"] for source in (call, passed, saved) if source.get("exit_preset")), None)
    if not isinstance(name, str):
        return {}
    return ((saved.get("exit_presets") or {}) | (passed.get("exit_presets") or {})).get(name) or {}


def exit_attributes(config: Any) -> dict[str, Any]:
    """The exit options that a GenerationConfig holds, by name."""
    return {name: value for name, value in vars(config).items() if "exit" in name and not name.startswith("_")}


def _presets(value: Any) -> Mapping[str, Mapping[str, Any]]:
    if not (isinstance(value, Mapping) and all(isinstance(options, Mapping) for options in value.values())):
        raise ValueError(f"`exit_presets` must be a dict of name to a dict of options, got {value!r}; correct it.")
    return value


def _preset(name: Any, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"`exit_preset` must name a preset of this model, {sorted(presets)}, got {name!r}.")
    return {key: value for key, value in presets[name].items() if "exit" in key and key not in DROPPED_OPTIONS}


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
            f"`{name}` must be a finite number, a list with one per layer, or None (never exit), got {value!r}; "
            "a number above 1 never exits, one below -1 exits after the first layer."
        )
    return float(value)


def _checked_candidates(tokens: Any, vocab_size: int) -> tuple[int, ...]:
    """The tokens of `exit_candidates` in ascending order."""
    listed = isinstance(tokens, list | tuple) and all(type(token) is int for token in tokens)
    ordered = tuple(sorted(set(tokens))) if listed else ()
    if len(ordered) < 2 or len(ordered) < len(tokens) or not 0 <= ordered[0] <= ordered[-1] < vocab_size:
        shown = repr(tokens) if len(repr(tokens)) < 100 else f"{repr(tokens)[:100]}..."
        raise ValueError(
            f"`exit_candidates` must be a list of at least two different token ids in [0, {vocab_size}), got {shown}; "
            "pass such a list, or None to look at the whole vocabulary."
        )
    return ordered


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
        "exit_criterion": (lambda x: isinstance(x, str) and x in CRITERIA, f"one of {list(CRITERIA)}"),
        "exit_kv": (lambda x: x in KV_POLICIES, f"one of {list(KV_POLICIES)}"),
        "exit_rescore": (lambda x: isinstance(x, bool), "True or False"),
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
        for name in (THRESHOLD_OPTIONS[stream], LAYER_OPTIONS[stream]):
            if name in given:
                raise ValueError(
                    f"`{name}` needs `modality_decomposition={not decomposed}`, but this model has {decomposed} "
                    f"(got {given[name]!r}); use {remedy}."
                )


def _check_contradictions(given: Mapping[str, Any]) -> None:
    criterion = given.get("exit_criterion", "similarity")
    for name in given:
        if name not in CRITERIA[criterion].options | CHECKPOINT_OPTIONS:
            takers = [other for other in CRITERIA if name in CRITERIA[other].options]
            raise ValueError(
                f"`{name}` (got {given[name]!r}) contradicts `exit_criterion={criterion!r}`, which does not use it; "
                f"drop it, or pass `exit_criterion` as one of {takers}."
            )
    needed = CRITERIA[criterion].needed
    if needed and not given.keys() & set(needed):
        raise ValueError(
            f"`exit_criterion={criterion!r}` needs {' or '.join(f'`{name}`' for name in needed)}, got none; "
            f"{CRITERIA[criterion].remedy}"
        )
    for name in LAYER_OPTIONS.values():
        depth = given.get(name)
        if depth is not None and int(depth.min() if isinstance(depth, Tensor) else depth) < given.get(
            "exit_min_layers", 1
        ):
            raise ValueError(
                f"`{name}` (got {depth!r}) must not be below `exit_min_layers={given['exit_min_layers']}`; "
                "lower the minimum."
            )


__all__ = [
    "CHECKPOINT_OPTIONS",
    "CONFIG_NAMES",
    "DROPPED_OPTIONS",
    "KV_POLICIES",
    "OPTION_NAMES",
    "SHIPPED_PRESETS",
    "ExitOptions",
    "check_names",
    "check_no_search",
    "chosen_preset",
    "exit_attributes",
    "resolve_options",
    "without_dropped",
]
