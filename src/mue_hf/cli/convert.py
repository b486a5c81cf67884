"""`mue-hf convert`: an OFA checkpoint to a folder for `from_pretrained`."""

import argparse
import json

from ..convert.ofa import convert_ofa


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mue-hf convert`."""
    parser.epilog = "example: mue-hf convert caption_base_best.pt ofa-base-caption --vocab OFA-base"
    parser.add_argument("source", metavar="SRC", help="folder of the fork, fairseq .pt file, or Hub repository")
    parser.add_argument("destination", metavar="DST", help="folder to write")
    parser.add_argument("--vocab", metavar="DIR", help="folder with vocab.json and merges.txt (needed for fairseq)")
    streams = "separate image and text streams (MuE) instead of OFA's joint encoder"
    parser.add_argument("--decompose", action="store_true", help=streams)
    parser.add_argument("--image-size", type=int, default=480, help="side in pixels of resized images (default: 480)")
    pickle = "load a file that holds Python objects besides tensors: RUNS ANY CODE IN IT, so only for files you trust"
    parser.add_argument("--allow-pickle", action="store_true", help=pickle)
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at DST")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Converts and prints a summary; see [`convert_ofa`] for what it raises."""
    names = ("vocab", "decompose", "allow_pickle", "image_size", "overwrite")
    summary = convert_ofa(args.source, args.destination, **{name: getattr(args, name) for name in names})
    if args.json:
        print(json.dumps(summary))
        return 0
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):<24}{f'{value:,}' if name == 'parameters' else value}")
    return 0


__all__ = ["add_arguments", "run"]
