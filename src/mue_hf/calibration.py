"""Exit thresholds for a budget of changed outputs, with a guarantee, or for a budget of compute.

The images are split in two. On part A one run at full depth records signals; they give a few thresholds for each
stream. Real runs with one stream's exits at a time say what they save and change. Combinations that look best run for
real too, which gives a path of candidates from safest to fastest. On part B, which the search never saw, they run in
that order until one cannot be certified ("Learn then Test", arXiv 2110.01052).

Every run leaves its outputs in a folder, if there is one for them: an interrupted calibration goes on from there.
"""

import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel

from .bounds import METHODS, fixed_sequence, risk_pvalue, risk_upper_bound, smallest_budget
from .early_exit_mue import CONFIG_NAMES, CRITERIA, SHIPPED_PRESETS, USED_BY, ExitOptions
from .evaluation.measure import Meter
from .evaluation.rows import ChosenRows, EvaluationData
from .evaluation.settings import GRIDS
from .evaluation.store import content_key, read_predictions, read_signals, write_predictions, write_signals
from .features import trunk_fingerprint
from .generation_mue import weights_fingerprint
from .predict import TASKS, Prediction, predict
from .processing_mue import MuEProcessor
from .rewards import CiderDReward
from .signals import SignalRecorder, Signals, threshold_levels, without_decay

RISKS = ("disagreement", "metric")
OBJECTIVES = ("flops", "time")
# Criteria that can be calibrated.
CALIBRATED = tuple(criterion for criterion in CRITERIA if criterion != "never")
# No cosine is above it.
NEVER = 2.0
# Exit options that every candidate may share; the others are what calibration looks for.
SHARED_OPTIONS = ("exit_decay_tau", "exit_kv", "exit_min_layers")
# Saved options must not reach a run: a preset takes their place.
DEFAULTS = {
    name: getattr(ExitOptions(), name)
    for name in ("exit_criterion", "exit_decay_beta", "exit_decay_tau", "exit_kv", "exit_min_layers", "exit_warmup")
}


# --- search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """
    One way for one stream to leave.

    Args:
        options (`dict`): its exit options.
        saving (`float`): share of the full-depth cost that it saves.
        risk (`float`): [`expected_risk`] on part A while the other streams run in full.
    """

    options: dict[str, Any]
    saving: float
    risk: float


@dataclass(frozen=True)
class Candidate:
    """Exit options of all streams, with the cost (1 is full depth) and the risk that part A lets expect."""

    options: dict[str, Any]
    cost: float
    risk: float


@dataclass(frozen=True)
class Outcome:
    """What real runs of one candidate gave: `losses` [images], and FLOPs and seconds as shares of full depth."""

    losses: NDArray
    flops: float
    seconds: float

    def cost(self, objective: str) -> float:
        return self.flops if objective == "flops" else self.seconds


@dataclass(frozen=True)
class Tested:
    """
    A candidate on part B.

    Args:
        options (`dict`): its exit options.
        loss (`float`): mean loss.
        pvalue (`float`, *optional*): of the hypothesis that the true loss is above the budget; None without a budget.
        bound (`float`): the upper bound of the true loss, had only this candidate been tested.
        flops, seconds (`float`): shares of full depth.
    """

    options: dict[str, Any]
    loss: float
    pvalue: float | None
    bound: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """
    What calibration found.

    Args:
        preset (`dict`, *optional*): exit options for `exit_presets`, with what they promise; None if nothing could be
            certified.
        tested (`list[Tested]`): the candidates on part B, in their order; the last one may have failed.
    """

    preset: dict[str, Any] | None
    tested: list[Tested] = field(default_factory=list)


def expected_risk(losses: NDArray) -> float:
    """The mean of `losses` [images], drawn a little to one half: of settings without a loss, each exit more counts."""
    return (float(np.sum(losses)) + 0.5) / (len(losses) + 1)


def pareto_path(streams: Sequence[Sequence[Level]]) -> list[Candidate]:
    """
    Candidates from safest to fastest: the [`front`] of all combinations of a level per stream or none, if savings and
    changes of the streams add up.
    """
    combined = []
    for levels in product(*([None, *stream] for stream in streams)):
        chosen = [level for level in levels if level is not None]
        if chosen:
            options = {name: value for level in chosen for name, value in level.options.items()}
            cost = 1.0 - sum(level.saving for level in chosen)
            combined.append(Candidate(options, cost, min(1.0, sum(level.risk for level in chosen))))
    return front(combined)


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that save something and that no other one beats in both risk and cost, from safest to fastest."""
    path: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.risk, one.cost)):
        if candidate.cost < (path[-1].cost if path else 1.0):
            path.append(candidate)
    return path


def thinned(path: Sequence[Candidate], most_risk: float, count: int) -> list[Candidate]:
    """At most `count` of the candidates with an expected risk within `most_risk`, evenly spaced in cost, the first and
    the last among them; the safest one alone if all are above it."""
    path = [candidate for candidate in path if candidate.risk <= most_risk] or list(path[:1])
    if len(path) <= count:
        return path
    targets = np.linspace(path[0].cost, path[-1].cost, count)
    kept = {min(range(len(path)), key=lambda i, t=t: abs(path[i].cost - t)) for t in targets}
    return [path[i] for i in sorted(kept)]


def certify(
    path: Sequence[Candidate],
    measure: Callable[[dict[str, Any]], Outcome],
    budget: float,
    delta: float,
    method: str,
) -> tuple[list[Tested], int]:
    """
    Runs candidates on part B, from the first until one fails.

    Args:
        path (sequence of [`Candidate`]): chosen without part B.
        measure (`Callable`): exit options to the [`Outcome`] of real runs on part B.
        budget (`float`): allowed mean loss.
        delta (`float`): probability that any certificate is false.
        method (`str`): see [`risk_pvalue`].

    Returns:
        `tuple[list[Tested], int]`: what was run, and how many of them, from the first, are certified.
    """
    tested: list[Tested] = []

    def pvalues() -> Iterator[float]:
        for candidate in path:
            tested.append(_test(candidate, measure, budget, delta, method))
            yield tested[-1].pvalue

    return tested, fixed_sequence(pvalues(), delta)


def _test(
    candidate: Candidate,
    measure: Callable[[dict[str, Any]], Outcome],
    budget: float | None,
    delta: float,
    method: str,
) -> Tested:
    outcome = measure(candidate.options)
    pvalue = None if budget is None else risk_pvalue(outcome.losses, budget, delta, method)
    bound = risk_upper_bound(outcome.losses, delta, method)
    loss = float(np.mean(outcome.losses))
    return Tested(candidate.options, loss, pvalue, bound, outcome.flops, outcome.seconds)


def split_images(image_ids: Sequence[str], share: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """The rows of each image, for a `share` of the images (part A) and for the others (part B), both shuffled."""
    images: dict[str, list[int]] = {}
    for row, image in enumerate(image_ids):
        images.setdefault(image, []).append(row)
    rows = list(images.values())
    random.Random(seed).shuffle(rows)
    cut = min(max(round(share * len(rows)), 1), len(rows) - 1)
    return rows[:cut], rows[cut:]


def check_size(images: int, budget: float, delta: float, method: str) -> None:
    """Raises a ValueError if `images` of part B cannot certify `budget` even without a loss."""
    smallest = smallest_budget(images, delta, method) if images else 1.0
    if smallest <= budget:
        return
    needed = max(images, 1)
    while smallest_budget(needed, delta, method) > budget:
        needed += max(1, needed // 50)
    raise ValueError(
        f"`budget` must be at least {_rounded_up(smallest)} for the {images} images that are left for the test at "
        f"delta {delta}, got {budget}; allow that much, or take more images (the test needs about {needed})."
    )


def _rounded_up(value: float) -> float:
    digits = 2 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits) / 10**digits


# --- real runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Rows of some images: as `predict` reads them, their texts alone, and how many rows each image has."""

    rows: ChosenRows
    texts: list[dict[str, Any]]
    counts: list[int]

    def by_image(self, losses: Sequence[float]) -> NDArray:
        starts = np.cumsum([0, *self.counts[:-1]])
        return np.add.reduceat(np.asarray(losses, dtype=np.float64), starts) / np.asarray(self.counts)


@dataclass
class _Runner:
    """Runs candidates for real and compares them with full depth; the fields are arguments of `calibrate`, and what
    all runs have in common."""

    model: PreTrainedModel
    processor: MuEProcessor
    task: str
    risk: str
    options: dict[str, Any]
    batch_size: int
    prompt_type: str
    reward: CiderDReward | None
    folder: Path | None
    common: dict[str, Any]

    def __post_init__(self) -> None:
        names = ("image", "text") if self.model.config.modality_decomposition else ("encoder",)
        self.streams = (*names, "decoder")
        # Exit options of every candidate, and the others of `generate`.
        self.shared = DEFAULTS | {name: value for name, value in self.options.items() if name in SHARED_OPTIONS}
        self.others = {name: value for name, value in self.options.items() if name not in SHARED_OPTIONS}

    @property
    def num_steps(self) -> int:
        """N of Theta(t)."""
        settings = self.model.generation_config.to_dict() | self.others
        return settings.get("max_new_tokens") or (settings.get("max_length") or 20) - 1

    def exits(self, exits: Mapping[str, Any] | None) -> dict[str, Any]:
        """All exit options of a candidate, or of full depth for None."""
        if exits is None:
            return {"exit_criterion": "never"}
        off = {f"{stream}_exit_threshold": NEVER for stream in self.streams}
        every = self.shared | off | exits
        return {name: value for name, value in every.items() if name in USED_BY[every["exit_criterion"]]}

    def predictions(self, part: _Part, exits: Mapping[str, Any] | None) -> list[Prediction]:
        """Of a candidate, or at full depth for None; from disk where they are."""
        options = self.others | self.exits(exits)
        path = self._path("run", part, options)
        found = None if path is None else read_predictions(path)
        if found is None:
            found = self._run(part, options)
            if path is not None:
                write_predictions(path, found)
        return found

    def recorded(self, part: _Part) -> tuple[list[Prediction], Signals]:
        """At full depth, with what the layers say; from disk where they are. Its seconds mean nothing."""
        options = self.others | {"exit_criterion": "never"}
        path = self._path("recorded", part, options)
        if path is not None and (signals := read_signals(path.with_suffix(".safetensors"))) is not None:
            return read_predictions(path), signals
        answers = None
        if self.task == "entailment":
            ids = self.processor.encode_answers(list(self.processor.entailment_answers.values()))
            answers = [*(token for answer in ids for token in answer), self.processor.tokenizer.eos_token_id]
        with SignalRecorder(self.model, answers) as recorder:
            full = self._run(part, options)
        if path is not None:
            write_predictions(path, full)
            # Last: they say that both are there.
            write_signals(path.with_suffix(".safetensors"), recorder.signals)
        return full, recorder.signals

    def _path(self, kind: str, part: _Part, options: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{kind}-{content_key([self.common, part.rows.indices, options])}.jsonl"

    def _run(self, part: _Part, options: Mapping[str, Any]) -> list[Prediction]:
        return predict(
            self.model,
            self.processor,
            part.rows,
            self.task,
            options,
            batch_size=self.batch_size,
            prompt_type=self.prompt_type,
            progress=False,
        )

    def outcome(self, part: _Part, full: list[Prediction], exits: Mapping[str, Any]) -> Outcome:
        """A candidate on a part, given the full-depth run of the same part."""
        found = self.predictions(part, exits)
        return Outcome(
            part.by_image(self.losses(part, full, found)),
            self.flops(part, found, exits) / self.flops(part, full, None),
            sum(one.seconds for one in found) / sum(one.seconds for one in full),
        )

    def flops(self, part: _Part, predictions: list[Prediction], exits: Mapping[str, Any] | None) -> float:
        """Mean FLOPs of an output, its image's trunk included."""
        meter = Meter(self.model, self.processor, self.task, part.texts, self.others, self.prompt_type)
        return meter.flops(predictions, self.exits(exits))["mean"]

    def losses(self, part: _Part, full: list[Prediction], found: list[Prediction]) -> list[float]:
        """The loss of every row."""
        if self.risk == "disagreement":
            return [float(one.output != other.output) for one, other in zip(found, full, strict=True)]
        drops = np.subtract(self._quality(part, full), self._quality(part, found))
        return np.clip(drops, 0.0, 1.0).tolist()

    def _quality(self, part: _Part, predictions: list[Prediction]) -> list[float]:
        if self.reward is not None:
            references = [self.processor.encode_captions(row["references"]) for row in part.texts]
            return self.reward([one.token_ids for one in predictions], references)
        answers = self.processor.entailment_answers
        return [float(one.output == answers[row["label"]]) for one, row in zip(predictions, part.texts, strict=True)]


def _fixed_levels(runner: _Runner, stream: str) -> list[dict[str, Any]]:
    """A stream's fixed depths, deepest first."""
    config = runner.model.config
    layers = config.decoder_layers if stream == "decoder" else config.encoder_layers
    depths = range(layers - 1, runner.shared["exit_min_layers"] - 1, -1)
    return [{"exit_criterion": "fixed", f"{stream}_exit_layer": depth} for depth in depths]


def _decoder_levels(runner: _Runner, criterion: str, betas: Sequence[float], count: int) -> list[dict[str, Any]]:
    """Exit options of the decoder by what a layer would answer, careful to fast."""
    if criterion == "patience":
        counts = range(runner.model.config.decoder_layers - 1, 0, -1)
        return [{"exit_criterion": criterion, "exit_patience": patience} for patience in counts][-count:]
    # careful first
    grid = sorted(GRIDS[criterion], reverse=criterion != "entropy")
    kept = sorted({round(place) for place in np.linspace(0, len(grid) - 1, min(count, len(grid)))})
    return [
        {"exit_criterion": criterion, "decoder_exit_threshold": grid[place]} | _decay(beta)
        for beta in betas
        for place in kept
    ]


def _similarity_levels(
    runner: _Runner, signals: Signals, stream: str, betas: Sequence[float], count: int, per_layer: bool
) -> list[dict[str, Any]]:
    """Exit options of one stream by similarity, careful to fast."""
    min_layers, tau = runner.shared["exit_min_layers"], runner.shared["exit_decay_tau"]
    found = []
    for beta in betas if stream == "decoder" else (1.0,):
        cosines, agreeing = signals.encoder.get(stream), None
        if stream == "decoder":
            # Answers are decided at step 0, whatever N is.
            cosines = without_decay(signals.decoder, signals.steps, runner.num_steps, beta, tau)
            agreeing = signals.agreeing
        levels = threshold_levels(cosines, count, agreeing=agreeing, per_layer=per_layer, min_layers=min_layers)
        found += [{f"{stream}_exit_threshold": thresholds} | _decay(beta) for thresholds in levels]
    return found


def _decay(beta: float) -> dict[str, Any]:
    return {} if beta == 1.0 else {"exit_decay_beta": beta}


# --- calibration ----------------------------------------------------------------------------------------------------


def calibrate(
    model: PreTrainedModel,
    processor: MuEProcessor,
    data: EvaluationData,
    task: str,
    *,
    budget: float | None = 0.05,
    compute: float | None = None,
    delta: float = 0.05,
    risk: str = "disagreement",
    objective: str = "flops",
    method: str = "hoeffding-bentkus",
    criteria: Sequence[str] = ("similarity",),
    per_layer: bool = False,
    betas: Sequence[float] = (1.0,),
    levels: int = 5,
    candidates: int = 8,
    search_share: float = 0.3,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    prompt_type: str = "prev_output",
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Calibration:
    """
    Finds exit thresholds, or depths, that keep a budget.

    Images are the units: the loss of an image is the mean over its rows. The promise is about the mean loss on images
    drawn as these were, under these options of `generate`, weights and dtype.

    Args:
        model ([`MuEForConditionalGeneration`]): on its device, in the dtype that will be used.
        processor ([`MuEProcessor`]): that of the model.
        data ([`EvaluationData`]): from [`describe_rows`], of images that the model was not trained on.
        task (`str`): "captioning" or "entailment".
        budget (`float`, *optional*, defaults to 0.05): allowed mean loss, in (0, 1). The fastest candidate that is
            certified for it becomes the preset.
        compute (`float`, *optional*): with `budget=None`, the allowed cost as a share of full depth, in (0, 1). The
            candidate with the least expected loss within it becomes the preset, together with an upper bound on its
            loss. That cost is kept on part A, not promised.
        delta (`float`, *optional*, defaults to 0.05): probability that the promise is false.
        risk (`str`, *optional*, defaults to `"disagreement"`): the loss of a row. "disagreement" needs no labels: 1 if
            the output differs from that at full depth. "metric": by how much it is worse, at most 1: for captions the
            drop of CIDEr-D, where 1 is what is often written as 100, with the document frequencies of these rows'
            references; for answers 1 if a right answer is lost.
        objective (`str`, *optional*, defaults to `"flops"`): what cost means: "flops", or "time", measured once for
            each candidate.
        method (`str`, *optional*, defaults to `"hoeffding-bentkus"`): see [`risk_pvalue`].
        criteria (sequence of `str`, *optional*, defaults to `("similarity",)`): criteria to try; the best setting of
            any of them becomes the preset. Beside "similarity", the decoder alone leaves by "confidence", "margin",
            "entropy" or "patience"; with "fixed", every stream stops at a depth.
        per_layer (`bool`, *optional*, defaults to `False`): one threshold per layer for similarity, see
            [`threshold_levels`].
        betas (sequence of `float`, *optional*, defaults to `(1.0,)`): values in (0, 1] of the decoder's
            `exit_decay_beta` to try.
        levels (`int`, *optional*, defaults to 5): thresholds to try per stream, criterion and beta; each runs part A
            once. Of "fixed" all depths are tried.
        candidates (`int`, *optional*, defaults to 8): combinations to run on part A and part B at most.
        search_share (`float`, *optional*, defaults to 0.3): share of the images in part A, in (0, 1).
        seed (`int`, *optional*, defaults to 0): of the split.
        options (`dict`, *optional*): of `generate`, for every run; of exit options `exit_decay_tau`, `exit_kv` and
            `exit_min_layers`.
        batch_size (`int`, *optional*, defaults to 16): rows per call.
        prompt_type (`str`, *optional*, defaults to `"prev_output"`): see [`predict`].
        folder (`str` or `os.PathLike`, *optional*): where the outputs of all runs are kept, so that a calibration of
            the same weights, data and options runs nothing twice; made if it does not exist.
        progress (`bool`, *optional*, defaults to `True`): whether a bar is shown.

    Returns:
        [`Calibration`]

    Raises:
        ValueError: before the first run, if an argument is out of range, the outputs are sampled, a label or reference
            that the risk needs is missing, or the images are too few for the budget; the message then gives the
            smallest one. After the search, if no candidate is within `compute`.
    """
    options = dict(options or {})
    _check_shares(budget=budget, compute=compute, delta=delta, search_share=search_share)
    _check_choices(risk, objective, method, criteria)
    _check_counts(levels=levels, candidates=candidates, criteria=len(criteria), betas=len(betas))
    if not all(0.0 < beta <= 1.0 for beta in betas):
        raise ValueError(f"`betas` must be above 0 and at most 1, got {list(betas)}; 1 is no decay.")
    _check_options(model, options)
    _check_rows(data.fields, task, risk)
    search, test = split_images([row["image_id"] for row in data.fields], search_share, seed)
    if compute is None:
        check_size(len(test), budget, delta, method)
    part_a, part_b = (_part(data, images) for images in (search, test))
    reward = None
    if risk == "metric" and task == "captioning":
        reward = CiderDReward([processor.encode_captions(row["references"]) for row in data.fields])
    common = {} if folder is None else _common(model, data, task, batch_size, prompt_type)
    folder = None if folder is None else Path(folder)
    runner = _Runner(model, processor, task, risk, options, batch_size, prompt_type, reward, folder, common)

    with tqdm(unit="run", desc="recording", disable=not progress) as bar:
        full, path = _search(runner, part_a, objective, criteria, betas, levels, per_layer, bar)
        if compute is None:
            path = thinned(path, 2 * budget, candidates)
        else:
            path = thinned(_within(path, objective, compute), 1.0, candidates)
        bar.total = bar.n + 2 * len(path)
        path = [_refined(runner, part_a, full, candidate, objective, bar) for candidate in path]
        path = front(path) or path[:1]
        bar.set_description("testing")
        full = runner.predictions(part_b, None)

        def measure(exits: dict[str, Any]) -> Outcome:
            bar.update()
            return runner.outcome(part_b, full, exits)

        if compute is None:
            tested, certified = certify(thinned(path, 2 * budget, candidates), measure, budget, delta, method)
        else:
            # Chosen by part A alone: the bound of part B holds for it whatever comes out.
            chosen = _within(path, objective, compute)[0]
            tested, certified = [_test(chosen, measure, None, delta, method)], 1
    if not certified:
        return Calibration(None, tested)
    best = min(tested[:certified], key=lambda one: one.flops if objective == "flops" else one.seconds)
    ran = runner.exits(best.options)
    shared = {name: ran[name] for name in SHARED_OPTIONS if ran.get(name, DEFAULTS[name]) != DEFAULTS[name]}
    notes = {
        "task": task,
        "risk": risk,
        "budget": budget if compute is None else None,
        "compute": compute,
        "objective": objective,
        "delta": delta,
        "method": method,
        "n": len(test),
        "loss": best.loss,
        "bound": best.bound,
        "flops": best.flops,
        "seconds": best.seconds,
        "generation": runner.others,
        "prompt_type": prompt_type if task == "entailment" else None,
        "data_fingerprint": data.fingerprint,
        "weights_fingerprint": weights_fingerprint(model),
        "version": version("mue-hf"),
    }
    return Calibration(shared | best.options | {k: v for k, v in notes.items() if v not in (None, {})}, tested)


def _search(
    runner: _Runner,
    part: _Part,
    objective: str,
    criteria: Sequence[str],
    betas: Sequence[float],
    count: int,
    per_layer: bool,
    bar: tqdm,
) -> tuple[list[Prediction], list[Candidate]]:
    """Part A at full depth, and the path of candidates that it lets expect."""
    full, signals = runner.recorded(part)
    if objective == "time":
        # The recorded run was slowed by recording.
        full = runner.predictions(part, None)
    # One list of levels per stream, for each criterion; the encoder's are the same for all but fixed depths.
    found: dict[str, list[list[dict[str, Any]]]] = {}
    *encoder, _ = runner.streams
    similar = [_similarity_levels(runner, signals, stream, betas, count, per_layer) for stream in encoder]
    for criterion in criteria:
        if criterion == "fixed":
            found[criterion] = [_fixed_levels(runner, stream) for stream in runner.streams]
        elif criterion == "similarity":
            decoder = _similarity_levels(runner, signals, "decoder", betas, count, per_layer)
            found[criterion] = [*similar, decoder]
        else:
            found[criterion] = [*similar, _decoder_levels(runner, criterion, betas, count)]
    bar.set_description("searching")
    tried: dict[str, Level] = {}
    different = {content_key(exits): exits for streams in found.values() for levels in streams for exits in levels}
    bar.total = len(different)
    for key, exits in different.items():
        outcome = runner.outcome(part, full, exits)
        tried[key] = Level(exits, 1.0 - outcome.cost(objective), expected_risk(outcome.losses))
        bar.update()
    path = front(
        candidate
        for streams in found.values()
        for candidate in pareto_path([[tried[content_key(exits)] for exits in levels] for levels in streams])
    )
    if not path:
        raise ValueError(
            f"`model` must have exits that save {objective}, got none on {len(part.counts)} images: stacks of one "
            "layer have none, and small `levels` may miss them; raise `levels`."
        )
    return full, path


def _common(
    model: PreTrainedModel, data: EvaluationData, task: str, batch_size: int, prompt_type: str
) -> dict[str, Any]:
    """What outputs and seconds of a run depend on, beside its rows and options."""
    saved = model.generation_config.to_dict()
    for name in ("transformers_version", "_from_model_config"):
        saved.pop(name, None)
    return {
        "weights": trunk_fingerprint(model),
        "data": data.fingerprint,
        "task": task,
        "generation": {name: value for name, value in saved.items() if "exit" not in name},
        "prompt_type": prompt_type,
        "batch_size": batch_size,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "version": version("mue-hf"),
    }


def _refined(
    runner: _Runner, part: _Part, full: list[Prediction], candidate: Candidate, objective: str, bar: tqdm
) -> Candidate:
    """The candidate with its cost, and its risk where that is greater than expected, from a real run on part A."""
    outcome = runner.outcome(part, full, candidate.options)
    bar.update()
    risk = max(candidate.risk, expected_risk(outcome.losses))
    return Candidate(candidate.options, outcome.cost(objective), risk)


def _within(path: Sequence[Candidate], objective: str, compute: float) -> list[Candidate]:
    """The candidates of a path whose cost is within `compute`."""
    within = [candidate for candidate in path if candidate.cost <= compute]
    if not within:
        reached = min(candidate.cost for candidate in path)
        raise ValueError(
            f"`compute` must be reachable, got {compute}, but the candidates reach {reached:.3g} of the {objective} "
            "of full depth; allow more, raise `levels`, or use `per_layer`."
        )
    return within


def _part(data: EvaluationData, images: list[list[int]]) -> _Part:
    order = [row for image in images for row in image]
    return _Part(ChosenRows(data.rows, order), [data.fields[row] for row in order], [len(image) for image in images])


def _check_shares(budget: float | None, compute: float | None, **others: float) -> None:
    if (budget is None) == (compute is None):
        raise ValueError(f"`budget` or `compute` must be given, got {budget} and {compute}; set the other to None.")
    for name, value in {"budget": budget, "compute": compute, **others}.items():
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"`{name}` must be above 0 and below 1, got {value}; choose such as 0.05.")


def _check_choices(risk: str, objective: str, method: str, criteria: Sequence[str]) -> None:
    choices = [("risk", risk, RISKS), ("objective", objective, OBJECTIVES), ("method", method, METHODS)]
    for name, value, known in choices + [("criteria", criterion, CALIBRATED) for criterion in criteria]:
        if value not in known:
            raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}; choose one of them.")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}; pass more.")


def _check_options(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    foreign = sorted((options.keys() & CONFIG_NAMES) - set(SHARED_OPTIONS))
    if foreign:
        raise ValueError(
            f"`options` may hold the exit options {list(SHARED_OPTIONS)} only, got {foreign}; calibration finds "
            "thresholds, depths and decay itself: pass `criteria` and `betas`."
        )
    if options.get("do_sample", model.generation_config.do_sample):
        raise ValueError("`do_sample` must be False, got True: sampled outputs differ from run to run; turn it off.")


def _check_rows(fields: Sequence[Mapping[str, Any]], task: str, risk: str) -> None:
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {list(TASKS)}, got {task!r}; choose one of them.")
    images = len({row["image_id"] for row in fields})
    if images < 2:
        raise ValueError(f"`data` must hold at least two images, one to search and one to test, got {images}.")
    needed = {"captioning": "references", "entailment": "label"}[task]
    if risk == "metric" and not all(row.get(needed) for row in fields):
        raise ValueError(f'`data` must have `{needed}` for `risk="metric"`, got some without; use "disagreement".')


def write_preset(folder: str | os.PathLike, name: str, preset: Mapping[str, Any]) -> None:
    """
    Adds a preset to the generation_config.json of a checkpoint, in place of one of the same name.

    The file is written whole or not at all.

    Raises:
        ValueError: if there is no such file, it is damaged, or the name is empty or that of a preset of the paper.
    """
    path = check_preset(folder, name)
    config = json.loads(path.read_text())
    config["exit_presets"] = (config.get("exit_presets") or {}) | {name: dict(preset)}
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_preset(folder: str | os.PathLike, name: str) -> Path:
    """The file that `write_preset` would change, if it could."""
    if name in SHIPPED_PRESETS or not name.strip():
        raise ValueError(f"`preset` must be a name of its own, got {name!r}; choose another.")
    path = Path(folder) / "generation_config.json"
    try:
        json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the checkpoint must be a local folder with a whole generation_config.json, got {path}: {error}; "
            "save the model there with `save_pretrained`."
        ) from error
    return path


__all__ = [
    "CALIBRATED",
    "OBJECTIVES",
    "RISKS",
    "SHARED_OPTIONS",
    "Calibration",
    "Candidate",
    "Level",
    "Outcome",
    "Tested",
    "calibrate",
    "certify",
    "check_preset",
    "check_size",
    "pareto_path",
    "split_images",
    "thinned",
    "write_preset",
]
