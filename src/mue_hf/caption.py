"""`mue-hf caption`: a few images both ways, to see what exits skip, or any number of images into a file."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig

from .bulk import CAPTION_COLUMNS, COLUMNS, CaptionCost, bulk_rows, bulk_settings, bulk_to_file, timed
from .early_exit_mue import CONFIG_NAMES
from .flops import layers_skipped
from .journal import Journal
from .modeling_mue import MuEForConditionalGeneration
from .predict import one_caption
from .processing_mue import MuEProcessor, load_image
from .report import draw_report, save_png
from .sources import LIST_SUFFIXES, TABLE_SUFFIXES, Row, Source, printable

SMALL_CHECKPOINT = Path("checkpoints/mue-flickr8k-small")
DEFAULT_PRESET = "balanced"
BULK_BATCH = 16
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

exit code: 0 done; 1 done, but some images could not be used; 2 bad input; 130 interrupted."""


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf caption` takes."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file or URL; with --out also a folder, a list (.txt, one image per line), a table (.jsonl, .csv, "
        ".parquet) or a data set of the Hub",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--batch-size", type=at_least(1), metavar="N", help="images per call (default: 1; with --out 16)"
    )
    parser.add_argument("--num-beams", type=at_least(1), metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--max-new-tokens", type=at_least(1), metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="timed runs each (default: 5)")
    add_exit_arguments(parser, " of generate, exits or not")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="one JSON object per image on stdout, or with --out one for the whole run"
    )
    output.add_argument(
        "--png", type=Path, default=Path("mue-captions"), metavar="DIR", help="folder of the pictures (mue-captions)"
    )
    output.add_argument("--no-png", dest="png", action="store_const", const=None, help="draw no pictures")
    bulk = parser.add_argument_group("any number of images")
    bulk.add_argument("--out", metavar="FILE", help=".jsonl or .parquet file for the captions")
    add_bulk_arguments(bulk, CAPTION_COLUMNS)


def check_device(device: str) -> None:
    """Raises a ValueError unless torch has this device."""
    try:
        torch.zeros(1, device=device)
    # What torch raises for an unknown device depends on the device.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`--device` must be one that torch can use here, got {device!r}: {reason}") from error


def load_checkpoint(args: argparse.Namespace) -> tuple[MuEForConditionalGeneration, MuEProcessor]:
    """Model and processor that the arguments name.

    Raises:
        `ValueError`: no model is named and the small checkpoint is not here, the checkpoint holds another kind of
            model, or the device does not exist.
    """
    name = args.model
    if name is None:
        if not SMALL_CHECKPOINT.is_dir():
            raise ValueError(
                f"`--model` is needed: {SMALL_CHECKPOINT} is not in this folder. Pass a checkpoint folder or a Hub "
                "id, or run in a clone of the repository."
            )
        name = str(SMALL_CHECKPOINT)
    check_device(args.device)
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type != "mue":
        raise ValueError(
            f'`--model` must be a checkpoint with model_type "mue", got {model_type!r} in {name}; `mue-hf convert` '
            "makes one from an OFA checkpoint."
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    model = MuEForConditionalGeneration.from_pretrained(name, dtype=getattr(torch, args.dtype))
    return model.to(args.device).eval(), MuEProcessor.from_pretrained(name)


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


def read_images(paths: list[str], failed: list[str]) -> Iterator[tuple[str, Image.Image]]:
    """The readable ones; the others are reported on stderr and added to `failed`."""
    for path in paths:
        try:
            yield path, load_image(path)
        except (OSError, ValueError) as error:
            tqdm.write(f"mue-hf caption: {error}", file=sys.stderr)
            failed.append(path)


def decoding_options(args: argparse.Namespace, exits: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate` besides exits that the arguments ask for."""
    options = {name: value for name, value in args.generate if name not in exits}
    if args.num_beams is not None:
        options["num_beams"] = args.num_beams
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    return options


def in_turns(
    model: MuEForConditionalGeneration, ways: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs each way once to warm up and then `repeats` times, in turns; results and median seconds by way."""
    results = {way: call() for way, call in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            seconds[way].append(timed(model, call)[1])
    return results, {way: median(times) for way, times in seconds.items()}


class Captioner:
    """
    Captions images both ways.

    Args:
        model ([`MuEForConditionalGeneration`]), processor ([`MuEProcessor`]): what captions.
        exits, options (`dict`): options of `generate`, exits and others.
        repeats (`int`): timed runs each.
    """

    def __init__(
        self,
        model: MuEForConditionalGeneration,
        processor: MuEProcessor,
        exits: Mapping[str, Any],
        options: Mapping[str, Any],
        repeats: int,
    ) -> None:
        self.model, self.processor = model, processor
        self.exits, self.options, self.repeats = dict(exits), one_caption(options), repeats
        self.cost = CaptionCost(model, exits, options)

    def caption(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        """One record per image: captions, depths, shares skipped and seconds."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        ways = {"exits": self.options | self.exits, "full": self.options | {"exit_criterion": "never"}}
        calls = {
            way: partial(self.model.generate, **inputs, **options, return_dict_in_generate=True)
            for way, options in ways.items()
        }
        outputs, seconds = in_turns(self.model, calls, self.repeats)
        captions, full_captions = (
            self.processor.post_process_image_text_to_text(outputs[way].sequences) for way in ways
        )
        records = []
        for row in range(len(images)):
            record = self.record({name: value[row] for name, value in inputs.items()}, outputs["exits"], row)
            texts = {"caption": captions[row], "full_depth_caption": full_captions[row]}
            times = {
                "seconds": seconds["exits"] / len(images),
                "full_depth_seconds": seconds["full"] / len(images),
            }
            records.append(texts | record | times | self.conditions(len(images)))
        return records

    def record(self, inputs: dict[str, torch.Tensor], output: Any, row: int) -> dict[str, Any]:
        """What sample `row` of `output` ran, and what that is worth."""
        config = self.model.config
        depths = [depth for depth in output.decoder_exit_layers[row].tolist() if depth]
        new_tokens = output.sequences[row][-output.decoder_exit_layers.shape[1] :][: len(depths)].tolist()
        image_depth, text_depth = int(output.image_exit_layers[row]), int(output.text_exit_layers[row])
        shape, text_tokens = inputs["pixel_values"].shape, int(inputs["attention_mask"].sum())
        ran, full = self.cost(shape, text_tokens, depths, image_depth, text_depth)
        trunk = ran["trunk"]
        ran_total, full_total = sum(ran.values()), sum(full.values())
        return {
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers,
            "image_exit_layers": image_depth,
            "text_exit_layers": text_depth,
            "tokens": [
                {"id": token, "text": self.processor.decode([token]), "layers": depth}
                for token, depth in zip(new_tokens, depths, strict=True)
            ],
            "layers_skipped": layers_skipped(config, depths, image_depth, text_depth),
            "flops_skipped": 1 - ran_total / full_total,
            "flops_skipped_without_trunk": 1 - (ran_total - trunk) / (full_total - trunk),
            "flops": ran,
            "full_depth_flops": full,
        }

    def conditions(self, batch_size: int) -> dict[str, Any]:
        """What the seconds were measured on."""
        return {
            "exits": self.exits,
            "batch_size": batch_size,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def describe(record: dict[str, Any]) -> str:
    """A record for a person."""
    encoder = record["encoder_layers"]
    tokens = "  ".join(f"{token['text'].strip()} {token['layers']}" for token in record["tokens"])
    lines = [
        record["image"],
        f"  with exits     {record['caption']}",
        f"  at full depth  {record['full_depth_caption']}",
        f"  image stream   {record['image_exit_layers']} of {encoder} layers",
        f"  text stream    {record['text_exit_layers']} of {encoder} layers",
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


def batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    while batch := list(islice(items, size)):
        yield batch


def bulk_process(
    args: argparse.Namespace,
    source: Source,
    row_arguments: Mapping[str, Any],
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    **work: Any,
) -> tuple[Any, dict[str, Any]]:
    """What turns rows into results (see [`bulk_to_file`]), and the settings that the results depend on.

    Raises:
        `ValueError`: a column that is to be kept is named as one that results have.
    """
    own = {"row", "image", "error", "caption" if work["task"] == "captioning" else "answer", *COLUMNS}
    if taken := [name for name in args.keep if name in own]:
        raise ValueError(f"`--keep` must not name columns that results have of their own, got {taken}; rename them.")
    settings = {name: getattr(args, name) for name in ("image_root", "split")} | dict(row_arguments)
    # Settings of the checkpoint that decide too, too long to be compared word by word.
    saved = [model.generation_config.to_dict(), processor.image_processor.to_dict()]
    settings["checkpoint"] = sha256(json.dumps(saved, sort_keys=True, default=str).encode()).hexdigest()[:16]
    work |= {"columns": args.columns}
    settings = {"sources": source.names, **bulk_settings(model, **work, **settings)}
    work |= {"batch_size": args.batch_size or BULK_BATCH, "workers": args.workers}

    def process(rows: Iterator[Row], totals: Counter) -> Iterator[dict[str, Any]]:
        if args.ray is None:
            return bulk_rows(model, processor, rows, **work, totals=totals)
        # An extra, and slow to import.
        from .bulk_ray import ray_rows

        # What the model refuses is refused here, not by an actor.
        bulk_rows(model, processor, (), **work | {"workers": 0})
        opened = {"names": source.names, "split": args.split, "image_root": args.image_root}
        ray = {"address": args.ray, "actors": args.actors, "source": opened, "row_arguments": row_arguments}
        return ray_rows(args, rows, totals, **ray, total=source.total, work=work)

    return process, settings


def run_bulk(args: argparse.Namespace, source: Source, rows: Iterator[Row], process: Any, settings: Any) -> int:
    """Writes `--out`, shows progress, and says what became of it.

    Returns:
        `int`: 0, or 1 if some rows could not be used.
    """
    with Journal(args.out, settings, COLUMNS | {"row": "int"}, args.overwrite) as journal:
        summary = bulk_to_file(journal, rows, process, total=source.total, batch_size=args.batch_size or BULK_BATCH)
    if args.json:
        print(json.dumps(summary))
    else:
        skipped = summary["compute_skipped"]
        print(
            f"{summary['out']}: {summary['rows']} rows, {summary['bad']} of them bad; in this run "
            f"{summary['new_rows']} in {summary['seconds']:.1f} s ({summary['rows_per_second']:.2f} per second)"
            + ("" if skipped is None else f", {skipped:.0%} of compute skipped")
        )
    return 1 if summary["bad"] else 0


def run(args: argparse.Namespace) -> int:
    """Captions the images.

    Returns:
        `int`: 0, or 1 if an image could not be read and the others are done.
    """
    if args.out is None:
        return run_report(args)
    source = Source(args.images, args.split, args.image_root)
    row_arguments = {"image_column": args.image_column, "keep": args.keep}
    rows = source.rows(**row_arguments)
    model, processor = load_checkpoint(args)
    exits = exit_options(args, getattr(model.generation_config, "exit_presets", None))
    _say_without_exits(exits)
    options = exits | decoding_options(args, exits)
    work = {"task": "captioning", "answers": None, "options": options}
    process, settings = bulk_process(args, source, row_arguments, model, processor, **work)
    return run_bulk(args, source, rows, process, settings)


def _say_without_exits(exits: Mapping[str, Any]) -> None:
    if not exits:
        print("mue-hf: no exits are set; pass --preset or a threshold", file=sys.stderr)


def run_report(args: argparse.Namespace) -> int:
    """Captions a few images both ways and shows what the exits skipped; exit codes as of `run`."""
    for name in ("columns", "image_column", "image_root", "keep", "overwrite", "ray"):
        if getattr(args, name):
            raise ValueError(f"`--out` must be given with `--{name.replace('_', '-')}`, got none; pass a file name.")
    for name in args.images:
        if Path(name).is_dir() or Path(name).suffix.lower() in TABLE_SUFFIXES | LIST_SUFFIXES:
            raise ValueError(f"`--out` must be given for a folder, a list or a table, got {name}; pass a file name.")
    model, processor = load_checkpoint(args)
    exits = exit_options(args, getattr(model.generation_config, "exit_presets", None))
    captioner = Captioner(model, processor, exits, decoding_options(args, exits), args.repeats)
    _say_without_exits(exits)
    failed: list[str] = []
    taken: set[Path] = set()
    progress = tqdm(total=len(args.images), unit="image", file=sys.stderr, disable=len(args.images) == 1)
    with progress:
        for batch in batches(read_images(args.images, failed), args.batch_size or 1):
            records = captioner.caption([image for _, image in batch])
            for (path, image), record in zip(batch, records, strict=True):
                png = None if args.png is None else png_path(args.png, path, taken)
                record = {"image": path, **record, "png": None if png is None else str(png)}
                if png is not None:
                    save_png(draw_report(image, record), png)
                with progress.external_write_mode():
                    print(json.dumps(record) if args.json else printable(describe(record)), flush=True)
            progress.update(len(batch))
    return 1 if failed else 0


__all__ = [
    "Captioner",
    "add_arguments",
    "add_bulk_arguments",
    "add_exit_arguments",
    "add_model_arguments",
    "at_least",
    "bulk_process",
    "exit_options",
    "in_turns",
    "load_checkpoint",
    "run",
    "run_bulk",
]
