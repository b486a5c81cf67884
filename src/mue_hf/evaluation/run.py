"""`mue-hf evaluate`: what exits cost in quality and save in layers, FLOPs and time; a JSON record per setting."""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from ..cli.options import at_least, load_model, setting, thresholds
from ..data.features import cache_trunk_features, trunk_fingerprint
from ..files import write_whole
from ..inference.predict import TASKS, Prediction, predict
from ..metrics import caption_scores
from ..metrics.captions import METRICS, TOKENIZERS
from ..model.exit_options_mue import CONFIG_NAMES, resolve_options
from ..model.generation_mue import weights_fingerprint
from .measure import Meter, environment, similarity_curves, token_oracle
from .plots import draw_plots, main_score, require_matplotlib
from .processes import Processes, finish_processes
from .rows import ChosenRows, ControlledRows, EvaluationData, describe_rows, donors, load_rows
from .settings import SWEEPS, Setting, make_settings, similarity_levels
from .signals import SignalRecorder, Signals
from .store import content_key, read_predictions, write_predictions

EXAMPLE = """examples:
  mue-hf evaluate captioning --model CHECKPOINT --data captions.jsonl --preset balanced --output runs/captions.jsonl
  mue-hf evaluate entailment --model CHECKPOINT --data scenes:0:1250 --sweep all --levels-split dev \\
      --output runs/scenes.jsonl --plots runs/scenes-plots --table runs/scenes.md

Full depth is always measured, and every setting beside it. Points that the output file already has for the same
weights, data and options are not measured again, so an interrupted run goes on where it was.

Several processes share the rows: accelerate launch -m mue_hf.cli evaluate ... (with --device cuda one GPU each). Time
is that of the first process, while the others wait.

Layers skipped (R, as the paper counts it), FLOPs skipped and time are different things; all three are reported.
FLOPs are those of an output that is alone in its batch; under beam search the depths of the returned caption stand for
those of the other beams. Time is that of trunk, encoder and decoder without reading and resizing the image, in turns
with full depth on a part of the data."""


def sweep(text: str) -> tuple[str, Any]:
    """CRITERION, CRITERION=V,V,... with its thresholds, "all", or a JSON file of names and exit options."""
    if text.endswith(".json"):
        content = json.loads(Path(text).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(exits, dict) for exits in content.values()):
            raise argparse.ArgumentTypeError(f"{text} must hold an object of names and exit options")
        return "file", content
    name, equals, values = text.partition("=")
    if name not in (*SWEEPS, "all") or (equals and name in ("all", "fixed")):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(SWEEPS)}, all, or a .json file; got {text!r}")
    return name, [float(value) for value in values.split(",")] if equals else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf evaluate` takes."""
    parser.epilog = EXAMPLE
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: the small checkpoint, where it exists")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="rows per call (default: 16)")
    parser.add_argument("--num-beams", type=at_least(1), metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--max-new-tokens", type=at_least(1), metavar="N", help="default: the checkpoint's own")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="JSONL, JSON, CSV or parquet file, folder, Hub id, or scenes:SEED:COUNT for generated scenes",
    )
    data.add_argument("--split", default="test", help="which rows; all for every one (default: test)")
    data.add_argument("--limit", type=at_least(1), metavar="N", help="the first N rows alone")
    data.add_argument(
        "--data-option",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of load_captioning or load_entailment, e.g. image_root=photos; may be repeated",
    )
    data.add_argument("--kind-column", metavar="NAME", help="column with the kind of a statement, for figures by kind")
    data.add_argument("--features", metavar="DIR", help="folder where the trunk's features are cached")
    data.add_argument("--no-premise", action="store_true", help="entailment from image and hypothesis alone")
    data.add_argument(
        "--images",
        choices=["own", "shuffled", "none"],
        default="own",
        help="control runs of entailment: every image in another one's place, or no images (default: own)",
    )
    data.add_argument(
        "--prompt-type",
        choices=["prev_output", "none"],
        default="prev_output",
        help="what the decoder reads before an answer: the prompt, or <s> alone (default: prev_output)",
    )

    exits = parser.add_argument_group(
        "settings",
        "Thresholds and --generate options alone are one point; beside --sweep they hold for all of its points but\n"
        "fixed depths. A threshold is one number, or one per layer with commas between them.",
    )
    exits.add_argument("--preset", action="append", default=[], metavar="NAME", help="may be repeated")
    for stream in ("image", "text", "encoder", "decoder"):
        note = ", for checkpoints with a joint one" if stream == "encoder" else ""
        exits.add_argument(f"--{stream}-threshold", type=thresholds, metavar="T", help=f"of the {stream}{note}")
    exits.add_argument(
        "--generate",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of generate, exits or not, e.g. exit_kv=exact; may be repeated",
    )
    exits.add_argument(
        "--sweep",
        type=sweep,
        action="append",
        default=[],
        metavar="CRITERION[=V,V,...]",
        help=f"{', '.join(SWEEPS)}, all, or a .json file with an object of names and exit options; may be repeated",
    )
    exits.add_argument(
        "--levels-split",
        metavar="SPLIT",
        help="take the similarity thresholds from what the layers say on this split of the data, also one per layer",
    )
    exits.add_argument("--levels", type=at_least(1), default=6, metavar="N", help="how many of these (default: 6)")
    exits.add_argument("--levels-rows", type=at_least(1), default=200, metavar="N", help="rows for it (default: 200)")
    exits.add_argument(
        "--random",
        action="append",
        default=[],
        metavar="NAME",
        help="deal the depths of that point out at random, one decoder depth per row; may be repeated",
    )
    exits.add_argument("--oracle", action="store_true", help="the token oracle; needs greedy decoding")

    scores = parser.add_argument_group("scores")
    scores.add_argument(
        "--metrics",
        default="bleu,meteor,rouge_l,cider",
        metavar="NAME,...",
        help=f"of captions: {', '.join(METRICS)} (default: bleu,meteor,rouge_l,cider)",
    )
    scores.add_argument(
        "--tokenizer", choices=TOKENIZERS, default="ptb", help="of captions (default: ptb, needs Java)"
    )
    scores.add_argument("--resamples", type=at_least(1), default=1000, metavar="N", help="for intervals (1000)")
    scores.add_argument(
        "--against", default="full depth", metavar="NAME", help="point to take differences to (default: full depth)"
    )
    scores.add_argument("--time-rows", type=at_least(0), default=20, metavar="N", help="rows to time; 0: none (20)")
    scores.add_argument("--time-batch-size", type=at_least(1), default=1, metavar="N", help="default: 1")
    scores.add_argument("--time-repeats", type=at_least(1), default=5, metavar="N", help="default: 5")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="records are added to it; outputs by row go to a folder beside it",
    )
    output.add_argument("--table", type=Path, metavar="FILE.md", help="write the table there too")
    output.add_argument("--plots", type=Path, metavar="DIR", help="draw plots there")
    output.add_argument("--json", action="store_true", help="records on stdout in place of the table")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; a last line that an interruption cut is dropped.

    Raises:
        ValueError: if a line is no record; nothing is dropped then.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.decode().splitlines(), 1):
        try:
            records.append(json.loads(line))
            records[-1]["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`--output` must hold records, got in line {number} of {path}: {error}.") from error
    cut, start = content[len(whole) :], b'{"key"'
    if cut and not start.startswith(cut[: len(start)]):
        raise ValueError(f"`--output` must hold records, got something else at the end of {path}; name another file.")
    if cut:
        os.truncate(path, len(whole))
    return records


class Evaluation:
    """One run of the command: model, data and what all of its points have in common."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.output.suffix != ".jsonl":
            raise ValueError(f"`--output` must be a .jsonl file, got {str(args.output)!r}; rename it.")
        if args.plots is not None:
            require_matplotlib()
        if args.task == "captioning" and (args.no_premise or args.images != "own" or args.prompt_type == "none"):
            raise ValueError("`--no-premise`, `--images` and `--prompt-type` belong to entailment; drop them.")
        self.processes = Processes.start(args.device)
        args.device = self.processes.device
        self.records = self.processes.share(lambda: read_records(args.output))
        self.model, self.processor = load_model(args)
        if args.sweep:
            _forget_saved_exits(self.model.generation_config)
        self.decoding = self._decoding()
        self.settings = self._settings()
        self.against = next((point for point in self.settings if point.name == args.against), None)
        if self.against is None:
            names = [point.name for point in self.settings]
            raise ValueError(f"`--against` must name a point of this run, got {args.against!r}; they are {names}.")
        self.saved = self.model.generation_config.to_dict()
        # A wrong option is found before the first point is run.
        self.resolved = {
            point.name: asdict(resolve_options(point.exits, {}, self.saved, self.model.config))
            for point in self.settings
        }
        metrics = [name.strip() for name in args.metrics.split(",")]
        if args.task == "captioning":
            _try_scores(metrics, args.tokenizer)
        data = describe_rows(self._load(args.split, args.limit))
        self.raw, self.rows = self._rows(data)
        options = (self.decoding, args.prompt_type, metrics, args.tokenizer, args.resamples)
        self.meter = Meter(self.model, self.processor, args.task, data.fields, *options)
        self.common = {
            "task": args.task,
            "weights": trunk_fingerprint(self.model),
            "data": data.fingerprint,
            "decoding": {name: value for name, value in self.saved.items() if "exit" not in name} | self.decoding,
            "processor": self.processor.image_processor.to_dict(),
            "prompt_type": args.prompt_type,
            "premise": not args.no_premise,
            "images": args.images,
            "dtype": args.dtype,
        }
        for name in ("transformers_version", "_from_model_config"):
            self.common["decoding"].pop(name, None)
        self.scoring = {
            "metrics": metrics if args.task == "captioning" else ["accuracy"],
            "tokenizer": args.tokenizer if args.task == "captioning" else None,
            "resamples": args.resamples,
            "timing": [args.time_rows, args.time_batch_size, args.time_repeats],
            "against": self.resolved[self.against.name],
        }

    def _decoding(self) -> dict[str, Any]:
        args = self.args
        decoding = {name: value for name, value in args.generate if name not in CONFIG_NAMES}
        for name in ("num_beams", "max_new_tokens"):
            if getattr(args, name) is not None:
                decoding[name] = getattr(args, name)
        if args.task == "entailment" and decoding:
            raise ValueError(f"Options of decoding belong to captioning, got {sorted(decoding)}; drop them.")
        beams = decoding.get("num_beams") or self.model.generation_config.num_beams or 1
        if args.oracle and args.task == "captioning" and beams > 1:
            raise ValueError(f"`--oracle` needs greedy decoding, got {beams} beams; pass `--num-beams 1`.")
        return decoding

    def _settings(self) -> list[Setting]:
        args = self.args
        base = {
            f"{stream}_exit_threshold": getattr(args, f"{stream}_threshold")
            for stream in ("image", "text", "encoder", "decoder")
            if getattr(args, f"{stream}_threshold") is not None
        }
        base |= {name: value for name, value in args.generate if name in CONFIG_NAMES}
        levels = None
        if args.levels_split:
            rows = self._load(args.levels_split, args.levels_rows)
            rows = ControlledRows(rows, not args.no_premise, None, True)
            levels = self.processes.share(lambda: similarity_levels(self._signals(rows), args.levels))
        return make_settings(
            self.model.config,
            presets=args.preset,
            sweeps=[one for one in args.sweep if one[0] != "file"],
            chosen={label: exits for name, file in args.sweep if name == "file" for label, exits in file.items()},
            base=base,
            levels=levels,
            random_like=args.random,
        )

    def _load(self, split: str, limit: int | None) -> Any:
        args = self.args
        options = {"limit": limit, "kind_column": args.kind_column} | dict(args.data_option)
        return load_rows(args.task, args.data, split, **options)

    def _rows(self, data: EvaluationData) -> tuple[ControlledRows, ControlledRows]:
        """The rows to time, with images, and those to predict, maybe with the trunk's features."""
        args = self.args
        chosen = donors([row["image_id"] for row in data.fields]) if args.images == "shuffled" else None
        rows = data.rows
        if args.features is not None:
            # In float32 nothing but the batch of the trunk differs from running it.
            options = {"dtype": torch.float32, "batch_size": args.batch_size}
            with self.processes.main_first():
                rows = cache_trunk_features(self.model, self.processor, rows, args.features, **options)
        return tuple(
            ControlledRows(some, not args.no_premise, chosen, args.images != "none") for some in (data.rows, rows)
        )

    def _predict(self, rows: Any, exits: Mapping[str, Any]) -> list[Prediction]:
        """Predictions of `rows`, made by all processes."""
        part = self.processes.part(len(rows))
        cut = {
            name: value[part.start : part.stop] if isinstance(value, Tensor) else value
            for name, value in exits.items()
        }
        return self.processes.gather(self._run(ChosenRows(rows, part), cut) if part else [])

    def _run(self, rows: Any, exits: Mapping[str, Any]) -> list[Prediction]:
        """Predictions of `rows`, made by this process."""
        args = self.args
        options = self.decoding | dict(exits)
        return predict(
            self.model,
            self.processor,
            rows,
            args.task,
            options,
            batch_size=args.batch_size,
            prompt_type=args.prompt_type,
            progress=self.processes.is_main,
        )

    def _signals(self, rows: Any) -> Signals:
        """What the layers say about `rows` at full depth, in this process."""
        tokens = None
        if self.args.task == "entailment":
            answers = self.processor.encode_answers(list(self.processor.entailment_answers.values()))
            tokens = [token for answer in answers for token in answer]
        with SignalRecorder(self.model, tokens) as recorder:
            self._run(rows, {"exit_criterion": "never"})
        return recorder.signals

    @property
    def side_folder(self) -> Path:
        return self.args.output.with_suffix("")

    def outputs(self, point: Setting) -> list[Prediction]:
        """The predictions of a point, from disk where they are."""
        random_depths = {"random_like": point.like} if point.like else {}
        path = self.side_folder / f"{content_key([self.common, self.resolved[point.name], random_depths])}.jsonl"
        stored = self.processes.share(lambda: read_predictions(path))
        if stored is not None:
            return stored
        if point.like is None:
            predictions = self._predict(self.rows, point.exits)
        else:
            reference = next(one for one in self.settings if one.name == point.like)
            predictions = self._random(self.outputs(reference))
        if self.processes.is_main:
            write_predictions(path, predictions)
        return predictions

    def _random(self, reference: Sequence[Prediction]) -> list[Prediction]:
        """Predictions at the depths of `reference`, dealt out at random: the image's among images, the text's among
        rows, and for each row one decoder depth out of those of all tokens."""
        rng = random.Random(0)
        images = {one.image_id: one.image_exit_layers for one in reference}
        dealt = dict(zip(images, rng.sample(list(images.values()), len(images)), strict=True))
        text = rng.sample([one.text_exit_layers for one in reference], len(reference))
        tokens = [depth for one in reference for depth in one.decoder_exit_layers]
        groups: dict[int, list[int]] = {}
        for index in range(len(reference)):
            groups.setdefault(rng.choice(tokens), []).append(index)
        predictions: list[Any] = [None] * len(reference)
        decomposed = self.model.config.modality_decomposition
        for depth, indices in groups.items():
            # A row without the stream has depth 0, which no layer can have; what is passed for it does not matter.
            image = torch.tensor([max(dealt[reference[index].image_id], 1) for index in indices])
            exits = {"exit_criterion": "fixed", "decoder_exit_layer": depth}
            if decomposed:
                exits |= {"image_exit_layer": image, "text_exit_layer": torch.tensor([text[i] for i in indices])}
            else:
                exits["encoder_exit_layer"] = torch.tensor([max(text[i], 1) for i in indices])
            for index, one in zip(indices, self._predict(ChosenRows(self.rows, indices), exits), strict=True):
                predictions[index] = one
        return predictions

    def record(self, point: Setting, full: Sequence[Prediction]) -> dict[str, Any]:
        """The record of a point, measured unless the results file has it."""
        oracle = point.criterion == "oracle"
        key = content_key([self.common, self.scoring, self.resolved.get(point.name), point.like, oracle])
        for record in self.records:
            if record["key"] == key:
                # The same options may have had another name.
                return record | self._names(point)
        start = time.time()
        predictions = None if oracle else self.outputs(point)
        against = self.outputs(self.against)
        record = self.processes.share(lambda: self._measured(point, key, start, predictions, full, against))
        self.records.append(record)
        return record

    def _names(self, point: Setting) -> dict[str, str]:
        return {"name": point.name, "criterion": point.criterion, "against": self.against.name}

    def _measured(
        self,
        point: Setting,
        key: str,
        start: float,
        predictions: Sequence[Prediction] | None,
        full: Sequence[Prediction],
        against: Sequence[Prediction],
    ) -> dict[str, Any]:
        """The record of a point that was begun at `start`, also added to the file; no predictions for the oracle."""
        args, oracle = self.args, predictions is None
        if oracle:
            predictions = token_oracle(full, self._signals(self.rows))
        measured_exits = {"exit_criterion": "never"} if point.like or oracle else point.exits
        figures = self.meter.figures(predictions, measured_exits, full, against)
        timed = None
        if args.time_rows and not (point.like or oracle):
            count = min(args.time_rows, len(self.raw))
            # Evenly over the data.
            some = [self.raw[index * len(self.raw) // count] for index in range(count)]
            options = {"batch_size": args.time_batch_size, "repeats": args.time_repeats}
            timed = self.meter.time(some, point.exits, **options)
        record = {
            "key": key,
            **self._names(point),
            "exits": None if oracle else point.exits,
            # What a preset's name stood for.
            "options": self.resolved.get(point.name),
            # Unlike "weights" it stays the same where the configuration gets a new field.
            "weights_fingerprint": weights_fingerprint(self.model),
            "random_like": point.like,
            "model": self.model.name_or_path,
            "source": {
                "data": args.data,
                "split": args.split,
                "limit": args.limit,
                "levels_split": args.levels_split,
            },
            "rows": len(full),
            "image_count": len({one.image_id for one in full}),
            **self.common,
            **{name: value for name, value in self.scoring.items() if name != "against"},
            **figures,
            "time": timed,
            "environment": environment(self.model, args.batch_size)
            # Windows has no load average
            | {"processes": self.processes.count, "load_average": list(getattr(os, "getloadavg", list)())},
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
            "measuring_seconds": time.time() - start,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
        return record

    def run(self) -> list[dict[str, Any]]:
        """Measures every point, and draws."""
        args = self.args
        full = self.outputs(self.settings[0])
        points = list(self.settings)
        if args.oracle:
            points.append(Setting("token oracle", "oracle", {}))
        records = []
        quiet = len(points) == 1 or not self.processes.is_main
        for point in tqdm(points, desc="points", unit="point", disable=quiet):
            records.append(self.record(point, full))
            if args.json and self.processes.is_main:
                sys.stdout.write(json.dumps(records[-1]) + "\n")
                sys.stdout.flush()
        if args.plots is not None and self.processes.is_main:
            draw_plots(records, args.plots, self._curves())
        return records

    def _curves(self) -> dict[str, Any]:
        """Similarity by layer on up to 200 rows, from disk where it is."""
        path = self.side_folder / f"similarity-{content_key(self.common)}.json"
        if not path.exists():
            count = min(200, len(self.rows))
            chosen = ChosenRows(self.rows, [index * len(self.rows) // count for index in range(count)])
            write_whole(path, json.dumps(similarity_curves(self._signals(chosen))) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))


def _forget_saved_exits(config: GenerationConfig) -> None:
    """Takes exits that are saved with a checkpoint out of `config`, so that each point of a sweep is what its name
    says; presets and costs stay."""
    for name in CONFIG_NAMES - {"exit_presets", "exit_costs"}:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)


def _try_scores(metrics: Sequence[str], tokenizer: str) -> None:
    """Scores one caption: what is missing is found before hours of work."""
    try:
        caption_scores(["a dog"], [["a dog"]], metrics=metrics, tokenizer=tokenizer)
    except RuntimeError as error:
        raise ValueError(f"{error} Or pass other `--metrics`, or `--tokenizer plain`.") from error


def make_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The points as a table in markdown, scores with 95 % intervals."""
    score = main_score(records[0])
    others = [name for name in records[0]["quality"] if name.startswith(("bleu_4", "meteor", "rouge", "spice"))]
    head = [
        "point",
        score,
        f"difference to {records[0]['against']}",
        *others,
        "identical",
        "layers image / text / token",
        "R mean / sum / without text",
        "FLOPs skipped (without trunk)",
        "speed-up",
        "tokens",
    ]
    lines = [head, ["---"] * len(head)]
    for record in records:
        quality, depth, skipped, flops, taken = (
            record[name] for name in ("quality", "depth", "layers_skipped", "flops", "time")
        )
        low, high = record["intervals"][score]
        same_low, same_high = record["identical_interval"]
        reductions = " / ".join(
            "-" if skipped[name] is None else f"{skipped[name]:.1%}" for name in ("mean", "sum", "without_text")
        )
        speed = "-"
        if taken:
            speed = "{:.2f} [{:.2f}, {:.2f}]".format(taken["speedup"], *taken["speedup_interval"])
        lines.append(
            [
                record["name"],
                f"{quality[score]:.3f} [{low:.3f}, {high:.3f}]",
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(record["difference"]["mean"], *record["difference"]["interval"]),
                *(f"{quality[name]:.3f}" for name in others),
                f"{record['identical']:.3f} [{same_low:.3f}, {same_high:.3f}]",
                f"{depth['image']:.2f} / {depth['text']:.2f} / {depth['decoder']:.2f}",
                reductions,
                f"{flops['skipped']:.1%} ({flops['skipped_without_trunk']:.1%})",
                speed,
                f"{record['length']['tokens']:.1f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_environment(record: Mapping[str, Any]) -> tuple[str, str]:
    """What a record was measured on, and with which versions, in words."""
    environment = record["environment"]
    machine = environment["hardware"]
    if environment["device"] == "cpu":
        machine += f", threads: {environment['threads']}"
    return machine, ", ".join(f"{name} {value}" for name, value in environment["versions"].items())


def describe_records(records: Sequence[Mapping[str, Any]], names: int = 3) -> str:
    """What stands below the table: data, machine and versions, and of the presets (else of the first point that does
    not give all images the same depth) the images that needed least and most."""
    first = records[0]
    machine, versions = describe_environment(first)
    loads = [load[0] for record in records if (load := record["environment"].get("load_average"))]
    source = f"Split {first['source']['split']} of {first['source']['data']}"
    rows = f"{first['rows']} rows of {first['image_count']} images"
    lines = [f"{source}, {rows}; {first['dtype']}, {machine}; {versions}."]
    if loads:
        lines.append(f"Load average between {min(loads):.1f} and {max(loads):.1f}.")
    told = [one for one in records if one["easiest"][0]["depth"] < one["hardest"][0]["depth"]]
    for record in [one for one in told if one["criterion"] == "presets"] or told[:1]:
        ends = (
            f"{end}: " + ", ".join(f"{one['image_id']} ({one['depth']:.1f})" for one in record[end][:names])
            for end in ("easiest", "hardest")
        )
        what = f"{record['name']}, images by layers of the encoder (mean of streams) and of the decoder"
        lines.append(f"{what}; {'; '.join(ends)}.")
    return "\n\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Measures the points that are missing, and prints all of them.

    Returns:
        `int`: 0.
    """
    evaluation = Evaluation(args)
    records = evaluation.run()
    finish_processes()
    if not evaluation.processes.is_main:
        return 0
    table = f"{make_table(records)}\n\n{describe_records(records)}\n"
    if args.table is not None:
        write_whole(args.table, table)
    if not args.json:
        sys.stdout.write(table)
    return 0


__all__ = ["add_arguments", "describe_environment", "describe_records", "make_table", "read_records", "run"]
