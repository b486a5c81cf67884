"""`mue-hf caption`: captions images with exits and at full depth, and shows what the exits skipped."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from .early_exit_mue import CONFIG_NAMES, resolve_options
from .flops import caption_flops, full_depth_flops, layers_skipped, trunk_flops
from .modeling_mue import MuEForConditionalGeneration
from .processing_mue import MuEProcessor, load_image
from .report import draw_report, save_png

SMALL_CHECKPOINT = Path("checkpoints/mue-flickr8k-small")
DEFAULT_PRESET = "balanced"
EXAMPLE = """example:
  mue-hf caption photo.jpg --decoder-threshold 0.9 --image-threshold 0.99
  mue-hf caption photos/*.jpg --model path/to/checkpoint --preset balanced --json

Time is that of `generate`: the image trunk, the encoder and the decoder, without reading and resizing the image. Both
ways run once to warm up and then in turns; the medians are printed, in a batch divided by its number of images.
Shares count the returned caption alone against running every layer for the same tokens; with beams its depths stand
for those of the other beams."""


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf caption` takes."""
    parser.epilog = EXAMPLE
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file or URL")
    parser.add_argument("--model", help=f"checkpoint folder or Hub id; default: {SMALL_CHECKPOINT}, where it exists")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument("--batch-size", type=at_least(1), default=1, metavar="N", help="images per call (default: 1)")
    parser.add_argument("--num-beams", type=at_least(1), metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--max-new-tokens", type=at_least(1), metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="timed runs each (default: 5)")
    exits = parser.add_argument_group(
        "exits",
        f"Without any of these the preset {DEFAULT_PRESET!r} is used where the checkpoint has it.\n"
        "A threshold is one number, or one per layer with commas between them.",
    )
    exits.add_argument("--preset", metavar="NAME", help="exit settings by name, see exit_presets of the checkpoint")
    for stream in ("image", "text", "encoder", "decoder"):
        note = ", for checkpoints with a joint one" if stream == "encoder" else ""
        exits.add_argument(f"--{stream}-threshold", type=thresholds, metavar="T", help=f"of the {stream}{note}")
    exits.add_argument(
        "--generate",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of generate, exits or not, e.g. exit_criterion=confidence; may be repeated",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object per image on stdout, and nothing else")
    output.add_argument(
        "--png", type=Path, default=Path("mue-captions"), metavar="DIR", help="folder of the pictures (mue-captions)"
    )
    output.add_argument("--no-png", dest="png", action="store_const", const=None, help="draw no pictures")


def load_checkpoint(args: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
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
    try:
        torch.zeros(1, device=args.device)
    # What torch raises for an unknown device depends on the device.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`--device` must be one that torch can use here, got {args.device!r}: {reason}") from error
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


def timed(model: PreTrainedModel, **inputs: Any) -> tuple[Any, float]:
    """Output of one `generate` call and its seconds."""
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    output = model.generate(**inputs, return_dict_in_generate=True)
    synchronize()
    return output, time.perf_counter() - start


class Captioner:
    """Model, processor and options of one run of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.processor = load_checkpoint(args)
        self.exits = exit_options(args, getattr(self.model.generation_config, "exit_presets", None))
        self.options = {name: value for name, value in args.generate if name not in self.exits}
        if args.num_beams is not None:
            self.options["num_beams"] = args.num_beams
        if args.max_new_tokens is not None:
            self.options["max_new_tokens"] = args.max_new_tokens
        self.trunks: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def caption(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        """One record per image: captions, depths, shares skipped and seconds."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        ways = {"exits": self.options | self.exits, "full": self.options | {"exit_criterion": "never"}}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        outputs = {way: timed(self.model, **inputs, **options)[0] for way, options in ways.items()}
        for _ in range(self.args.repeats):
            for way, options in ways.items():
                seconds[way].append(timed(self.model, **inputs, **options)[1] / len(images))
        captions, full_captions = (
            self.processor.post_process_image_text_to_text(outputs[way].sequences) for way in ways
        )
        records = []
        for row in range(len(images)):
            record = self.record({name: value[row] for name, value in inputs.items()}, outputs["exits"], row)
            texts = {"caption": captions[row], "full_depth_caption": full_captions[row]}
            times = {"seconds": median(seconds["exits"]), "full_depth_seconds": median(seconds["full"])}
            records.append(texts | record | times | self.conditions(len(images)))
        return records

    def record(self, inputs: dict[str, torch.Tensor], output: Any, row: int) -> dict[str, Any]:
        """What sample `row` of `output` ran, and what that is worth."""
        config = self.model.config
        depths = [depth for depth in output.decoder_exit_layers[row].tolist() if depth]
        new_tokens = output.sequences[row][-output.decoder_exit_layers.shape[1] :][: len(depths)].tolist()
        image_depth, text_depth = int(output.image_exit_layers[row]), int(output.text_exit_layers[row])
        shape = tuple(inputs["pixel_values"].shape)
        if shape not in self.trunks:
            self.trunks[shape] = trunk_flops(self.model, shape)
        trunk, channels, image_tokens = self.trunks[shape]
        saved = self.model.generation_config.to_dict()
        settings = saved | self.options
        exits = resolve_options(self.exits, {}, saved, config)
        sizes = {
            "image_tokens": image_tokens,
            "text_tokens": int(inputs["attention_mask"].sum()),
            "channels": channels,
            "trunk": trunk,
            "max_tokens": settings.get("max_new_tokens") or (settings.get("max_length") or 20) - 1,
            "beams": settings.get("num_beams") or 1,
        }
        ran = caption_flops(
            config,
            depths,
            image_depth=image_depth,
            text_depth=text_depth,
            exit_kv=exits.exit_kv,
            criterion=exits.exit_criterion,
            **sizes,
        )
        full = full_depth_flops(config, len(depths), **sizes)
        ran_total, full_total = sum(ran.values()), sum(full.values())
        return {
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers,
            "image_exit_layers": image_depth,
            "text_exit_layers": text_depth,
            "tokens": [
                {"text": self.processor.decode([token]), "layers": depth}
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
            "dtype": self.args.dtype,
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


def run(args: argparse.Namespace) -> int:
    """Captions the images.

    Returns:
        `int`: 0, or 1 if an image could not be read and the others are done.
    """
    captioner = Captioner(args)
    if not captioner.exits:
        print("mue-hf caption: no exits are set; pass --preset or a threshold", file=sys.stderr)
    failed: list[str] = []
    taken: set[Path] = set()
    progress = tqdm(total=len(args.images), unit="image", file=sys.stderr, disable=len(args.images) == 1)
    with progress:
        for batch in batches(read_images(args.images, failed), args.batch_size):
            records = captioner.caption([image for _, image in batch])
            for (path, image), record in zip(batch, records, strict=True):
                png = None if args.png is None else png_path(args.png, path, taken)
                record = {"image": path, **record, "png": None if png is None else str(png)}
                if png is not None:
                    save_png(draw_report(image, record), png)
                with progress.external_write_mode():
                    print(json.dumps(record) if args.json else describe(record), flush=True)
            progress.update(len(batch))
    return 1 if failed else 0


__all__ = ["add_arguments", "run"]
