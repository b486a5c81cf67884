"""Real runs of candidates, compared with full depth: losses by image, FLOPs and seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.measure import Meter
from ..evaluation.rows import ChosenRows
from ..evaluation.signals import SignalRecorder, Signals
from ..evaluation.store import content_key, read_predictions, read_signals, write_predictions, write_signals
from ..inference.predict import Prediction, predict
from ..metrics.rewards import CiderDReward
from ..model.configuration_mue import MuEConfig
from ..model.criteria_mue import CRITERIA
from ..model.exit_options_mue import ExitOptions
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .certify import Outcome

# No cosine is above it.
NEVER = 2.0
# Exit options that every candidate may share; the others are what calibration looks for.
SHARED_OPTIONS = ("exit_decay_tau", "exit_kv", "exit_min_layers")
# Saved options must not reach a run: a preset takes their place.
DEFAULTS = {
    name: getattr(ExitOptions(), name)
    for name in ("exit_criterion", "exit_decay_beta", "exit_decay_tau", "exit_kv", "exit_min_layers", "exit_warmup")
}


def layers(config: MuEConfig, stream: str) -> int:
    """How many layers a stream has."""
    return config.decoder_layers if stream == "decoder" else config.encoder_layers


@dataclass(frozen=True)
class Part:
    """Rows of some images: as `predict` reads them, their texts alone, and how many rows each image has."""

    rows: ChosenRows
    texts: list[dict[str, Any]]
    counts: list[int]

    def by_image(self, losses: Sequence[float]) -> NDArray:
        starts = np.cumsum([0, *self.counts[:-1]])
        return np.add.reduceat(np.asarray(losses, dtype=np.float64), starts) / np.asarray(self.counts)


@dataclass
class Runner:
    """Runs candidates for real and compares them with full depth; the fields are arguments of `calibrate`, and what
    all runs have in common."""

    model: MuEForConditionalGeneration
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
        # What a candidate leaves open must not come from what is saved with the checkpoint.
        off: dict[str, Any] = {f"{stream}_exit_threshold": NEVER for stream in self.streams}
        off |= {f"{stream}_exit_layer": layers(self.model.config, stream) for stream in self.streams}
        every = self.shared | off | dict(exits)
        return {name: value for name, value in every.items() if name in CRITERIA[every["exit_criterion"]].options}

    def predictions(self, part: Part, exits: Mapping[str, Any] | None) -> list[Prediction]:
        """Of a candidate, or at full depth for None; from disk where they are."""
        options = self.others | self.exits(exits)
        path = self._path("run", part, options)
        found = None if path is None else read_predictions(path)
        if found is None:
            found = self._run(part, options)
            if path is not None:
                write_predictions(path, found)
        return found

    def recorded(self, part: Part) -> tuple[list[Prediction], Signals]:
        """At full depth, with what the layers say; from disk where they are. Its seconds mean nothing."""
        options = self.others | {"exit_criterion": "never"}
        path = self._path("recorded", part, options)
        if path is not None:
            found, signals = read_predictions(path), read_signals(path.with_suffix(".safetensors"))
            if found is not None and signals is not None:
                return found, signals
        answers = None
        if self.task == "entailment":
            ids = self.processor.encode_answers(list(self.processor.entailment_answers.values()))
            answers = [*(token for answer in ids for token in answer), self.processor.tokenizer.eos_token_id]
        with SignalRecorder(self.model, answers) as recorder:
            full = self._run(part, options)
        if path is not None:
            write_predictions(path, full)
            write_signals(path.with_suffix(".safetensors"), recorder.signals)
        return full, recorder.signals

    def _path(self, kind: str, part: Part, options: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{kind}-{content_key([self.common, part.rows.indices, options])}.jsonl"

    def _run(self, part: Part, options: Mapping[str, Any]) -> list[Prediction]:
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

    def outcome(self, part: Part, full: list[Prediction], exits: Mapping[str, Any]) -> Outcome:
        """A candidate on a part, given the full-depth run of the same part."""
        found = self.predictions(part, exits)
        return Outcome(
            part.by_image(self.losses(part, full, found)),
            self.flops(part, found, exits) / self.flops(part, full, None),
            sum(one.seconds for one in found) / sum(one.seconds for one in full),
        )

    def flops(self, part: Part, predictions: list[Prediction], exits: Mapping[str, Any] | None) -> float:
        """Mean FLOPs of an output, its image's trunk included."""
        meter = Meter(self.model, self.processor, self.task, part.texts, self.others, self.prompt_type)
        return meter.flops(predictions, self.exits(exits))["mean"]

    def losses(self, part: Part, full: list[Prediction], found: list[Prediction]) -> list[float]:
        """The loss of every row."""
        if self.risk == "disagreement":
            return [float(one.output != other.output) for one, other in zip(found, full, strict=True)]
        drops = np.subtract(self._quality(part, full), self._quality(part, found))
        return np.clip(drops, 0.0, 1.0).tolist()

    def _quality(self, part: Part, predictions: list[Prediction]) -> list[float]:
        if self.reward is not None:
            references = [self.processor.encode_captions(row["references"]) for row in part.texts]
            return self.reward([one.token_ids for one in predictions], references)
        answers = self.processor.entailment_answers
        return [float(one.output == answers[row["label"]]) for one, row in zip(predictions, part.texts, strict=True)]


__all__ = ["DEFAULTS", "SHARED_OPTIONS", "Part", "Runner", "layers"]
