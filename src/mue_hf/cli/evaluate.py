"""`mue-hf evaluate`: what exits cost in quality and save in layers, FLOPs and time; a JSON record per setting."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..evaluation.arguments import EvaluationArguments
from ..evaluation.plots import require_matplotlib
from ..evaluation.processes import Processes, finish_processes
from ..evaluation.run import Evaluation
from ..evaluation.settings import known_sweeps, sets_depths
from ..evaluation.tables import describe_records, make_table
from ..files import write_whole
from ..inference.predict import TASKS
from ..metrics.captions import METRICS, TOKENIZERS
from .options import (
    RenamedOption,
    add_decoding_arguments,
    add_generate_argument,
    add_model_arguments,
    add_threshold_arguments,
    at_least,
    decoding_options,
    given_exits,
    load_model,
    names,
    setting,
)

DEFAULT_METRICS = "bleu,meteor,rouge_l,cider"
EXAMPLE = """examples:
  mue-hf evaluate captioning --model CHECKPOINT --data captions.jsonl --preset balanced --output runs/captions.jsonl
  mue-hf evaluate entailment --model CHECKPOINT --data scenes:0:1250 --sweep all --thresholds-split dev \\
      --output runs/scenes.jsonl --plots runs/scenes-plots --table runs/scenes.md

Full depth is always measured, and every setting beside it. Points that the output file already has for the same
weights, data and options are not measured again, so an interrupted run goes on where it was.

Several processes share the rows: accelerate launch -m mue_hf.cli evaluate ... (with --device cuda one GPU each). Time
is that of the first process, while the others wait.

Layers skipped (R, as the paper counts it), FLOPs skipped and time are different things; all three are reported.
FLOPs are those of an output that is alone in its batch; under beam search the depths of the returned caption stand for
those of the other beams. Time is that of trunk, encoder and decoder without reading and resizing the image, in turns
with full depth on a part of the data."""


class RenamedList(RenamedOption):
    """A renamed option that may be repeated."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, [*getattr(namespace, self.dest), values], option_string)


def sweep(text: str) -> tuple[str, Any]:
    """CRITERION, CRITERION=V,V,... with its values, "all", or a JSON file of names and exit options."""
    if text.endswith(".json"):
        content = json.loads(Path(text).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(exits, dict) for exits in content.values()):
            raise argparse.ArgumentTypeError(f"{text} must hold an object of names and exit options")
        return "file", content
    name, equals, values = text.partition("=")
    sweeps = known_sweeps()
    # Depths that are given are all tried.
    if name not in (*sweeps, "all") or (equals and (name == "all" or sets_depths(sweeps[name].criterion))):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(sweeps)}, all, or a .json file; got {text!r}")
    return name, [json.loads(value) for value in values.split(",")] if equals else None


def point_name(text: str) -> str:
    """The name of a point; those of 0.1 said "level" for what is "thresholds" now."""
    return text.replace(", level ", ", thresholds ")


def add_data_arguments(parser: argparse.ArgumentParser, split: str, features: str, fewest: int = 1) -> Any:
    """Declares what says which rows are read, and how the decoder reads them; returns the group."""
    data = parser.add_argument_group("data")
    sources = "JSONL, JSON, CSV or parquet file, folder, Hub id, or scenes:SEED:COUNT for generated scenes"
    data.add_argument("--data", required=True, metavar="SOURCE", help=sources)
    data.add_argument("--split", default=split, help=f"which rows; all for every one (default: {split})")
    data.add_argument("--limit", type=at_least(fewest), metavar="N", help="the first N rows alone")
    repeated: dict[str, Any] = {"dest": "data_options", "type": setting, "action": "append", "default": []}
    loader = "of load_captioning or load_entailment, e.g. image_root=photos; may be repeated"
    data.add_argument("--data-option", **repeated, metavar="NAME=VALUE", help=loader)
    data.add_argument("--features", metavar="DIR", help=f"folder where the trunk's features are cached{features}")
    prompts = "what the decoder reads before an answer: the prompt, or <s> alone (default: prev_output)"
    data.add_argument("--prompt-type", choices=["prev_output", "none"], default="prev_output", help=prompts)
    return data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf evaluate` takes; most of it becomes the fields of [`EvaluationArguments`]."""
    parser.epilog = EXAMPLE
    parser.add_argument("task", choices=TASKS)
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="rows per call (default: 16)")
    add_decoding_arguments(parser)
    data = add_data_arguments(parser, "test", "")
    data.add_argument("--kind-column", metavar="NAME", help="column with the kind of a statement, for figures by kind")
    without = "entailment from image and hypothesis alone"
    data.add_argument("--no-premise", dest="premise", action="store_false", help=without)
    images = "control runs of entailment: every image in another one's place, or no images (default: own)"
    data.add_argument("--images", choices=["own", "shuffled", "none"], default="own", help=images)
    taught = "statements that a bag of words learns from, without images; its accuracy is put beside the model's"
    words: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "SOURCE"}
    data.add_argument("--words-baseline", **words, help=taught)
    data.add_argument("--words-split", default="train", metavar="SPLIT", help="which of them (default: train)")
    _add_setting_arguments(parser)
    scores = parser.add_argument_group("scores")
    known = f"of captions: {', '.join(METRICS)} (default: {DEFAULT_METRICS})"
    scores.add_argument("--metrics", type=names, default=names(DEFAULT_METRICS), metavar="NAME,...", help=known)
    tokenizer = "of captions (default: ptb, needs Java)"
    scores.add_argument("--tokenizer", choices=TOKENIZERS, default="ptb", help=tokenizer)
    scores.add_argument("--resamples", type=at_least(1), default=1000, metavar="N", help="for intervals (1000)")
    against: dict[str, Any] = {"type": point_name, "default": "full depth", "metavar": "NAME"}
    scores.add_argument("--against", **against, help="point to take differences to (default: full depth)")
    scores.add_argument("--time-rows", type=at_least(0), default=20, metavar="N", help="rows to time; 0: none (20)")
    scores.add_argument("--time-batch-size", type=at_least(1), default=1, metavar="N", help="default: 1")
    scores.add_argument("--time-repeats", type=at_least(1), default=5, metavar="N", help="default: 5")
    output = parser.add_argument_group("output")
    added = "records are added to it; outputs by row go to a folder beside it"
    output.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help=added)
    output.add_argument("--table", type=Path, metavar="FILE.md", help="write the table there too")
    output.add_argument("--plots", type=Path, metavar="DIR", help="draw plots there")
    output.add_argument("--json", action="store_true", help="records on stdout in place of the table")


def _add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    exits = parser.add_argument_group(
        "settings",
        "Thresholds and --generate options alone are one point; beside --sweep they hold for all of its points but\n"
        "fixed depths. A threshold is one number, or one per layer with commas between them.",
    )
    repeated: dict[str, Any] = {"action": "append", "default": []}
    exits.add_argument("--preset", dest="presets", **repeated, metavar="NAME", help="may be repeated")
    add_threshold_arguments(exits)
    add_generate_argument(exits, "any other option of generate, exits or not, e.g. exit_kv=exact; may be repeated")
    known = f"{', '.join(known_sweeps())}, all, or a .json file with an object of names and exit options; repeatable"
    exits.add_argument("--sweep", type=sweep, **repeated, metavar="CRITERION[=V,V,...]", help=known)
    split = "take the similarity thresholds from what the layers say on this split of the data, also one per layer"
    exits.add_argument("--thresholds-split", metavar="SPLIT", help=split)
    count: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
    exits.add_argument("--num-thresholds", **count, default=6, help="how many of these (default: 6)")
    exits.add_argument("--thresholds-rows", **count, default=200, help="rows for it (default: 200)")
    shuffled = "a baseline: the depths of that point shuffled, one decoder depth per row; may be repeated"
    exits.add_argument("--shuffled-depths", type=point_name, **repeated, metavar="NAME", help=shuffled)
    old: dict[str, Any] = {"action": RenamedOption, "help": argparse.SUPPRESS}
    exits.add_argument("--levels-split", dest="thresholds_split", **old)
    exits.add_argument("--levels", dest="num_thresholds", **count, **old)
    exits.add_argument("--levels-rows", dest="thresholds_rows", **count, **old)
    exits.add_argument("--random", dest="shuffled_depths", type=point_name, **old | {"action": RenamedList})
    exits.add_argument("--oracle", action="store_true", help="the token oracle; needs greedy decoding")


def _arguments(args: argparse.Namespace) -> EvaluationArguments:
    known = {field.name for field in fields(EvaluationArguments)}
    same = {name: value for name, value in vars(args).items() if name in known}
    others = {
        "data_options": dict(args.data_options),
        "decoding": decoding_options(args),
        "exits": given_exits(args),
        "sweeps": [one for one in args.sweep if one[0] != "file"],
        "chosen": {label: exits for name, file in args.sweep if name == "file" for label, exits in file.items()},
    }
    return EvaluationArguments(**same | others)


def run(args: argparse.Namespace) -> int:
    """Measures the points that are missing, and prints all of them; the exit code is 0."""
    arguments = _arguments(args)
    if args.plots is not None:
        require_matplotlib()
    processes = Processes.start(args.device)
    args.device = processes.device
    evaluation = Evaluation(*load_model(args), arguments, processes)
    records = []
    for record in evaluation.records():
        records.append(record)
        if args.json and processes.is_main:
            print(json.dumps(record), flush=True)
    if args.plots is not None and processes.is_main:
        evaluation.draw(records, args.plots)
    finish_processes()
    if not processes.is_main:
        return 0
    table = f"{make_table(records)}\n\n{describe_records(records)}\n"
    if args.table is not None:
        write_whole(args.table, table)
    if not args.json:
        print(table, end="")
    return 0


__all__ = ["add_arguments", "add_data_arguments", "run"]
