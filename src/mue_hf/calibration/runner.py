"""Real runs of candidates, compared with full depth: losses by image, FLOPs and seconds."""

import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from ..data.features import TrunkFeatureDataset
from ..evaluation import store
from ..evaluation.measure import Meter
from ..evaluation.rows import EvaluationData
from ..evaluation.signals import SignalRecorder, Signals, answer_tokens, stream_layers
from ..files import write_whole
from ..inference.flops import max_new_tokens
from ..inference.predict import Prediction, predict
from ..metrics.rewards import CiderDReward
from ..model.agreement_mue import blank_fit
from ..model.criteria_mue import CRITERIA, LAYER_OPTIONS, THRESHOLD_OPTIONS
from ..model.exit_options_mue import ExitOptions
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.presets_mue import decoding_settings
from ..model.processing_mue import MuEProcessor
from .certify import Outcome
from .fit import COVERAGE, FitRecorder, Fitted, choose_candidates, fit_agreement
from .goal import SHARED_OPTIONS, Goal

# Saved options must not reach a run: a preset takes their place.
DEFAULTS = {
    name: getattr(ExitOptions(), name)
    for name in (
        *("exit_criterion", "exit_decay_beta", "exit_decay_tau"),
        *("exit_kv", "exit_min_layers", "exit_rescore", "exit_warmup"),
    )
}


@dataclass(frozen=True)
class Split:
    """Rows of some images: as `predict` reads them, their texts alone, and how many rows each image has."""

    rows: Any
    texts: list[dict[str, Any]]
    counts: list[int]

    @classmethod
    def of(cls, data: EvaluationData, images: Sequence[Sequence[int]]) -> "Split":
        """The rows of `images`, each of which is the places of its rows."""
        order = [row for image in images for row in image]
        return cls(Subset(data.rows, order), [data.fields[row] for row in order], [len(image) for image in images])

    def by_image(self, losses: Sequence[float]) -> NDArray:
        starts = np.cumsum([0, *self.counts[:-1]])
        return np.add.reduceat(np.asarray(losses, dtype=np.float64), starts) / np.asarray(self.counts)


@dataclass
class Runner:
    """Runs candidates for real and compares them with full depth; the fields are arguments of [`calibrate`], and the
    `reward` that is the metric of captions."""

    model: MuEForConditionalGeneration
    processor: MuEProcessor
    data: EvaluationData
    goal: Goal
    options: dict[str, Any]
    batch_size: int
    prompt_type: str
    folder: str | os.PathLike | None = None
    reward: CiderDReward | None = None
    # tokens that criteria look at, None for the whole vocabulary, and what criterion "agreement" goes by
    tokens: list[int] | None = None
    fitted: Fitted | None = None

    def __post_init__(self) -> None:
        self.layers = stream_layers(self.model.config)
        # Exit options of every candidate, and the others of `generate`.
        self.shared = DEFAULTS | {name: value for name, value in self.options.items() if name in SHARED_OPTIONS}
        self.others = {name: value for name, value in self.options.items() if name not in SHARED_OPTIONS}
        self.num_steps = max_new_tokens(self.model, self.others)
        # What outputs and seconds depend on, beside rows and options.
        common = store.conditions(self.model, self.processor, self.data.fingerprint, self.goal.task, self.prompt_type)
        self.common = common | {
            "features": isinstance(self.data.rows, TrunkFeatureDataset),
            "batch_size": self.batch_size,
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
            "version": version("mue-hf"),
        }

    def exits(self, exits: Mapping[str, Any] | None) -> dict[str, Any]:
        """All exit options of a candidate, or of full depth for None."""
        if exits is None:
            return {"exit_criterion": "never"}
        # What a candidate leaves open must not come from what is saved with the checkpoint.
        off: dict[str, Any] = {THRESHOLD_OPTIONS[stream]: [None] * layers for stream, layers in self.layers.items()}
        off |= {LAYER_OPTIONS[stream]: layers for stream, layers in self.layers.items()}
        every = self.shared | off | dict(exits)
        criterion = CRITERIA[every["exit_criterion"]]
        chosen = {name: value for name, value in every.items() if name in criterion.options}
        looks = criterion.needs_logits and self.tokens is not None
        return chosen | ({"exit_candidates": self.tokens} if looks else {})

    @property
    def certified_for(self) -> dict[str, Any]:
        """The settings of all runs, exits aside, as a preset notes them: what its promise holds for."""
        settings = {"batch_size": self.batch_size, "dtype": str(self.model.dtype).removeprefix("torch.")}
        if self.goal.task == "captioning":
            config = deepcopy(self.model.generation_config)
            config.update(**self.others)
            settings = self.others | decoding_settings(config) | settings
        return settings

    def predictions(self, split: Split, exits: Mapping[str, Any] | None) -> list[Prediction]:
        """Of a candidate, or at full depth for None; from disk where they are."""
        options = self.others | self.exits(exits)
        path = self._path("run", split, options)
        found = None if path is None else store.read_predictions(path)
        if found is None:
            found = self._run(split, options)
            if path is not None:
                store.write_predictions(path, found)
        return found

    def recorded(self, split: Split) -> tuple[list[Prediction], Signals]:
        """At full depth, with what the layers say; from disk where they are. Its seconds mean nothing."""
        options = self.others | {"exit_criterion": "never"}
        path = self._path("recorded", split, options)
        if path is not None:
            found, signals = store.read_predictions(path), store.read_signals(path.with_suffix(".safetensors"))
            if found is not None and signals is not None:
                return found, signals
        tokens = answer_tokens(self.processor) if self.goal.task == "entailment" else None
        with SignalRecorder(self.model, tokens) as recorder:
            full = self._run(split, options)
        if path is not None:
            store.write_predictions(path, full)
            store.write_signals(path.with_suffix(".safetensors"), recorder.signals)
        return full, recorder.signals

    def choose_tokens(self, split: Split, full: list[Prediction], wanted: int | float | None) -> float | None:
        """Takes the tokens that criteria look at from outputs at full depth; returns the share that they cover. For
        None they are those that are saved with the model."""
        saved = getattr(self.model.generation_config, "exit_candidates", None)
        if wanted is None and saved is not None:
            self.tokens = list(saved)
            return None
        references = [
            [token for ids in self.processor.encode_captions(row.get("references") or []) for token in ids]
            for row in split.texts
        ]
        outputs = [one.token_ids for one in full]
        self.tokens, coverage = choose_candidates(outputs, references, COVERAGE if wanted is None else wanted)
        return coverage

    def fit(self, split: Split, coverage: float | None) -> None:
        """Fits criterion "agreement" on a run at full depth, and writes the report into the folder."""
        answers = None
        if self.goal.task == "entailment":
            answers = self.processor.encode_answers(list(self.processor.entailment_answers.values()))
        blank = blank_fit(self.layers["decoder"], self.tokens, answers)
        exits = {"exit_criterion": "agreement", "exit_fit": blank, "decoder_exit_threshold": 0.9}
        options = self.others | self.exits(exits)
        path = self._path("fit", split, options)
        path = None if path is None else path.with_suffix(".json")
        if path is not None and path.exists():
            self.fitted = Fitted(**json.loads(path.read_text(encoding="utf-8")))
            return
        with FitRecorder(self.model, answers is not None) as recorder:
            self._run(split, options)
        fitted = fit_agreement(*recorder.recorded(), blank)
        known = {"candidates": None if self.tokens is None else len(self.tokens), "coverage": coverage}
        self.fitted = Fitted(fitted.exit_fit, known | fitted.report)
        if path is not None:
            write_whole(path, json.dumps(vars(self.fitted), indent=2) + "\n")

    def _path(self, kind: str, split: Split, options: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        return Path(self.folder) / f"{kind}-{store.content_key([self.common, split.rows.indices, options])}.jsonl"

    def _run(self, split: Split, options: Mapping[str, Any]) -> list[Prediction]:
        how: dict[str, Any] = {"batch_size": self.batch_size, "prompt_type": self.prompt_type, "progress": False}
        return predict(self.model, self.processor, split.rows, self.goal.task, options, **how)

    def outcome(self, split: Split, full: list[Prediction], exits: Mapping[str, Any]) -> Outcome:
        """A candidate on a split, given the full-depth run of that."""
        found = self.predictions(split, exits)
        meter = Meter(self.model, self.processor, self.goal.task, split.texts, self.others, self.prompt_type)
        ran, most = (meter.flops(some, self.exits(by))["mean"] for some, by in ((found, exits), (full, None)))
        return Outcome(
            split.by_image(self._losses(meter, full, found)),
            ran / most,
            sum(one.seconds for one in found) / sum(one.seconds for one in full),
            self._calls(found) / self._calls(full),
        )

    def _calls(self, predictions: list[Prediction]) -> int:
        # a caption's tokens follow each other; the nodes of the answers' trie go through a layer together
        decoder = sum if self.goal.task == "captioning" else max
        return sum(
            one.image_exit_layers + one.text_exit_layers + decoder(one.decoder_exit_layers) for one in predictions
        )

    def _losses(self, meter: Meter, full: list[Prediction], found: list[Prediction]) -> list[float]:
        if self.goal.risk == "disagreement":
            return [float(one.output != other.output) for one, other in zip(found, full, strict=True)]
        drops = np.subtract(self._quality(meter, full), self._quality(meter, found))
        return np.clip(drops, 0.0, 1.0).tolist()

    def _quality(self, meter: Meter, predictions: list[Prediction]) -> list[float]:
        if self.reward is None:
            return meter.right_answers(predictions)
        references = [self.processor.encode_captions(row["references"]) for row in meter.fields]
        return self.reward([one.token_ids for one in predictions], references)


__all__ = ["DEFAULTS", "Runner", "Split"]
