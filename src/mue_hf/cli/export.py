"""`mue-hf export`: a checkpoint with ONNX graphs beside its weights, for the engine ONNX Runtime."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..export.checkpoint import export_checkpoint
from .options import at_least

EXAMPLE = """example:
  mue-hf export checkpoints/mue-photos-small runs/photos-onnx
  mue-hf caption photo.jpg --model runs/photos-onnx --engine onnxruntime

Each graph is checked against torch; the error is the largest difference, as a share of the largest value. A run that
was interrupted goes on where it was. DIR is there whole or not at all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mue-hf export`."""
    parser.epilog = EXAMPLE
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint folder or Hub id")
    parser.add_argument("destination", type=Path, metavar="DIR", help="folder to write")
    int8 = "layers and head in 8 bits: faster where the CPU has VNNI or AMX instructions, some outputs change"
    parser.add_argument("--int8", action="store_true", help=int8)
    size: dict[str, Any] = {"type": at_least(1), "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("--image-size", **size, help="pixels that the trunk is traced on (default: the processor's)")
    parser.add_argument("--torch-trunk", action="store_true", help="leave the image trunk to torch")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at DIR")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(args: argparse.Namespace) -> int:
    """Exports and prints the error of each graph; see [`export_checkpoint`] for what it raises."""

    def report(name: str, graph: dict[str, Any]) -> None:
        if not args.json:
            size = "" if "image_size" not in graph else "  at {} x {} pixels only".format(*graph["image_size"])
            kept = "  kept" if graph["kept"] else ""
            print(f"{name:<22}{graph['precision']:<9}error {graph['error']:.1e}{size}{kept}", flush=True)

    manifest = export_checkpoint(
        args.checkpoint,
        args.destination,
        precision="int8" if args.int8 else "float32",
        image_size=args.image_size,
        trunk=not args.torch_trunk,
        overwrite=args.overwrite,
        report=report,
    )
    print(json.dumps(manifest) if args.json else f"wrote {args.destination}")
    return 0


__all__ = ["add_arguments", "run"]
