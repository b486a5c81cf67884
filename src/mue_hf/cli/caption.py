"""`mue-hf caption`: a few images both ways, to see what exits skip, or any number of images into a file."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..app.report import draw_report
from ..files import whole_file
from ..inference.bulk import CAPTION_COLUMNS
from ..inference.captioner import Captioner
from ..inference.sources import LIST_SUFFIXES, TABLE_SUFFIXES, Source, batches, printable
from ..model.images_mue import load_image
from .bulk import run_bulk
from .options import (
    add_bulk_arguments,
    add_decoding_arguments,
    add_exit_arguments,
    add_model_arguments,
    at_least,
    decoding_options,
    exit_options,
    load_model,
)

EXAMPLE = """example:
  mue-hf caption photo.jpg --decoder-threshold 0.9 --image-threshold 0.99
  mue-hf caption photos/*.jpg --model path/to/checkpoint --preset balanced --json
  mue-hf caption photos/ --out captions.jsonl --workers 2 --columns decoder_exit_layers,seconds

Without --out each image is captioned with exits and at full depth, and a picture shows what the exits skipped. Time is
that of `generate`: the image trunk, the encoder and the decoder, without reading and resizing the image. Both ways run
once to warm up and then in turns; the medians are printed, in a batch divided by its number of images. Shares count
the returned caption alone against running every layer for the same tokens; with beams its depths stand for those of
the other beams.

With --out any number of images is captioned with exits alone, in the order of the source. A run that was killed goes
on where it was when the same command is given again; batch size, workers and device may differ. An image that cannot
be used has a row with the reason under "error".

exit code: 0 done; 1 done, but some images could not be used; 2 bad input; 3 stopped by an
audit; 130 interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf caption` takes."""
    parser.epilog = EXAMPLE
    images = (
        "image file or URL; with --out also a folder, a list (.txt, one image per line), a table (.jsonl, .csv, "
        ".parquet) or a data set of the Hub"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    add_model_arguments(parser)
    size = "images per call (default: 1; with --out 16)"
    parser.add_argument("--batch-size", type=at_least(1), metavar="N", help=size)
    add_decoding_arguments(parser)
    parser.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="timed runs each (default: 5)")
    add_exit_arguments(parser, " of generate, exits or not")
    output = parser.add_argument_group("output")
    record = "one JSON object per image on stdout, or with --out one for the whole run"
    output.add_argument("--json", action="store_true", help=record)
    folder: dict[str, Any] = {"type": Path, "default": Path("mue-captions"), "metavar": "DIR"}
    output.add_argument("--png", **folder, help="folder of the pictures (mue-captions)")
    output.add_argument("--no-png", dest="png", action="store_const", const=None, help="draw no pictures")
    bulk = parser.add_argument_group("any number of images")
    bulk.add_argument("--out", metavar="FILE", help=".jsonl or .parquet file for the captions")
    add_bulk_arguments(bulk, CAPTION_COLUMNS)


def read_images(paths: list[str], failed: list[str]) -> Iterator[tuple[str, Image.Image]]:
    """The images that can be read; the others are reported on stderr and added to `failed`."""
    for path in paths:
        try:
            yield path, load_image(path)
        except (OSError, ValueError) as error:
            tqdm.write(f"mue-hf caption: {error}", file=sys.stderr)
            failed.append(path)


def describe(record: dict[str, Any]) -> str:
    """A record for a person."""
    tokens = "  ".join(f"{token['text'].strip()} {token['layers']}" for token in record["tokens"])
    lines = [
        record["image"],
        f"  with exits     {record['caption']}",
        f"  at full depth  {record['full_depth_caption']}",
        f"  image stream   {record['image_exit_layers']} of {record['image_layers']} layers",
        f"  text stream    {record['text_exit_layers']} of {record['text_layers']} layers",
        f"  each token     {tokens}  (of {record['decoder_layers']})",
        f"  skipped        {record['layers_skipped']:.0%} of layers, {record['flops_skipped']:.0%} of FLOPs "
        f"({record['flops_skipped_without_trunk']:.0%} without the image trunk)",
        f"  time           {1000 * record['seconds']:.1f} ms with exits, "
        f"{1000 * record['full_depth_seconds']:.1f} ms at full depth "
        f"({record['device']}, {record['dtype']}, threads {record['threads']}, batch of {record['batch_size']})",
    ]
    if record["png"] is not None:
        lines.append(f"  picture        {record['png']}")
    return "\n".join(lines)


def png_path(folder: Path, image: str, taken: set[Path]) -> Path:
    """A file in `folder` named after the image, with a number where two images have one name."""
    stem, number = Path(image).stem, 1
    path = folder / f"{stem}.png"
    while path in taken:
        number += 1
        path = folder / f"{stem}-{number}.png"
    taken.add(path)
    return path


def run(args: argparse.Namespace) -> int:
    """Captions the images; 1 if some could not be used."""
    if args.out is None:
        return run_report(args)
    return run_bulk(args, Source(args.images, args.split, args.image_root), "captioning")


def run_report(args: argparse.Namespace) -> int:
    """Captions a few images both ways and shows what the exits skipped; 1 if some could not be read."""
    audited = [name for name in ("audit", "audit_seed", "on_drift") if getattr(args, name) is not None]
    listed = ("columns", "image_column", "image_root", "keep", "overwrite", "ray")
    for name in (*audited, *listed):
        if name in audited or getattr(args, name):
            raise ValueError(f"`--out` must be given with `--{name.replace('_', '-')}`, got none; pass a file name.")
    for name in args.images:
        if Path(name).is_dir() or Path(name).suffix.lower() in TABLE_SUFFIXES | LIST_SUFFIXES:
            raise ValueError(f"`--out` must be given for a folder, a list or a table, got {name}; pass a file name.")
    model, processor = load_model(args)
    captioner = Captioner(model, processor, exit_options(args, model), decoding_options(args), args.repeats)
    failed: list[str] = []
    taken: set[Path] = set()
    with tqdm(total=len(args.images), unit="image", disable=len(args.images) == 1) as progress:
        for batch in batches(read_images(args.images, failed), args.batch_size or 1):
            records = captioner.caption([image for _, image in batch])
            for (path, image), record in zip(batch, records, strict=True):
                png = None if args.png is None else png_path(args.png, path, taken)
                record = {"image": path, **record, "png": None if png is None else str(png)}
                if png is not None:
                    with whole_file(png) as part:
                        draw_report(image, record).save(part, format="PNG")
                with progress.external_write_mode():
                    print(json.dumps(record) if args.json else printable(describe(record)), flush=True)
            progress.update(len(batch))
    return 1 if failed else 0


__all__ = ["add_arguments", "run"]
