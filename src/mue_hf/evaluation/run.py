"""What exits cost in quality and save in layers, FLOPs and time: every point measured once, a JSON record for each."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from ..data.features import cache_trunk_features
from ..files import write_whole
from ..inference.predict import Prediction, predict
from ..metrics import caption_scores
from ..metrics.words import words_baseline
from ..model.exit_options_mue import CHECKPOINT_OPTIONS, CONFIG_NAMES, ExitOptions, resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.presets_mue import weights_fingerprint
from ..model.processing_mue import MuEProcessor
from .arguments import EvaluationArguments
from .depths import shuffled_depths, similarity_curves, token_oracle
from .measure import Meter, environment
from .plots import draw_plots
from .processes import Processes
from .rows import ControlledRows, describe_rows, donors, load_rows, row_fields
from .settings import Setting, make_settings
from .signals import SignalRecorder, Signals, answer_tokens
from .store import append_record, conditions, content_key, read_predictions, read_records, write_predictions
from .thresholds import stream_thresholds

NEVER = {"exit_criterion": "never"}


class Evaluation:
    """
    One comparison of exit settings: model, data and what all of its points have in common.

    Args:
        model ([`MuEForConditionalGeneration`]), processor ([`MuEProcessor`]): what is evaluated. With sweeps or chosen
            settings, exits saved in `model.generation_config` are taken out: each point is what its name says.
        arguments, processes: what is asked for, and who shares the work ([`Processes`]; this one alone by default).

    Raises:
        ValueError: before anything is run, if an option is wrong or the data cannot be read.
    """

    def __init__(
        self,
        model: MuEForConditionalGeneration,
        processor: MuEProcessor,
        arguments: EvaluationArguments,
        processes: Processes | None = None,
    ) -> None:
        args = arguments
        self.model, self.processor, self.args = model, processor, args
        self.processes = processes or Processes(0, 1, str(model.device))
        # Outputs by row are kept there.
        self.side_folder = args.output.with_suffix("")
        self.known = self.processes.share(lambda: read_records(args.output))
        if args.sweeps or args.chosen:
            for name in CONFIG_NAMES - {"exit_presets", *CHECKPOINT_OPTIONS}:
                if getattr(model.generation_config, name, None) is not None:
                    setattr(model.generation_config, name, None)
        saved = model.generation_config.to_dict()
        beams = args.decoding.get("num_beams") or saved["num_beams"] or 1
        if args.oracle and args.task == "captioning" and beams > 1:
            raise ValueError(f"`oracle` needs greedy decoding, got {beams} beams; set `num_beams` to 1.")
        self.settings = self._settings()
        by_name = {point.name: point for point in self.settings}
        if args.against not in by_name:
            raise ValueError(f"`against` must name a point of this run, got {args.against!r}; they are {[*by_name]}.")
        self.against = by_name[args.against]
        # A wrong option is found before the first point is run.
        self.resolved = {
            name: _known(resolve_options(point.exits, {}, saved, model.config)) for name, point in by_name.items()
        }
        if args.task == "captioning":
            _try_scores(args.metrics, args.tokenizer)
        data = describe_rows(self._load(args.split, args.limit))
        chosen = donors([row["image_id"] for row in data.fields]) if args.images == "shuffled" else None
        self.timed_rows, self.rows = (
            ControlledRows(rows, args.premise, chosen, args.images != "none")
            for rows in (data.rows, self._fed(data.rows))
        )
        scores: dict[str, Any] = {"metrics": args.metrics, "tokenizer": args.tokenizer, "resamples": args.resamples}
        taught = self.processes.share(self._words_statements)
        if taught is not None:
            texts = [row["hypothesis"] for row in data.fields]
            scores["words"] = self.processes.share(lambda: words_baseline(*taught, texts))
        self.meter = Meter(model, processor, args.task, data.fields, args.decoding, args.prompt_type, **scores)
        self.common = conditions(model, processor, data.fingerprint, args.task, args.prompt_type)
        self.common["decoding"] |= args.decoding
        dtype = str(model.dtype).removeprefix("torch.")
        self.common |= {"premise": args.premise, "images": args.images, "dtype": dtype}
        self.scoring = {
            "metrics": list(args.metrics) if args.task == "captioning" else ["accuracy"],
            "tokenizer": args.tokenizer if args.task == "captioning" else None,
            "resamples": args.resamples,
            "timing": [args.time_rows, args.time_batch_size, args.time_repeats],
            "against": self.resolved[self.against.name],
        }
        if taught is not None:
            # Statements that are the same in another file are the same baseline.
            self.scoring["words_statements"] = content_key(taught)

    def _settings(self) -> list[Setting]:
        args, thresholds = self.args, None
        if args.thresholds_split:
            rows = self._load(args.thresholds_split, args.thresholds_rows)
            rows = ControlledRows(rows, args.premise, None, True)
            thresholds = self.processes.share(lambda: stream_thresholds(self._signals(rows), args.num_thresholds))
        asked = {name: getattr(args, name) for name in ("presets", "sweeps", "chosen", "shuffled_depths")}
        asked["fit"] = self._fit()
        return make_settings(self.model.config, base=args.exits, thresholds=thresholds, **asked)

    def _fit(self) -> Mapping[str, Any] | None:
        """The fit of the first preset that has one for this task."""
        presets = getattr(self.model.generation_config, "exit_presets", None) or {}
        fits = [preset["exit_fit"] for _, preset in sorted(presets.items()) if preset.get("exit_fit")]
        generated = self.args.task == "captioning"
        return next((fit for fit in fits if (fit.get("answers") is None) == generated), None)

    def _words_statements(self) -> tuple[list[str], list[str]] | None:
        """Texts and labels of the statements that the baseline of words alone learns from."""
        args, texts, labels = self.args, [], []
        for source in args.words_baseline:
            rows = row_fields(load_rows(args.task, source, args.words_split, **_of_source(source, args.data_options)))
            texts += [row["hypothesis"] for row in rows]
            labels += [row["label"] for row in rows]
        return (texts, labels) if texts else None

    def _load(self, split: str, limit: int | None) -> Any:
        args = self.args
        options = {"limit": limit, "kind_column": args.kind_column} | dict(args.data_options)
        return load_rows(args.task, args.data, split, **options)

    def _fed(self, rows: Any) -> Any:
        """The rows as the model reads them: with the trunk's features in place of images, if there is a folder."""
        args = self.args
        if args.features is None:
            return rows
        # In float32 nothing but the batch of the trunk differs from running it.
        options: dict[str, Any] = {"dtype": torch.float32, "batch_size": args.batch_size}
        with self.processes.main_first():
            return cache_trunk_features(self.model, self.processor, rows, args.features, **options)

    def _predict(self, rows: Any, exits: Mapping[str, Any]) -> list[Prediction]:
        """Predictions of `rows`, made by all processes."""
        part = self.processes.part(len(rows))
        place = slice(part.start, part.stop)
        cut = {name: value[place] if isinstance(value, Tensor) else value for name, value in exits.items()}
        return self.processes.gather(self._run(Subset(rows, part), cut) if part else [])

    def _run(self, rows: Any, exits: Mapping[str, Any]) -> list[Prediction]:
        """Predictions of `rows`, made by this process."""
        args, options = self.args, {**self.args.decoding, **exits}
        how: dict[str, Any] = {"batch_size": args.batch_size, "prompt_type": args.prompt_type}
        return predict(self.model, self.processor, rows, args.task, options, progress=self.processes.is_main, **how)

    def _signals(self, rows: Any) -> Signals:
        """What the layers say about `rows` at full depth, in this process."""
        tokens = answer_tokens(self.processor) if self.args.task == "entailment" else None
        with SignalRecorder(self.model, tokens) as recorder:
            self._run(rows, NEVER)
        return recorder.signals

    def outputs(self, point: Setting) -> list[Prediction]:
        """The predictions of a point, from disk where they are."""
        if point.criterion == "oracle":
            full = self.outputs(self.settings[0])
            return self.processes.share(lambda: token_oracle(full, self._signals(self.rows)))
        shuffled = {"shuffled": point.shuffled} if point.shuffled else {}
        path = self.side_folder / f"{content_key([self.common, self.resolved[point.name], shuffled])}.jsonl"
        stored = self.processes.share(lambda: read_predictions(path))
        if stored is not None:
            return stored
        if point.shuffled is None:
            predictions = self._predict(self.rows, point.exits)
        else:
            reference = self.outputs(next(one for one in self.settings if one.name == point.shuffled))
            by_row: dict[int, Prediction] = {}
            for indices, exits in shuffled_depths(reference, self.model.config.modality_decomposition):
                by_row |= dict(zip(indices, self._predict(Subset(self.rows, indices), exits), strict=True))
            predictions = [by_row[index] for index in range(len(reference))]
        if self.processes.is_main:
            write_predictions(path, predictions)
        return predictions

    def records(self) -> Iterator[dict[str, Any]]:
        """The record of each point, measured unless the results file has it, full depth first."""
        points = [*self.settings, *([Setting("token oracle", "oracle", {})] if self.args.oracle else [])]
        quiet = len(points) == 1 or not self.processes.is_main
        for point in tqdm(points, desc="points", unit="point", disable=quiet):
            yield self._record(point)

    def _record(self, point: Setting) -> dict[str, Any]:
        oracle = point.criterion == "oracle"
        resolved = self.resolved.get(point.name)
        key = content_key([self.common, self.scoring, resolved, point.shuffled, oracle])
        # The same options may have had another name.
        names = {"name": point.name, "criterion": point.criterion, "against": self.against.name}
        for record in self.known:
            if record["key"] == key:
                return record | names
        start = time.time()
        predictions = [self.outputs(one) for one in (point, self.settings[0], self.against)]

        def measure() -> dict[str, Any]:
            record = {
                "key": key,
                **names,
                "exits": None if oracle else point.exits,
                "options": resolved,
                **self._figures(point, *predictions),
                "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
                "measuring_seconds": time.time() - start,
            }
            append_record(self.args.output, record)
            return record

        self.known.append(self.processes.share(measure))
        return self.known[-1]

    def _figures(self, point: Setting, own: Any, full: Any, against: Any) -> dict[str, Any]:
        """All that a record says about a point but its names; the predictions are those of [`Meter.figures`]."""
        args, timed = self.args, None
        runs = point.criterion != "oracle" and not point.shuffled
        figures = self.meter.figures(own, point.exits if runs else NEVER, full, against)
        if args.time_rows and runs:
            rows = list(_evenly(self.timed_rows, args.time_rows))
            timed = self.meter.time(rows, point.exits, batch_size=args.time_batch_size, repeats=args.time_repeats)
        return {
            # Unlike "weights" it stays the same where the configuration gets a new field.
            "weights_fingerprint": weights_fingerprint(self.model),
            "shuffled_depths_of": point.shuffled,
            "model": self.model.name_or_path,
            "source": {name: getattr(args, name) for name in ("data", "split", "limit", "thresholds_split")},
            "rows": len(full),
            "image_count": len({one.image_id for one in full}),
            # What words alone have learnt from.
            **({"words_from": [list(args.words_baseline), args.words_split]} if "words" in figures else {}),
            **self.common,
            **{name: value for name, value in self.scoring.items() if name != "against"},
            **figures,
            "time": timed,
            "environment": environment(self.model, args.batch_size)
            # Windows has no load average
            | {"processes": self.processes.count, "load_average": list(getattr(os, "getloadavg", list)())},
        }

    def draw(self, records: Sequence[Mapping[str, Any]], folder: str | os.PathLike) -> list[Path]:
        """Draws the records, and similarity by layer on up to 200 rows; see [`draw_plots`]."""
        path = self.side_folder / f"similarity-{content_key(self.common)}.json"
        if not path.exists():
            curves = similarity_curves(self._signals(_evenly(self.rows, 200)))
            write_whole(path, json.dumps(curves) + "\n")
        return draw_plots(records, folder, json.loads(path.read_text(encoding="utf-8")))


def _of_source(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the data that hold for the statements of words alone too: generated scenes have none."""
    return {} if source.startswith("scenes:") else dict(options)


def _known(options: ExitOptions) -> dict[str, Any]:
    """Options by name. Those that are newer than the first records are left out where they are not given, so that
    older records keep their keys."""
    newer = {"exit_candidates", "exit_fit"}
    return {name: value for name, value in asdict(options).items() if name not in newer or value is not None}


def _evenly(rows: Any, count: int) -> Any:
    """At most so many of the rows, evenly over them."""
    count = min(count, len(rows))
    return Subset(rows, [index * len(rows) // count for index in range(count)])


def _try_scores(metrics: Sequence[str], tokenizer: str) -> None:
    """Scores one caption: what is missing is found before hours of work."""
    try:
        caption_scores(["a dog"], [["a dog"]], metrics=metrics, tokenizer=tokenizer)
    except RuntimeError as error:
        raise ValueError(f'{error} Or pass other `metrics`, or "plain" as `tokenizer`.') from error


__all__ = ["Evaluation"]
