"""Options that several commands share, and what they say to the rest of the package."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..inference.loading import SMALL_CHECKPOINT, load_checkpoint
from ..model.exit_options_mue import CONFIG_NAMES
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor

DEFAULT_PRESET = "balanced"


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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model runs, and how."""
    parser.add_argument("--model", help=f"checkpoint folder or Hub id; default: {SMALL_CHECKPOINT}, where it exists")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's own)")


def add_exit_arguments(parser: argparse.ArgumentParser, note: str = "") -> None:
    """When to leave, and other options of the model's call."""
    exits = parser.add_argument_group(
        "exits",
        f"Without any of these the preset {DEFAULT_PRESET!r} is used where the checkpoint has it.\n"
        "A threshold is one number, or one per layer with commas between them.",
    )
    exits.add_argument("--preset", metavar="NAME", help="exit settings by name, see exit_presets of the checkpoint")
    for stream in ("image", "text", "encoder", "decoder"):
        joint = ", for checkpoints with a joint one" if stream == "encoder" else ""
        exits.add_argument(f"--{stream}-threshold", type=thresholds, metavar="T", help=f"of the {stream}{joint}")
    exits.add_argument(
        "--generate",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"any other option{note}, e.g. exit_criterion=confidence; may be repeated",
    )


def add_bulk_arguments(group: Any, known: Sequence[str]) -> None:
    """Where rows of bulk work come from and go to, besides the sources and --out."""
    group.add_argument("--overwrite", action="store_true", help="start anew where the file, or a part of it, exists")
    group.add_argument(
        "--workers", type=at_least(0), default=1, metavar="N", help="processes that decode images (default: 1)"
    )
    group.add_argument(
        "--columns", type=names, default=[], metavar="A,B", help=f"further columns, of {', '.join(known)}"
    )
    group.add_argument("--keep", type=names, default=[], metavar="A,B", help="columns of a table to keep")
    group.add_argument("--image-column", metavar="NAME", help="of a table (default: image, file_name, path, ...)")
    group.add_argument(
        "--image-root", metavar="DIR", help="of relative paths in a list or table (default: its own folder)"
    )
    group.add_argument("--split", default="train", help="of a data set of the Hub (default: train)")
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="work in actors on a Ray cluster, or without an address on a local one (needs the extra ray)",
    )
    group.add_argument("--actors", type=at_least(1), default=1, metavar="N", help="with --ray: models (default: 1)")


def load_model(args: argparse.Namespace) -> tuple[MuEForConditionalGeneration, MuEProcessor]:
    """Model and processor that the arguments of `add_model_arguments` name; see [`load_checkpoint`]."""
    return load_checkpoint(args.model, device=args.device, dtype=args.dtype, threads=args.threads)


def exit_options(args: argparse.Namespace, presets: dict[str, Any] | None) -> dict[str, Any]:
    """The exit options of `generate` that the arguments ask for."""
    options = {
        f"{stream}_exit_threshold": getattr(args, f"{stream}_threshold")
        for stream in ("image", "text", "encoder", "decoder")
        if getattr(args, f"{stream}_threshold") is not None
    }
    options |= {name: value for name, value in args.generate if name in CONFIG_NAMES}
    if args.preset is not None:
        options["exit_preset"] = args.preset
    if not options and DEFAULT_PRESET in (presets or {}):
        options["exit_preset"] = DEFAULT_PRESET
    return options


def decoding_options(args: argparse.Namespace, exits: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate` besides exits that the arguments ask for."""
    options = {name: value for name, value in args.generate if name not in exits}
    if args.num_beams is not None:
        options["num_beams"] = args.num_beams
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    return options


__all__ = [
    "DEFAULT_PRESET",
    "add_bulk_arguments",
    "add_exit_arguments",
    "add_model_arguments",
    "at_least",
    "decoding_options",
    "exit_options",
    "load_model",
    "names",
    "setting",
    "thresholds",
]
