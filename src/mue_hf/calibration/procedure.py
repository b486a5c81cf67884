"""Exit thresholds for a budget of changed outputs, with a guarantee, or for a budget of compute.

On the search split one run at full depth records signals, which give candidate thresholds for each stream. Real runs
of one stream's exits at a time, then of combinations that look best, give a path of candidates from safest to fastest.
On the held-out split they run in that order until one cannot be certified ("Learn then Test", arXiv 2110.01052).
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from tqdm import tqdm

from ..evaluation.rows import EvaluationData
from ..evaluation.settings import sets_depths
from ..evaluation.signals import Signals, stream_layers, without_decay
from ..evaluation.store import content_key
from ..evaluation.thresholds import candidate_thresholds, depth_thresholds
from ..inference.predict import Prediction
from ..metrics.rewards import CiderDReward
from ..model.agreement_mue import Agreement
from ..model.criteria_mue import CRITERIA, Similarity
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.presets_mue import weights_fingerprint
from ..model.processing_mue import MuEProcessor
from .certify import Outcome, Tested, certify, check_size, control, cost, split_images, summarize
from .fit import check_candidates
from .goal import SHARED_OPTIONS, Goal, check_options, check_search, check_share, check_streams
from .runner import DEFAULTS, Runner, Split
from .search import Candidate, expected_risk, front, pareto_path, thinned, within


@dataclass(frozen=True)
class Calibration:
    """What calibration found: the `preset`, exit options for `exit_presets` with what they promise (None if nothing
    could be certified), and the candidates `tested` on the held-out split, of which the last may have failed. Where
    criteria look at a list of tokens, that is `exit_candidates`, to be saved beside the presets; with criterion
    "agreement", `report` says how reliable its probabilities are, see [`reliability`]."""

    preset: dict[str, Any] | None
    tested: list[Tested]
    exit_candidates: list[int] | None = None
    report: dict[str, Any] | None = None


def calibrate(
    model: MuEForConditionalGeneration,
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
    guarantee: str = "confidence",
    criteria: Sequence[str] = ("similarity",),
    streams: Sequence[str] | None = None,
    per_layer: bool = False,
    encoder_depths: bool = False,
    betas: Sequence[float] = (1.0,),
    num_thresholds: int = 5,
    candidates: int = 8,
    search_share: float = 0.3,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    prompt_type: str = "prev_output",
    exit_candidates: int | float | None = None,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
    levels: int | None = None,
) -> Calibration:
    """
    Finds exit thresholds, or depths, that keep a budget.

    Images are the units: the loss of an image is the mean over its rows. The promise is about the mean loss on images
    drawn as these were, under these options of `generate`, weights and dtype.

    Args:
        model, processor: on their device, in the dtype that will be used.
        data ([`EvaluationData`]): from [`describe_rows`], of images that the model was not trained on.
        task (`str`): "captioning" or "entailment".
        budget (`float`): allowed mean loss, in (0, 1). The fastest candidate certified for it becomes the preset.
        compute (`float`): with `budget=None`, the allowed cost as a share of full depth, in (0, 1), kept on the search
            split, not promised. The candidate of the least expected loss within it becomes the preset, with a bound.
        delta (`float`): probability that the promise is false.
        risk (`str`): the loss of a row. "disagreement" needs no labels: 1 if the output differs from that at full
            depth. "metric": by how much it is worse, at most 1: for captions the drop of CIDEr-D, where 1 is what is
            often written as 100, with the document frequencies of the references of the search split; for answers 1 if
            a right answer is lost.
        objective (`str`): what cost means: "flops"; "time", measured once for each candidate; or "calls", the layer
            calls that a row takes alone, which are the price where reading the weights is. With `exit_kv="exact"` they
            are what is saved, and FLOPs hardly are. With beams the depths of the returned caption stand for all.
        method (`str`): see [`risk_pvalue`].
        guarantee (`str`): what is said of `budget`: "confidence", that the preset keeps it, with probability 1 -
            delta; or "expectation", that the mean over calibrations on draws of the data does, which needs fewer
            images and says less of this one preset. `delta` and `method` are then of no effect; see
            [`expected_loss_bound`].
        criteria (sequence of `str`): criteria to try; the best setting of any of them becomes the preset. Where one is
            about the decoder alone, encoder streams exit by similarity.
        streams (sequence of `str`, *optional*): of the model's streams ("image", "text" or "encoder", and "decoder")
            those that may exit; all by default. Captions are nearly ties, and where few of them may change, the
            encoder had better run whole: others are runs in vain.
        per_layer (`bool`): one threshold per layer for similarity, see [`candidate_thresholds`].
        encoder_depths (`bool`): encoder streams that would exit by similarity may stop after a fixed number of layers
            too, each of which runs once; the decoder's criterion is free of that. As thresholds: None before that
            layer, and one that every row passes from there on.
        betas (sequence of `float`): values in (0, 1] of the decoder's `exit_decay_beta` to try.
        num_thresholds (`int`): candidate thresholds per stream, criterion and beta, each of which runs once; of
            "fixed" all depths are tried. `levels` is its deprecated name.
        candidates (`int`): combinations to run on the search and held-out split at most.
        search_share (`float`), seed (`int`): share of the images in the search split, in (0, 1), and how it is drawn.
        options (`dict`): of `generate`, for every run; of exit options those in
            `SHARED_OPTIONS`: `exit_decay_tau`, `exit_kv`, `exit_min_layers`, `exit_rescore`.
        batch_size, prompt_type, progress: see [`predict`].
        exit_candidates (`int` or `float`): how many tokens criteria look at in captions, or the share of the tokens of
            full-depth outputs that they cover; see [`choose_candidates`]. Default: the list that is saved with the
            model; without one .99 for criterion "agreement", and the whole vocabulary for others.
        folder (`str` or `os.PathLike`): where the outputs of all runs are kept, so that an interrupted calibration of
            the same weights, data and options goes on from there; made if it does not exist.

    Raises:
        ValueError: before the first run, if an argument is out of range, the outputs are sampled, a label or reference
            that the risk needs is missing, or the images are too few for the budget; the message then gives the
            smallest one. After the search, if no candidate is within `compute`.
    """
    if levels is not None:
        warnings.warn("`levels` of `calibrate` is now `num_thresholds`; pass that.", FutureWarning, stacklevel=2)
        num_thresholds = levels
    criteria = [criteria] if isinstance(criteria, str) else list(criteria)
    goal = Goal(task, risk, budget, compute, objective, delta, method, guarantee)
    check_share("search_share", search_share)
    check_search(criteria, betas, num_thresholds=num_thresholds, candidates=candidates)
    check_candidates(exit_candidates, task)
    if Agreement.name in criteria and model.config.decoder_layers < 2:
        raise ValueError(
            f"`criteria` may hold {Agreement.name!r} for decoders of at least two layers, got "
            f"{model.config.decoder_layers}; there is nothing to fit, leave it out."
        )
    check_options(options or {}, bool(model.generation_config.do_sample))
    goal.check_rows(data.fields)
    images = split_images([row["image_id"] for row in data.fields], search_share, seed)
    search, held_out = (Split.of(data, some) for some in images)
    check_size(len(held_out.counts), goal)
    exiting = list(stream_layers(model.config)) if streams is None else list(streams)
    check_streams(exiting, stream_layers(model.config))
    runner = Runner(model, processor, data, goal, dict(options or {}), batch_size, prompt_type, folder)
    if risk == "metric" and task == "captioning":
        # of the search split: losses on the held-out split must not depend on each other's images
        runner.reward = CiderDReward([processor.encode_captions(row["references"]) for row in search.texts])
    with tqdm(unit="run", desc="recording", disable=not progress) as bar:
        exits = partial(
            _stream_exits, betas=betas, count=num_thresholds, per_layer=per_layer, encoder_depths=encoder_depths
        )
        path = _search(runner, search, criteria, exiting, exits, candidates, bar, exit_candidates)
        bar.set_description("testing")
        tested, certified = _test(runner, held_out, path, candidates, bar)
    report = None if runner.fitted is None else runner.fitted.report
    if not certified:
        return Calibration(None, tested, None, report)
    best = min(tested[:certified], key=lambda one: cost(one, objective))
    tokens = runner.exits(best.options).get("exit_candidates")
    return Calibration(_preset(runner, best, len(held_out.counts)), tested, tokens, report)


def _search(
    runner: Runner,
    split: Split,
    criteria: Sequence[str],
    streams: Sequence[str],
    stream_exits: Callable,
    count: int,
    bar: tqdm,
    wanted: int | float | None,
) -> list[Candidate]:
    """At most `count` candidates from safest to fastest, from real runs on the search split. `stream_exits` gives the
    options to try for a criterion and one of the `streams` that exit; `wanted` are the candidate tokens."""
    goal = runner.goal
    full, signals = runner.recorded(split)
    _prepare(runner, split, criteria, full, wanted)
    if goal.objective == "time":
        # The recorded run was slowed by recording.
        full = runner.predictions(split, None)

    def measured(exits: dict[str, Any]) -> Candidate:
        outcome = runner.outcome(split, full, exits)
        bar.update()
        return Candidate(exits, cost(outcome, goal.objective), expected_risk(outcome.losses))

    found = [[stream_exits(runner, signals, name, stream) for stream in streams] for name in criteria]
    bar.set_description("searching")
    # Encoder streams exit alike under several criteria.
    different = {content_key(exits): exits for streams in found for some in streams for exits in some}
    bar.total = len(different)
    tried = {key: measured(exits) for key, exits in different.items()}
    path = front(
        candidate
        for streams in found
        for candidate in pareto_path([[tried[content_key(exits)] for exits in some] for some in streams])
    )
    if not path:
        raise ValueError(
            f"`model` must have exits that save {goal.objective}, got none on {len(split.counts)} images: stacks of "
            "one layer have none, and `num_thresholds` or `exit_min_layers` may leave them out; raise or lower that."
        )
    path = thinned(within(path, goal), goal.most_risk, count)
    bar.total = bar.n + 2 * len(path)
    expected = [candidate.risk for candidate in path]
    path = [measured(candidate.options) for candidate in path]
    path = [replace(one, risk=max(one.risk, risk)) for one, risk in zip(path, expected, strict=True)]
    return front(path) or path[:1]


def _prepare(
    runner: Runner, split: Split, criteria: Sequence[str], full: list[Prediction], wanted: int | float | None
) -> None:
    """Chooses the tokens that criteria look at, and fits the criterion that needs a fit."""
    saved = getattr(runner.model.generation_config, "exit_candidates", None)
    looking = any(CRITERIA[name].needs_logits for name in criteria)
    fitting, coverage = Agreement.name in criteria, None
    if runner.goal.task == "captioning" and looking and (fitting or wanted is not None or saved is not None):
        coverage = runner.choose_tokens(split, full, wanted)
    if fitting:
        runner.fit(split, coverage)


def _stream_exits(
    runner: Runner,
    signals: Signals,
    name: str,
    stream: str,
    betas: Sequence[float],
    count: int,
    per_layer: bool,
    encoder_depths: bool,
) -> list[dict[str, Any]]:
    """Exit options of one stream under the criterion `name`, careful to fast: at most `count` for each of the `betas`
    that the stream takes; of depths that are given, all."""
    criterion = CRITERIA[name]
    if stream != "decoder" and not criterion.in_encoder:
        criterion = Similarity
    option, layers = criterion.sweep_options[stream], runner.layers[stream]
    min_layers = runner.shared["exit_min_layers"]
    named: dict[str, Any] = {} if criterion is Similarity else {"exit_criterion": name}
    if criterion is Agreement and runner.fitted is not None:
        named["exit_fit"] = runner.fitted.exit_fit
    if sets_depths(criterion):
        return [named | {option: depth} for depth in criterion.sweep(layers) if depth >= min_layers]
    found = []
    if encoder_depths and stream != "decoder":
        found = [{option: depth_thresholds(depth, layers)} for depth in range(layers - 1, min_layers - 1, -1)]
    for beta in betas if stream == "decoder" and "exit_decay_beta" in criterion.options else (1.0,):
        if criterion is not Similarity:
            known = criterion.sweep(layers)
            # The first and the last among them; of one, the last.
            chosen = np.linspace(len(known) - 1, 0, min(count, len(known)))[::-1]
            values = [known[round(place)] for place in chosen]
        else:
            cosines, agreeing = signals.encoder.get(stream, signals.decoder), None
            if stream == "decoder":
                # Answers are decided at step 0, whatever N is.
                decay = (signals.steps, runner.num_steps, beta, runner.shared["exit_decay_tau"])
                cosines, agreeing = without_decay(cosines, *decay), signals.agreeing
            how = {"agreeing": agreeing, "per_layer": per_layer, "min_layers": min_layers}
            values = candidate_thresholds(cosines, count, **how)
        decayed = {} if beta == 1.0 else {"exit_decay_beta": beta}
        found += [named | {option: value} | decayed for value in values]
    return found


def _test(runner: Runner, split: Split, path: Sequence[Candidate], count: int, bar: tqdm) -> tuple[list[Tested], int]:
    """What was run on the held-out split, and how many of them, from the first, are certified."""
    goal, full = runner.goal, runner.predictions(split, None)

    def measure(exits: dict[str, Any]) -> Outcome:
        bar.update()
        return runner.outcome(split, full, exits)

    if goal.budget is not None:
        path = thinned(path, goal.most_risk, count)
        if goal.guarantee == "expectation":
            return control(path, measure, goal.budget)
        return certify(path, measure, goal.budget, goal.delta, goal.method)
    # Chosen by the search split alone: the bound holds for it whatever comes out.
    chosen = within(path, goal)[0]
    return [summarize(chosen, measure(chosen.options), None, goal.delta, goal.method)], 1


def _preset(runner: Runner, best: Tested, images: int) -> dict[str, Any]:
    """The preset of the best candidate: its exit options, and what they promise under which conditions."""
    ran = runner.exits(best.options)
    shared = {name: ran[name] for name in SHARED_OPTIONS if ran.get(name, DEFAULTS[name]) != DEFAULTS[name]}
    # Never left to a default: a preset stays what was certified.
    shared |= {name: ran[name] for name in ("exit_criterion", "exit_kv")}
    goal = asdict(runner.goal)
    if runner.goal.guarantee == "expectation":
        del goal["delta"], goal["method"]
    notes = {
        **goal,
        "n": images,
        **{name: getattr(best, name) for name in ("loss", "bound", "flops", "seconds", "calls")},
        "generation": runner.others,
        "certified_for": runner.certified_for,
        "prompt_type": runner.prompt_type if runner.goal.task == "entailment" else None,
        "data_fingerprint": runner.data.fingerprint,
        "weights_fingerprint": weights_fingerprint(runner.model),
        "version": version("mue-hf"),
    }
    return shared | best.options | {name: value for name, value in notes.items() if value not in (None, {})}


__all__ = ["Calibration", "calibrate"]
