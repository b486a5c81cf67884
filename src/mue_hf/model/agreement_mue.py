"""Criterion "agreement": the probability that the whole model would pick the same token, by a small fit per layer."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .criteria_mue import (
    ENCODER_THRESHOLDS,
    SHARED_OPTIONS,
    Criterion,
    ExitPolicy,
    LayerStates,
    last_valid,
    register_criterion,
)

FIT_VERSION = 1
# What the fit of a layer looks at, in this order: probability of the best token of the shortlist (the best candidates
# after the first layer), and by how much it is above that of the second; -log of what each lacks to 1; how much each
# has grown since the layer before, and whether the best token was the same there (0 after the first layer); cosine of
# the layer's input and output at the position that is decided about; tokens of the output so far.
INPUTS = (
    "confidence",
    "margin",
    "log_confidence",
    "log_margin",
    "confidence_gain",
    "margin_gain",
    "same_token",
    "similarity",
    "step",
    "log_step",
)
# What a probability lacks to 1 is at least that: below, the logarithm would be that of rounding in single precision.
FLOOR = 1e-5
# Products of norms are at least that.
TINY = 1e-30
REFIT = "`mue-hf calibrate CHECKPOINT --task TASK --data DATA --criterion agreement`"


@register_criterion
class Agreement(Criterion):
    name = "agreement"
    summary = "it is probable enough that the last layer has the same best token, by a fit on this model's full depth"
    options = SHARED_OPTIONS | ENCODER_THRESHOLDS | {"decoder_exit_threshold", "exit_fit"}
    needed = ("exit_fit",)
    remedy = f"fit it on this model with {REFIT}, and pass the preset that it writes as `exit_preset`."
    needs_logits = True
    bound = 1.0
    # Among the 16 best tokens of the first layer stood every best token of later ones, in 5,957 decisions.
    shortlist_size: ClassVar[int] = 16
    candidates = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8)

    def __init__(self, policy: ExitPolicy):
        super().__init__(policy)
        # confidence and margin [2, rows], and best token [rows] of the layer before, by row of the call; a token by
        # its place in the row's shortlist, which are places [rows, few] among the classes
        self.last: NDArray | None = None
        self.token: NDArray | None = None
        self.shortlist: Tensor | None = None
        step = policy.step.cpu().numpy() if isinstance(policy.step, Tensor) else policy.step
        place = np.array([step, np.log1p(step)])
        # a column for all rows, or one for each
        self.place = place if place.ndim == 2 else place[:, None]

    @classmethod
    def head_rows(cls, looks: int, classes: int) -> int:
        return classes + (looks - 1) * min(cls.shortlist_size, classes) if looks else 0

    @classmethod
    def check_options(cls, given: Mapping[str, Any], config: Any) -> None:
        check_fit(given["exit_fit"], config.decoder_layers, given.get("exit_candidates"))
        threshold = given.get("decoder_exit_threshold")
        for value in threshold if isinstance(threshold, tuple) else (threshold,):
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(
                    f"`decoder_exit_threshold` must be a probability above 0 and below 1 with "
                    f"`exit_criterion='agreement'`, got {value}; choose such as 0.98, or None to run all layers."
                )

    def inputs(self, states: LayerStates) -> NDArray:
        """What a layer's fit looks at, [rows, INPUTS] on the CPU; every layer from the first must be asked for, or
        from the one before the first that may let rows exit."""
        seen = (*self._look(states), self._dots(states))
        if seen[0].device.type != "cpu":
            # one transfer for all
            seen = torch.cat(seen, dim=1).cpu().split([2, 1, 4], dim=1)
        # A few numbers for each row are left: NumPy's overhead is the smallest that does them all at once.
        best, token, dots = (x.detach().numpy().T for x in seen)
        inputs = np.empty((len(INPUTS), best.shape[1]))
        inputs[0] = best[0]
        np.subtract(best[0], best[1], out=inputs[1], dtype=np.float64)
        now = inputs[:2]
        np.negative(np.log(np.maximum(1.0 - now, FLOOR)), out=inputs[2:4])
        rows = slice(None) if states.rows is None else states.rows.numpy()
        if self.last is None:
            self.last, self.token = np.empty((2, _rows_of_call(states))), np.empty(_rows_of_call(states), token.dtype)
            inputs[4:7] = 0.0
        else:
            np.subtract(now, self.last[:, rows], out=inputs[4:6])
            inputs[6] = token[0] == self.token[rows]
        self.last[:, rows], self.token[rows] = now, token[0]
        inputs[7] = dots[1] / np.sqrt(np.maximum(dots[0] * dots[3], TINY))
        inputs[8:] = self.place if isinstance(self.policy.step, int) else self.place[:, rows]
        return inputs.T

    @staticmethod
    def _dots(states: LayerStates) -> Tensor:
        """Products [rows, 4] of the last positions of the layer's input and output: of the input with itself, of both
        twice, and of the output with itself."""
        pair = torch.stack([last_valid(x, states.mask) for x in (states.previous, states.current)], dim=1)
        pair = pair.float() if pair.dtype in (torch.float16, torch.bfloat16) else pair
        # no matrix product: such small reductions count in no figure of FLOPs
        return torch.linalg.vecdot(pair.unsqueeze(1), pair.unsqueeze(2)).flatten(1)

    def _look(self, states: LayerStates) -> tuple[Tensor, Tensor]:
        """Probabilities [rows, 2] of the two best tokens of each row's shortlist, and the place [rows, 1] of the
        best in it. The first look takes the shortlist from all candidates, the others compute no more than that."""
        if self.shortlist is None:
            logits = states.logits()
            best, places = logits.topk(min(self.shortlist_size, logits.shape[1]), dim=-1)
            self.shortlist = places
            if states.rows is not None:
                self.shortlist = places.new_zeros(_rows_of_call(states), places.shape[1])
                self.shortlist[states.rows.to(places.device)] = places
            return best.softmax(-1)[:, :2], torch.zeros_like(places[:, :1])
        places = self.shortlist if states.rows is None else self.shortlist[states.rows.to(self.shortlist.device)]
        two = states.logits(places).softmax(-1).topk(2, dim=-1)
        return two.values, two.indices[:, :1]

    def score(self, states: LayerStates) -> Tensor:
        return torch.from_numpy(self._log_odds(states)).sigmoid()

    def exits(self, states: LayerStates) -> Tensor | None:
        here = self._may_exit(states.layer)
        # the next layer compares with this one
        if not here and not self._may_exit(states.layer + 1):
            return None
        odds, threshold = self._log_odds(states), self.policy.thresholds[states.layer]
        passed = odds > math.log(threshold / (1.0 - threshold)) if here else None
        return None if passed is None or not passed.any() else torch.from_numpy(passed)

    def _log_odds(self, states: LayerStates) -> NDArray:
        weights = self.policy.fit[states.layer]
        return self.inputs(states) @ weights[:-1] + weights[-1]

    def _may_exit(self, layer: int) -> bool:
        in_time = self.policy.min_layers <= layer + 1 < len(self.policy.thresholds)
        return in_time and self.policy.thresholds[layer] is not None


def blank_fit(
    layers: int, candidates: Sequence[int] | None, answers: Sequence[Sequence[int]] | None
) -> dict[str, Any]:
    """A fit for a decoder of `layers` that knows nothing: every probability is one half; see [`check_fit`]."""
    return {
        "version": FIT_VERSION,
        "inputs": list(INPUTS),
        "layers": layers,
        "candidates": None if candidates is None or answers is not None else token_hash(candidates),
        "answers": None if answers is None else answers_hash(answers),
        "weights": [[0.0] * (len(INPUTS) + 1) for _ in range(layers - 1)],
    }


def fit_weights(fit: Mapping[str, Any]) -> NDArray:
    """Weights and bias of each layer of a fit, [layers - 1, INPUTS + 1]."""
    return np.asarray(fit["weights"], dtype=np.float64)


def check_fit(fit: Any, num_layers: int, candidates: Sequence[int] | None) -> None:
    """Raises a ValueError unless `fit` is one for a decoder of `num_layers` and for these candidate tokens.

    Args:
        fit (`dict`): "version"; "inputs", the names in `INPUTS`; "layers" of the decoder; "candidates", [`token_hash`]
            of the tokens that it was made with, None for the whole vocabulary; "answers", [`answers_hash`] of what was
            scored, None where tokens were generated; "weights", a row [inputs + 1] for each layer but the last: the
            weights of the inputs, and a bias.
    """
    expected = {"version": FIT_VERSION, "inputs": list(INPUTS), "layers": num_layers}
    if not isinstance(fit, Mapping):
        raise ValueError(f"`exit_fit` must be a dict that {REFIT} made, got {fit!r}; make one.")
    for name, value in expected.items():
        if fit.get(name) != value:
            raise ValueError(
                f"`exit_fit` must have {name} {value!r}, got {fit.get(name)!r}; fit it anew with {REFIT}."
            )
    weights = fit.get("weights")
    rows = weights if isinstance(weights, list | tuple) else ()
    if len(rows) != num_layers - 1 or not all(_is_row(row) for row in rows):
        raise ValueError(
            f"`exit_fit` must have {len(INPUTS) + 1} finite numbers as `weights` of each of {num_layers - 1} layers, "
            f"got {weights!r}; fit it anew with {REFIT}."
        )
    found = None if candidates is None else token_hash(candidates)
    if fit.get("answers") is None and fit.get("candidates") != found:
        raise ValueError(
            f"`exit_fit` must be used with the `exit_candidates` that it was made with, of hash "
            f"{fit.get('candidates')!r}, got {found!r} (None is the whole vocabulary); fit it anew with {REFIT}."
        )


def check_answers(fit: Mapping[str, Any] | None, answers: Sequence[Sequence[int]] | None) -> None:
    """Raises a ValueError unless `fit`, if there is one, was made for scoring `answers`, or for generating if None."""
    found = None if answers is None else answers_hash(answers)
    if fit is not None and fit.get("answers") != found:
        made, used = ("generated tokens" if one is None else "other answers" for one in (fit.get("answers"), found))
        used = used if found is None else "these answers"
        raise ValueError(
            f"`exit_fit` must be made for what it is used for, but it was fitted on {made} and is used for {used}; "
            f"fit it with {REFIT}, or choose another `exit_criterion`."
        )


def token_hash(ids: Sequence[int]) -> str:
    """SHA-256 of a set of token ids."""
    return _token_hash(tuple(ids))


@lru_cache(maxsize=8)
def _token_hash(ids: tuple[int, ...]) -> str:
    # kept, since every call of `generate` asks for that of the same list
    return sha256(json.dumps(sorted(ids)).encode()).hexdigest()


def answers_hash(answers: Sequence[Sequence[int]]) -> str:
    """SHA-256 of a set of answers, each a list of token ids."""
    return sha256(json.dumps(sorted([int(token) for token in answer] for answer in answers)).encode()).hexdigest()


def _rows_of_call(states: LayerStates) -> int:
    """Rows that a table by row of the call needs, known from the first layer that is looked at."""
    return len(states.current) if states.rows is None else int(states.rows.max()) + 1


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, list | tuple)
        and len(row) == len(INPUTS) + 1
        and all(isinstance(x, int | float) and math.isfinite(x) for x in row)
    )


__all__ = [
    "FIT_VERSION",
    "INPUTS",
    "Agreement",
    "answers_hash",
    "blank_fit",
    "check_answers",
    "check_fit",
    "fit_weights",
    "token_hash",
]
