"""`mue-hf export`: a checkpoint with ONNX graphs beside its weights, for the engine ONNX Runtime."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..export.checkpoint import checkpoint_folder, export_checkpoint
from ..export.images import CalibrationImages
from ..export.scan import Sensitivity, sensitivities
from ..model.processing_mue import MuEProcessor
from .options import at_least, names

EXAMPLE = """examples:
  mue-hf export checkpoints/mue-photos-small runs/photos-onnx
  mue-hf caption photo.jpg --model runs/photos-onnx --engine onnxruntime
  mue-hf export checkpoints/mue-photos-small runs/photos-int8 --int8 --calibrate-on examples/photos --scan

Each graph is checked against torch; the error is the largest difference, as a share of the largest value. A run that
was interrupted goes on where it was. DIR is there whole or not at all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mue-hf export`."""
    parser.epilog = EXAMPLE
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint folder or Hub id")
    parser.add_argument("destination", type=Path, metavar="DIR", help="folder to write")
    size: dict[str, Any] = {"type": at_least(1), "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("--image-size", **size, help="pixels that the trunk is traced on (default: the processor's)")
    parser.add_argument("--torch-trunk", action="store_true", help="leave the image trunk to torch")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at DIR")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON, with what --scan found")
    _add_int8_arguments(parser.add_argument_group("8 bits"))


def _add_int8_arguments(group: Any) -> None:
    int8 = "layers and head in 8 bits: faster where the CPU has VNNI or AMX instructions, some outputs change"
    images = "what the options below are calibrated and measured on, of no test split: see `mue-hf caption --out`"
    trunk = "the image trunk in 8 bits too, which costs more captions than all the rest; needs --calibrate-on"
    half = "attention of the encoder in bfloat16: faster on large images where the CPU has AMX or AVX512-BF16"
    keep = "graphs that stay in float32, as in head,encoder_*"
    scan = "print what 8 bits cost in each part alone, measured on the images of --calibrate-on"
    split = "of a data set, and of a table with a column of that name (default: train)"
    group.add_argument("--int8", action="store_true", help=int8)
    group.add_argument("--calibrate-on", nargs="+", metavar="IMAGES", help=images)
    group.add_argument("--calibration-images", type=at_least(1), default=64, metavar="N", help="drawn (default: 64)")
    group.add_argument("--split", default="train", help=split)
    group.add_argument("--int8-trunk", action="store_true", help=trunk)
    group.add_argument("--bfloat16-attention", action="store_true", help=half)
    group.add_argument("--keep-float", type=names, default=[], metavar="NAMES", help=keep)
    group.add_argument("--scan", action="store_true", help=scan)


def run(args: argparse.Namespace) -> int:
    """Exports and prints the error of each graph, and what 8 bits cost; see [`export_checkpoint`] for what it
    raises."""
    for option, given in (("--calibrate-on", args.calibrate_on), ("--scan", args.scan)):
        if given and not args.int8:
            raise ValueError(f"`{option}` goes with 8 bits; pass --int8 too, or drop it.")
    if args.scan and not args.calibrate_on:
        raise ValueError("`--scan` needs images to measure on; pass --calibrate-on IMAGES.")

    def report(name: str, graph: dict[str, Any]) -> None:
        if not args.json:
            size = "" if "image_size" not in graph else "  at {} x {} pixels only".format(*graph["image_size"])
            kept = "  kept" if graph["kept"] else ""
            print(f"{name:<22}{graph['precision']:<9}error {graph['error']:.1e}{size}{kept}", flush=True)

    folder, images = checkpoint_folder(args.checkpoint), None
    if args.calibrate_on:
        processor = MuEProcessor.from_pretrained(folder).image_processor
        options = {"count": args.calibration_images, "split": args.split, "size": args.image_size}
        images = CalibrationImages(processor, args.calibrate_on, **options)
    manifest = export_checkpoint(
        folder,
        args.destination,
        precision="int8" if args.int8 else "float32",
        image_size=args.image_size,
        trunk=not args.torch_trunk,
        images=images,
        int8_trunk=args.int8_trunk,
        attention="bfloat16" if args.bfloat16_attention else "float32",
        keep_float=args.keep_float,
        overwrite=args.overwrite,
        report=report,
    )
    found = [] if images is None else _measured(args, folder, images)
    if args.json:
        print(json.dumps(manifest | ({"sensitivities": [asdict(one) for one in found]} if found else {})))
    else:
        print(f"wrote {args.destination}")
    return 0


def _measured(args: argparse.Namespace, folder: Path, images: CalibrationImages) -> list[Sensitivity]:
    """What 8 bits cost, printed as it is found."""
    if not args.json:
        print(f"\n{'in 8 bits':<22}{'captions as in float32':<26}difference of logits, on {len(images)} images")
    found = []
    for one in sensitivities(folder, args.destination, images, args.scan):
        found.append(one)
        if not args.json:
            print(f"{one.name:<22}{one.same:<26.1%}{one.error:.1e}", flush=True)
    return found


__all__ = ["add_arguments", "run"]
