"""Exit thresholds for a budget of changed outputs, with a guarantee, or for a budget of compute.

The images are split in two. On the search split one run at full depth records signals; they give candidate thresholds
for each stream. Real runs with one stream's exits at a time say what they save and change. Combinations that look best
run for real too, which gives a path of candidates from safest to fastest. On the held-out split, which the search
never saw, they run in that order until one cannot be certified ("Learn then Test", arXiv 2110.01052).

Every run leaves its outputs in a folder, if there is one for them: an interrupted calibration goes on from there.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data.features import TrunkFeatureDataset, trunk_fingerprint
from ..evaluation.rows import EvaluationData
from ..evaluation.signals import Signals
from ..evaluation.store import content_key
from ..inference.predict import TASKS, Prediction
from ..metrics.rewards import CiderDReward
from ..model.criteria_mue import CRITERIA
from ..model.exit_options_mue import CONFIG_NAMES
from ..model.generation_mue import weights_fingerprint
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .bounds import METHODS
from .certify import Outcome, Tested, certify, check_size, split_images, summarize
from .runner import DEFAULTS, SHARED_OPTIONS, Runner, Split
from .search import Candidate, StreamExit, expected_risk, front, pareto_path, thinned, within
from .thresholds import stream_candidates

RISKS = ("disagreement", "metric")
OBJECTIVES = ("flops", "time")


def calibrated_criteria() -> list[str]:
    """Names of the criteria that can be calibrated: all that have values to try."""
    return [name for name, criterion in CRITERIA.items() if criterion.sweep_options]


@dataclass(frozen=True)
class Calibration:
    """
    What calibration found.

    Args:
        preset (`dict`, *optional*): exit options for `exit_presets`, with what they promise; None if nothing could be
            certified.
        tested (`list[Tested]`): the candidates on the held-out split, in their order; the last one may have failed.
    """

    preset: dict[str, Any] | None
    tested: list[Tested] = field(default_factory=list)


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
    criteria: Sequence[str] = ("similarity",),
    per_layer: bool = False,
    betas: Sequence[float] = (1.0,),
    num_thresholds: int = 5,
    candidates: int = 8,
    search_share: float = 0.3,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    prompt_type: str = "prev_output",
    folder: str | os.PathLike | None = None,
    progress: bool = True,
    levels: int | None = None,
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
            loss. That cost is kept on the search split, not promised.
        delta (`float`, *optional*, defaults to 0.05): probability that the promise is false.
        risk (`str`, *optional*, defaults to `"disagreement"`): the loss of a row. "disagreement" needs no labels: 1 if
            the output differs from that at full depth. "metric": by how much it is worse, at most 1: for captions the
            drop of CIDEr-D, where 1 is what is often written as 100, with the document frequencies of the references
            of the search split; for answers 1 if a right answer is lost.
        objective (`str`, *optional*, defaults to `"flops"`): what cost means: "flops", or "time", measured once for
            each candidate.
        method (`str`, *optional*, defaults to `"hoeffding-bentkus"`): see [`risk_pvalue`].
        criteria (sequence of `str`, *optional*, defaults to `("similarity",)`): criteria to try; the best setting of
            any of them becomes the preset. Where a criterion is about the decoder alone, encoder streams exit by
            similarity. The best may be that the decoder runs in full.
        per_layer (`bool`, *optional*, defaults to `False`): one threshold per layer for similarity, see
            [`candidate_thresholds`].
        betas (sequence of `float`, *optional*, defaults to `(1.0,)`): values in (0, 1] of the decoder's
            `exit_decay_beta` to try.
        num_thresholds (`int`, *optional*, defaults to 5): candidate thresholds per stream, criterion and beta; each
            runs the search split once. Of "fixed" all depths are tried.
        candidates (`int`, *optional*, defaults to 8): combinations to run on the search and held-out split at most.
        search_share (`float`, *optional*, defaults to 0.3): share of the images in the search split, in (0, 1).
        seed (`int`, *optional*, defaults to 0): of the split.
        options (`dict`, *optional*): of `generate`, for every run; of exit options `exit_decay_tau`, `exit_kv` and
            `exit_min_layers`.
        batch_size (`int`, *optional*, defaults to 16): rows per call.
        prompt_type (`str`, *optional*, defaults to `"prev_output"`): see [`predict`].
        folder (`str` or `os.PathLike`, *optional*): where the outputs of all runs are kept, so that a calibration of
            the same weights, data and options runs nothing twice; made if it does not exist.
        progress (`bool`, *optional*, defaults to `True`): whether a bar is shown.
        levels (`int`, *optional*): deprecated name of `num_thresholds`.

    Returns:
        [`Calibration`]

    Raises:
        ValueError: before the first run, if an argument is out of range, the outputs are sampled, a label or reference
            that the risk needs is missing, or the images are too few for the budget; the message then gives the
            smallest one. After the search, if no candidate is within `compute`.
    """
    if levels is not None:
        warnings.warn("`levels` of `calibrate` is now `num_thresholds`; pass that.", FutureWarning, stacklevel=2)
        num_thresholds = levels
    options, criteria = dict(options or {}), [criteria] if isinstance(criteria, str) else list(criteria)
    _check_shares(budget=budget, compute=compute, delta=delta, search_share=search_share)
    _check_choices(risk, objective, method, criteria)
    _check_counts(num_thresholds=num_thresholds, candidates=candidates, criteria=len(criteria), betas=len(betas))
    if not all(0.0 < beta <= 1.0 for beta in betas):
        raise ValueError(f"`betas` must be above 0 and at most 1, got {list(betas)}; 1 is no decay.")
    _check_options(model, options)
    _check_rows(data.fields, task, risk)
    search_images, held_out_images = split_images([row["image_id"] for row in data.fields], search_share, seed)
    if budget is not None:
        check_size(len(held_out_images), budget, delta, method)
    search, held_out = Split.of(data, search_images), Split.of(data, held_out_images)
    reward = None
    if risk == "metric" and task == "captioning":
        # of the search split: losses on the held-out split must not depend on each other's images
        reward = CiderDReward([processor.encode_captions(row["references"]) for row in search.texts])
    common = {} if folder is None else _common(model, processor, data, task, batch_size, prompt_type)
    folder = None if folder is None else Path(folder)
    runner = Runner(model, processor, task, risk, options, batch_size, prompt_type, reward, folder, common)
    most_risk = 1.0 if budget is None else 2 * budget

    with tqdm(unit="run", desc="recording", disable=not progress) as bar:
        stream_exits = partial(stream_candidates, betas=betas, count=num_thresholds, per_layer=per_layer)
        full, path = _search(runner, search, objective, criteria, stream_exits, bar)
        affordable = path if compute is None else within(path, objective, compute)
        path = thinned(affordable, most_risk, candidates)
        bar.total = bar.n + 2 * len(path)
        path = [_refined(runner, search, full, candidate, objective, bar) for candidate in path]
        path = front(path) or path[:1]
        bar.set_description("testing")
        full = runner.predictions(held_out, None)

        def measure(exits: dict[str, Any]) -> Outcome:
            bar.update()
            return runner.outcome(held_out, full, exits)

        if compute is not None:
            # Chosen by the search split alone: the bound holds for it whatever comes out.
            chosen = within(path, objective, compute)[0]
            tested, certified = [summarize(chosen, measure(chosen.options), None, delta, method)], 1
        elif budget is not None:
            tested, certified = certify(thinned(path, most_risk, candidates), measure, budget, delta, method)
    if not certified:
        return Calibration(None, tested)
    best = min(tested[:certified], key=lambda one: one.flops if objective == "flops" else one.seconds)
    goal = {"task": task, "risk": risk, "budget": budget, "compute": compute, "objective": objective}
    goal |= {"delta": delta, "method": method, "n": len(held_out_images)}
    return Calibration(_preset(runner, best, goal, data.fingerprint), tested)


def _preset(runner: Runner, best: Tested, goal: Mapping[str, Any], data_fingerprint: str) -> dict[str, Any]:
    """The preset of the best candidate: its exit options, and what they promise under which conditions."""
    ran = runner.exits(best.options)
    shared = {name: ran[name] for name in SHARED_OPTIONS if ran.get(name, DEFAULTS[name]) != DEFAULTS[name]}
    notes = {
        **goal,
        "loss": best.loss,
        "bound": best.bound,
        "flops": best.flops,
        "seconds": best.seconds,
        "generation": runner.others,
        "prompt_type": runner.prompt_type if runner.task == "entailment" else None,
        "data_fingerprint": data_fingerprint,
        "weights_fingerprint": weights_fingerprint(runner.model),
        "version": version("mue-hf"),
    }
    return shared | best.options | {name: value for name, value in notes.items() if value not in (None, {})}


def _search(
    runner: Runner,
    split: Split,
    objective: str,
    criteria: Sequence[str],
    stream_exits: Callable[[Runner, Signals, str, str], list[dict[str, Any]]],
    bar: tqdm,
) -> tuple[list[Prediction], list[Candidate]]:
    """The search split at full depth, and the path of candidates that it lets expect. `stream_exits` gives the options
    to try for a criterion and a stream."""
    full, signals = runner.recorded(split)
    if objective == "time":
        # The recorded run was slowed by recording.
        full = runner.predictions(split, None)
    found = [[stream_exits(runner, signals, name, stream) for stream in runner.layers] for name in criteria]
    bar.set_description("searching")
    tried: dict[str, StreamExit] = {}
    # Encoder streams exit alike under several criteria.
    different = {content_key(exits): exits for streams in found for some in streams for exits in some}
    bar.total = len(different)
    for key, exits in different.items():
        outcome = runner.outcome(split, full, exits)
        tried[key] = StreamExit(exits, 1.0 - outcome.cost(objective), expected_risk(outcome.losses))
        bar.update()
    path = front(
        candidate
        for streams in found
        for candidate in pareto_path([[tried[content_key(exits)] for exits in some] for some in streams])
    )
    if not path:
        raise ValueError(
            f"`model` must have exits that save {objective}, got none on {len(split.counts)} images: stacks of one "
            "layer have none, and `num_thresholds` or `exit_min_layers` may leave them out; raise or lower that."
        )
    return full, path


def _common(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    data: EvaluationData,
    task: str,
    batch_size: int,
    prompt_type: str,
) -> dict[str, Any]:
    """What outputs and seconds of a run depend on, beside its rows and options."""
    saved = model.generation_config.to_dict()
    for name in ("transformers_version", "_from_model_config"):
        saved.pop(name, None)
    return {
        "weights": trunk_fingerprint(model),
        "data": data.fingerprint,
        "task": task,
        # Every run states its exits.
        "generation": {name: value for name, value in saved.items() if "exit" not in name},
        "images": processor.image_processor.to_dict(),
        "features": isinstance(data.rows, TrunkFeatureDataset),
        "prompt_type": prompt_type,
        "batch_size": batch_size,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "version": version("mue-hf"),
    }


def _refined(
    runner: Runner, split: Split, full: list[Prediction], candidate: Candidate, objective: str, bar: tqdm
) -> Candidate:
    """The candidate with its cost, and its risk where that is greater than expected, from a real run on `split`."""
    outcome = runner.outcome(split, full, candidate.options)
    bar.update()
    risk = max(candidate.risk, expected_risk(outcome.losses))
    return Candidate(candidate.options, outcome.cost(objective), risk)


def _check_shares(budget: float | None, compute: float | None, **others: float) -> None:
    if (budget is None) == (compute is None):
        raise ValueError(f"`budget` or `compute` must be given, got {budget} and {compute}; set the other to None.")
    for name, value in {"budget": budget, "compute": compute, **others}.items():
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"`{name}` must be above 0 and below 1, got {value}; choose such as 0.05.")


def _check_choices(risk: str, objective: str, method: str, criteria: Sequence[str]) -> None:
    choices = [("risk", risk, RISKS), ("objective", objective, OBJECTIVES), ("method", method, METHODS)]
    choices += [("criteria", criterion, calibrated_criteria()) for criterion in criteria]
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}; choose one of them.")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}; pass more.")


def _check_options(model: MuEForConditionalGeneration, options: Mapping[str, Any]) -> None:
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


__all__ = ["OBJECTIVES", "RISKS", "Calibration", "calibrate", "calibrated_criteria"]
