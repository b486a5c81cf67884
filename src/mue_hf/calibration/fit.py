"""The fit of criterion "agreement": candidate tokens from full-depth outputs, what the layers then say, a logistic
regression for each of them, and how reliable its probabilities are."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluation.signals import ask_for_states
from ..model.agreement_mue import INPUTS, Agreement
from ..model.criteria_mue import LayerStates, last_valid
from ..model.layers_mue import NormedHead

# The share of the tokens of new full-depth outputs that the candidates hold unless another one is asked for: of 300
# photos' captions .99 takes 560 tokens. The others' rows go on, and each candidate costs its part of the head.
COVERAGE = 0.99
# Of the inputs, what other criteria decide by.
OTHERS = ("confidence", "margin", "similarity")
# Edges of the probabilities that a reliability table puts together.
EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)


@dataclass(frozen=True)
class Fitted:
    """What was fitted: `exit_fit`, and a `report` of how well it knows, see [`reliability`]."""

    exit_fit: dict[str, Any]
    report: dict[str, Any]


def check_candidates(wanted: int | float | None, task: str) -> None:
    """Raises a ValueError unless `wanted` is a number of tokens, a share of them, or None."""
    if wanted is None:
        return
    if task != "captioning":
        raise ValueError(
            f"`exit_candidates` must be None for {task}, got {wanted}: the candidates are the answers' own tokens; "
            "drop it."
        )
    number = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 2
    if not number and not (isinstance(wanted, float) and 0.0 < wanted < 1.0):
        raise ValueError(
            f"`exit_candidates` must be a number of tokens, at least 2, or the share that they cover, above 0 and "
            f"below 1, got {wanted!r}; choose such as 256 or {COVERAGE}."
        )


def choose_candidates(
    outputs: Sequence[Sequence[int]], references: Sequence[Sequence[int]], wanted: int | float = COVERAGE
) -> tuple[list[int], float]:
    """
    The tokens that criteria look at: those that are most frequent in outputs, and then in references.

    Args:
        outputs (sequence [rows] of token ids): at full depth.
        references (sequence [rows] of token ids): of the same rows; empty where there are none.
        wanted (`int` or `float`): how many tokens, or the share of the tokens of outputs that they are to cover; as
            many as still add to it where too few tokens are known for it.

    Returns:
        The token ids in ascending order, and the share of tokens that as many candidates taken from one half of the
        rows cover in the outputs of the other half: what to expect of new outputs.
    """
    halves = [slice(0, None, 2), slice(1, None, 2)]
    # The place of each token of a half among the candidates of the other half.
    places: list[float] = []
    for known, new in (halves, halves[::-1]):
        place = {token: index for index, token in enumerate(_ranked(outputs[known], references[known]))}
        places += [place.get(token, np.inf) for output in outputs[new] for token in output]
    ranked = _ranked(outputs, references)
    if isinstance(wanted, float):
        known_places = sorted(place for place in places if place < np.inf)
        last = min(ceil(wanted * len(places)), len(known_places)) - 1
        wanted = 2 if last < 0 else int(known_places[last]) + 1
    chosen = ranked[: max(wanted, 2)]
    if len(chosen) < 2:
        raise ValueError(
            f"`exit_candidates` must be at least two tokens, but the full-depth outputs hold {len(chosen)}; take more "
            "images."
        )
    return sorted(chosen), float(np.mean(np.less(places, len(chosen))))


def _ranked(outputs: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> list[int]:
    made, written = (Counter(int(token) for one in some for token in one) for some in (outputs, references))
    return sorted({*made, *written}, key=lambda token: (-made[token], -written[token], token))


class FitRecorder:
    """
    Records what criterion "agreement" sees after each layer of every decoder call in its `with` block, in which the
    model runs under that criterion with a [`blank_fit`] and a threshold above one half, so that nothing exits.

    Args:
        model ([`MuEForConditionalGeneration`]): the model that will run.
        answers (`bool`): whether answers are scored; a layer's best token is then among those allowed at the node.
    """

    def __init__(self, model: PreTrainedModel, answers: bool) -> None:
        self.model, self.answers = model, answers
        self.inputs: list[NDArray] = []
        self.right: list[NDArray] = []

    def __enter__(self) -> "FitRecorder":
        decoder = self.model.get_decoder()
        self.handles = [
            decoder.register_forward_pre_hook(ask_for_states, with_kwargs=True),
            decoder.register_forward_hook(self._record, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def recorded(self) -> tuple[NDArray, NDArray]:
        """Inputs [decisions, layers - 1, INPUTS], and [decisions, layers - 1] whether a layer's best token is that of
        the last layer; in the order of the calls."""
        return np.concatenate(self.inputs), np.concatenate(self.right)

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        policy, predict = kwargs["policy"], kwargs["predict"]
        rows = (output.decoder_exit_layers > 0).cpu().nonzero().flatten()
        if policy.is_never or not len(rows):
            # warm-up, in which nothing may exit
            return
        states = [layer[rows] for layer in output.hidden_states]
        mask = kwargs.get("attention_mask")
        mask = None if mask is None else mask[:, -states[0].shape[1] :].bool()[rows]
        allowed = None if policy.allowed is None else policy.allowed[rows]
        criterion, head = Agreement(policy), NormedHead(self.model.get_decoder().layer_norm, predict)

        def look(layer: int) -> LayerStates:
            return LayerStates(layer, states[layer], states[layer + 1], mask, rows, head, allowed)

        layers = range(len(states) - 1)
        self.inputs.append(np.stack([criterion.inputs(look(layer)) for layer in layers[:-1]], axis=1))
        best = torch.stack([self._best(look(layer)) for layer in layers], dim=1)
        self.right.append((best[:, :-1] == best[:, -1:]).cpu().numpy())

    def _best(self, states: LayerStates) -> Tensor:
        """The token [rows] that would be emitted, of the whole head."""
        if self.answers:
            return states.logits().argmax(-1)
        hidden = self.model.get_decoder().layer_norm(last_valid(states.current, states.mask))
        return self.model.lm_head(hidden)[:, : self.model.config.num_text_tokens].argmax(-1)


def fit_agreement(inputs: NDArray, right: NDArray, blank: dict[str, Any]) -> Fitted:
    """Fits each layer on all decisions; the report is of fits on one half of them on the other half.

    Args:
        inputs (array [decisions, layers - 1, INPUTS]), right (array [decisions, layers - 1]): as recorded, the
            decisions of an image beside each other.
        blank (`dict`): of [`blank_fit`], whose weights are filled in.
    """
    layers, middle = range(right.shape[1]), len(right) // 2
    halves = (slice(None, middle), slice(middle, None))
    known = np.empty(right.shape)
    for learnt, tested in (halves, halves[::-1]):
        for layer in layers:
            weights = logistic_regression(inputs[learnt, layer], right[learnt, layer])
            known[tested, layer] = probability(weights, inputs[tested, layer])
    fits = [logistic_regression(inputs[:, layer], right[:, layer]) for layer in layers]
    rounded = [[float(f"{weight:.6g}") for weight in row] for row in fits]
    return Fitted(blank | {"weights": rounded}, reliability(inputs, right, known))


def logistic_regression(inputs: NDArray, right: NDArray) -> NDArray:
    """Weights of inputs [decisions, k] and a bias, [k + 1], of the probability that a decision is `right`.

    Inputs are standardised, and the penalty is that of a standard normal prior on their weights. Targets are a little
    within 0 and 1 (Platt, "Probabilistic outputs for support vector machines", 1999), so that layers that are always
    right or never have a finite fit.
    """
    means, scales = inputs.mean(0), inputs.std(0)
    # what does not vary says nothing
    scales = np.where(scales > 1e-9, scales, np.inf)
    scaled = torch.from_numpy((inputs - means) / scales)
    hits = int(right.sum())
    targets = torch.from_numpy(np.where(right, (hits + 1) / (hits + 2), 1 / (len(right) - hits + 2)))
    weights = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = scaled @ weights[:-1] + weights[-1]
        total = nn.functional.binary_cross_entropy_with_logits(logits, targets)
        total = total + weights[:-1].square().sum() / (2 * len(targets))
        total.backward()
        return total

    # calibration runs in inference mode
    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(loss)
    found = weights.detach().numpy()
    slopes = found[:-1] / scales
    return np.append(slopes, found[-1] - slopes @ means)


def probability(weights: NDArray, inputs: NDArray) -> NDArray:
    """[decisions] of inputs [decisions, k], by the weights [k + 1] of [`logistic_regression`]."""
    return torch.from_numpy(inputs @ weights[:-1] + weights[-1]).sigmoid().numpy()


def reliability(inputs: NDArray, right: NDArray, known: NDArray) -> dict[str, Any]:
    """How well probabilities `known` [decisions, layers - 1] foretell what is `right`.

    Returns:
        `dict`: "decisions"; "layers", for each: "layer" (from 1), "right" (share), and by criterion "brier" (mean
        squared error of the score as a probability) and "auc" (area under the ROC curve: how often a right decision
        has a higher score than a wrong one; None where all are alike); "bins", decisions of all layers by probability:
        "from", "to", "count", "expected" (mean probability) and "right" (share).
    """
    layers = []
    for layer, hits in enumerate(right.T):
        scores = {name: inputs[:, layer, INPUTS.index(name)] for name in OTHERS}
        scores = {"agreement": known[:, layer]} | scores
        figures: dict[str, Callable] = {"brier": lambda score, hits=hits: float(np.mean((score - hits) ** 2))}
        figures["auc"] = lambda score, hits=hits: area_under_roc(score, hits)
        found = {figure: {name: of(score) for name, score in scores.items()} for figure, of in figures.items()}
        layers.append({"layer": layer + 1, "right": float(hits.mean()), **found})
    places = np.digitize(known, EDGES[1:-1], right=True)
    bins = []
    for place, edges in enumerate(zip(EDGES, EDGES[1:], strict=False)):
        if count := int((inside := places == place).sum()):
            shares = {"expected": float(known[inside].mean()), "right": float(right[inside].mean())}
            bins.append({"from": edges[0], "to": edges[1], "count": count, **shares})
    return {"decisions": len(right), "layers": layers, "bins": bins}


def area_under_roc(scores: NDArray, right: NDArray) -> float | None:
    """The share of pairs of a right and a wrong decision in which the right one has the higher score; ties count one
    half, and without pairs it is None."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    hits = int(right.sum())
    misses = len(right) - hits
    return float((ranks[right].sum() - hits * (hits + 1) / 2) / (hits * misses)) if hits and misses else None


__all__ = [
    "COVERAGE",
    "FitRecorder",
    "Fitted",
    "area_under_roc",
    "check_candidates",
    "choose_candidates",
    "fit_agreement",
    "logistic_regression",
    "probability",
    "reliability",
]
