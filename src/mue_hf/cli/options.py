"""Options that several commands share, and what they say to the rest of the package."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..inference.audit import REACTIONS
from ..inference.loading import DEFAULT_PRESET, SMALL_CHECKPOINT, load_checkpoint
from ..model.criteria_mue import THRESHOLD_OPTIONS
from ..model.engine_mue import ENGINES
from ..model.exit_options_mue import CONFIG_NAMES
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor


def thresholds(text: str) -> float | list[float]:
    """One number, or one per layer with commas between them."""
    values = [float(value) for value in text.split(",")]
    return values[0] if len(values) == 1 else values


def at_least(minimum: int) -> Any:
    """An argparse type: an integer that is not below `minimum`."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return int(text)

    return integer


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is read as JSON where it is JSON and is a string otherwise."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


class RenamedOption(argparse.Action):
    """An option under its old name, with a warning; `dest` is the new one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        new = f"--{self.dest.replace('_', '-')}"
        print(f"{parser.prog}: {option_string} is now {new}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_model_arguments(parser: Any) -> None:
    """Which model runs, and how: what [`load_model`] reads."""
    parser.add_argument("--model", help=f"checkpoint folder or Hub id; default: {SMALL_CHECKPOINT}, where it exists")
    add_device_arguments(parser)
    add_engine_argument(parser)


def add_device_arguments(parser: Any) -> None:
    """Where a model runs, in what precision, with how many threads."""
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's own)")


def add_engine_argument(parser: Any) -> None:
    """What runs a model."""
    engine = "what runs the model (default: torch); onnxruntime needs a folder that `mue-hf export` wrote"
    parser.add_argument("--engine", choices=["torch", *ENGINES], default="torch", help=engine)


def add_exit_arguments(parser: argparse.ArgumentParser, note: str = "") -> None:
    """When to exit, and other options of the model's call."""
    default = f"Without any of these the preset {DEFAULT_PRESET!r} is used where the checkpoint has it."
    number = "A threshold is one number, or one per layer with commas between them."
    exits = parser.add_argument_group("exits", f"{default}\n{number}")
    exits.add_argument("--preset", metavar="NAME", help="exit settings by name, see exit_presets of the checkpoint")
    add_threshold_arguments(exits)
    add_generate_argument(exits, f"any other option{note}, e.g. exit_criterion=confidence; may be repeated")


def add_threshold_arguments(parser: Any) -> None:
    """A threshold for each stream; with `--generate`, what [`given_exits`] reads."""
    for stream in THRESHOLD_OPTIONS:
        joint = ", for checkpoints with a joint one" if stream == "encoder" else ""
        parser.add_argument(f"--{stream}-threshold", type=thresholds, metavar="T", help=f"of the {stream}{joint}")


def add_generate_argument(parser: Any, note: str) -> None:
    """Options of the model's call by name."""
    parser.add_argument("--generate", type=setting, action="append", default=[], metavar="NAME=VALUE", help=note)


def add_decoding_arguments(parser: Any) -> None:
    """How captions are decoded, exits aside: what [`decoding_options`] reads besides `--generate`."""
    parser.add_argument("--num-beams", type=at_least(1), metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--max-new-tokens", type=at_least(1), metavar="N", help="default: the checkpoint's own")


def add_bulk_arguments(group: Any, known: Sequence[str]) -> None:
    """Where rows of bulk work come from and go to, besides the sources and --out."""
    listed: dict[str, Any] = {"type": names, "default": [], "metavar": "A,B"}
    workers = "processes that decode images (default: 1)"
    root = "of relative paths in a list or table (default: its own folder)"
    ray = "work in actors on a Ray cluster, or without an address on a local one (needs the extra ray)"
    group.add_argument("--overwrite", action="store_true", help="start anew where the file, or a part of it, exists")
    group.add_argument("--workers", type=at_least(0), default=1, metavar="N", help=workers)
    group.add_argument("--columns", **listed, help=f"further columns, of {', '.join(known)}")
    group.add_argument("--keep", **listed, help="columns of a table to keep")
    group.add_argument("--image-column", metavar="NAME", help="of a table (default: image, file_name, path, ...)")
    group.add_argument("--image-root", metavar="DIR", help=root)
    group.add_argument("--split", default="train", help="of a data set of the Hub (default: train)")
    group.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help=ray)
    audit = "share of the rows, in (0, 1], to run again at full depth: how many outputs do exits change?"
    drift = "once audits refute the preset's budget: warn (default), stop, or go on at full depth"
    group.add_argument("--audit", type=float, metavar="SHARE", help=audit)
    group.add_argument("--audit-seed", type=int, metavar="N", help="another one draws other rows (default: 0)")
    group.add_argument("--on-drift", choices=REACTIONS, help=drift)
    group.add_argument("--actors", type=at_least(1), default=1, metavar="N", help="with --ray: models (default: 1)")


def load_model(args: argparse.Namespace) -> tuple[MuEForConditionalGeneration, MuEProcessor]:
    """Model and processor that the arguments of [`add_model_arguments`] name; see [`load_checkpoint`]."""
    where = {name: getattr(args, name) for name in ("device", "dtype", "threads", "engine")}
    return load_checkpoint(args.model, **where)


def given_exits(args: argparse.Namespace) -> dict[str, Any]:
    """The exit options that the arguments give one by one."""
    given = {option: getattr(args, f"{stream}_threshold") for stream, option in THRESHOLD_OPTIONS.items()}
    options = {option: value for option, value in given.items() if value is not None}
    return options | {name: value for name, value in args.generate if name in CONFIG_NAMES}


def exit_options(args: argparse.Namespace, model: MuEForConditionalGeneration) -> dict[str, Any]:
    """The exit options of `generate` that the arguments of [`add_exit_arguments`] ask for; says so if none."""
    options = given_exits(args)
    if args.preset is not None:
        options["exit_preset"] = args.preset
    if not options and DEFAULT_PRESET in (getattr(model.generation_config, "exit_presets", None) or {}):
        options["exit_preset"] = DEFAULT_PRESET
    if not options:
        print("mue-hf: no exits are set; pass --preset or a threshold", file=sys.stderr)
    return options


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate` besides exits that the arguments ask for."""
    given = {name: getattr(args, name, None) for name in ("num_beams", "max_new_tokens")}
    options = {name: value for name, value in args.generate if name not in CONFIG_NAMES}
    return options | {name: value for name, value in given.items() if value is not None}


__all__ = [
    "RenamedOption",
    "add_bulk_arguments",
    "add_decoding_arguments",
    "add_device_arguments",
    "add_engine_argument",
    "add_exit_arguments",
    "add_generate_argument",
    "add_model_arguments",
    "add_threshold_arguments",
    "at_least",
    "decoding_options",
    "exit_options",
    "given_exits",
    "load_model",
    "names",
    "setting",
]
