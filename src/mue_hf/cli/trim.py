"""`mue-hf trim`: a checkpoint with only the layers that fixed depths run."""

import argparse
import json

from tqdm import tqdm

from ..model.criteria_mue import LAYER_OPTIONS
from ..publishing.trim import trim_checkpoint

EPILOG = """examples:
  mue-hf trim my-checkpoint smaller --image 2 --text 3 --decoder 3
  mue-hf trim my-checkpoint smaller --preset two-layers

What is written gives the outputs of CKPT at these fixed depths, and loads as any checkpoint; exits work on the layers
that are left. Image and text share one stack of layers, of which the deeper one's are kept. Presets are not carried
over: `mue-hf calibrate` makes new ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mue-hf trim`."""
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint folder")
    parser.add_argument("target", metavar="DIR", help="folder to write, which must be new or empty")
    for stream in LAYER_OPTIONS:
        joint = ", for checkpoints with a joint one" if stream == "encoder" else ""
        depth = f"layers of the {stream}{joint} (default: all)"
        parser.add_argument(f"--{stream}", type=int, metavar="N", help=depth)
    parser.add_argument("--preset", metavar="NAME", help="a saved preset of fixed depths, in place of numbers")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at DIR")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint and prints a summary; see [`trim_checkpoint`] for what it raises."""
    exits = {option: getattr(args, stream) for stream, option in LAYER_OPTIONS.items()} | {"exit_preset": args.preset}
    summary = trim_checkpoint(args.checkpoint, args.target, exits, args.overwrite)
    if args.json:
        print(json.dumps(summary))
        return 0
    layers = [f"{name.removesuffix('_layers')} {depth}" for name, depth in summary.items() if name.endswith("_layers")]
    sizes = [tqdm.format_sizeof(summary[name], "B") for name in ("bytes_before", "bytes_after")]
    print(f"{args.target}: {', '.join(layers)} layers, weights of {sizes[0]} cut to {sizes[1]}")
    return 0


__all__ = ["add_arguments", "run"]
