"""`mue-hf bench`: what exits and the package's fast paths save in layers, in FLOPs and on the clock."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..cli.options import at_least, load_model, setting
from ..evaluation.measure import environment
from ..evaluation.plots import require_matplotlib
from ..files import write_whole
from ..inference.loading import check_device
from ..model.configuration_mue import SIZES, MuEConfig
from ..model.exit_options_mue import resolve_options
from ..model.generation_mue import weights_fingerprint
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import load_image
from .cells import measure_cell
from .costs import measure_costs
from .peers import PEERS, Peer, make_peer
from .record import Record
from .tables import draw_plot, markdown
from .variants import ARMS, make_arms

EPILOG = """examples:
  mue-hf bench --size base --image-size 480 --threads 2 --batch-sizes 1 4 --beams 1 5 --output runs/speed.json
  mue-hf bench --model CHECKPOINT --preset balanced --images photos/*.jpg --arms stock lossless --threads 2
  mue-hf bench --size tiny --image-size 128 --arms lossless half spread --exits 'low={"decoder_exit_threshold": 0.5}'

All arms of a cell (a batch size and a number of beams) take turns in one process. A cell that the output file has is
not measured again, so an interrupted run goes on where it was. Weights are random without --model; then shapes, not
captions, are what is timed, and thresholds mean nothing: force depths with the arms half and spread. Every caption has
exactly --tokens tokens. Layers, FLOPs and time are different things; all three are reported."""


def add_model_arguments(parser: Any) -> None:
    """Declares what says which model runs on which images, and where: what [`make_model`] reads."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", choices=sorted(SIZES), default="base", help="OFA's shapes, random weights (base)")
    which.add_argument("--model", metavar="CKPT", help="a checkpoint instead: folder or Hub id")
    pixels = "with random weights (default: 480); a checkpoint has its own"
    parser.add_argument("--image-size", type=at_least(16), metavar="PX", help=pixels)
    parser.add_argument("--images", nargs="+", metavar="FILE", help="with --model: photos, in turns; default: noise")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf bench` takes."""
    parser.epilog = EPILOG
    add_model_arguments(parser.add_argument_group("model"))
    what = parser.add_argument_group("what is timed")
    what.add_argument("--tokens", type=at_least(1), default=16, metavar="N", help="new tokens of each caption (16)")
    what.add_argument(
        "--batch-sizes", type=at_least(1), nargs="*", default=[1, 4, 16], metavar="B", help="none is allowed (1 4 16)"
    )
    what.add_argument("--beams", type=at_least(1), nargs="+", default=[1, 5], metavar="B", help="(1 5)")
    what.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(all); see the table's legend")
    what.add_argument("--preset", action="append", default=[], metavar="NAME", help="one more arm; may be repeated")
    what.add_argument(
        "--exits",
        type=setting,
        action="append",
        default=[],
        metavar="NAME={...}",
        help="one more arm, with these exit options in JSON; may be repeated",
    )
    what.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="PEER",
        help=f"one more arm each: {', '.join(PEERS)}, random weights, as many image tokens; PEER:PX for another size, "
        "PEER:native for the published one",
    )
    what.add_argument("--repeats", type=at_least(1), default=10, metavar="N", help="rounds of each cell (10)")
    what.add_argument(
        "--max-seconds", type=float, metavar="S", help="a cell begins no further round after this time, but for three"
    )
    what.add_argument(
        "--cost-model",
        action="store_true",
        help="first measure what a layer takes for each row, and what it takes to shrink a batch, on this device; "
        "batches shrink by it, in this run and, where --model is a folder, in every later one of that checkpoint",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("mue-bench.json"), metavar="FILE", help="(mue-bench.json)")
    output.add_argument("--table", type=Path, metavar="FILE", help="the Markdown tables, which also go to stdout")
    output.add_argument("--plots", type=Path, metavar="DIR", help="folder of a plot of time against FLOPs")
    output.add_argument("--json", action="store_true", help="the record on stdout instead of the tables")


MakeInputs = Callable[[int], Mapping[str, Tensor]]


def make_model(args: argparse.Namespace) -> tuple[PreTrainedModel, MakeInputs, str]:
    """
    The model that the arguments name, ready to be timed: in evaluation mode, no parameter with a gradient.

    Returns:
        `tuple[PreTrainedModel, Callable, str]`: the model, its inputs by batch size, and what it is called.

    Raises:
        ValueError: for arguments that contradict each other, and a device or an image size that cannot be.
    """
    if args.model is None and args.images:
        raise ValueError("`--images` needs a checkpoint; pass `--model`.")
    if args.model is not None and args.image_size:
        raise ValueError("`--image-size` is for random weights; a checkpoint's processor has its own.")
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, make_inputs, name = (_random_model if args.model is None else _checkpoint)(args)
    model = model.to(args.device, getattr(torch, args.dtype)).eval().requires_grad_(False)

    def inputs(batch: int) -> dict[str, Tensor]:
        made = {name: value.to(model.device) for name, value in make_inputs(batch).items()}
        return made | {"pixel_values": made["pixel_values"].to(model.dtype)}

    return model, inputs, name


def _random_model(args: argparse.Namespace) -> tuple[PreTrainedModel, MakeInputs, str]:
    pixels = args.image_size or 480
    config = MuEConfig.from_size(args.size)
    most = 16 * config.image_bucket_size
    if pixels % 16 or pixels > most:
        raise ValueError(f"`--image-size` must be a multiple of 16 up to {most}, got {pixels}.")
    torch.manual_seed(0)
    model = MuEForConditionalGeneration(config)
    # Trained weights give no image code as text, random ones would where nobody forbids it.
    model.get_input_embeddings().weight.data[config.num_text_tokens :] = 0
    # As long as the captioning prompt.
    ids = torch.tensor([[0, *range(10, 16), 2]])

    def inputs(batch: int) -> dict[str, Tensor]:
        images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(batch))
        return {"input_ids": ids.repeat(batch, 1), "pixel_values": images}

    return model, inputs, f"OFA-{args.size} shapes at {pixels} px, random weights"


def _checkpoint(args: argparse.Namespace) -> tuple[PreTrainedModel, MakeInputs, str]:
    model, processor = load_model(args)
    photos = [load_image(path) for path in args.images or []]
    size = processor.image_processor.size

    def inputs(batch: int) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(batch)
        shape = (size["height"], size["width"], 3)
        some = list(islice(cycle(photos), batch)) or [
            torch.randint(256, shape, generator=noise, dtype=torch.uint8).numpy() for _ in range(batch)
        ]
        made = processor(images=some, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    return model, inputs, f"{args.model} on {len(photos) or 'no'} photos"


class Bench:
    """Model, arms and record of one run of the command."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        if args.plots is not None:
            require_matplotlib()
            if "lossless" not in args.arms:
                raise ValueError(
                    "`--plots` needs the arm lossless, which the others are drawn against; add it to `--arms`."
                )
        if args.model is None and args.preset:
            raise ValueError("`--preset` needs a checkpoint; pass `--model`.")
        self.model, self.inputs, name = make_model(args)
        self.exits = self._exits()
        image = self.inputs(1)["pixel_values"]
        with torch.no_grad():
            grid = tuple(self.model.trunk_features(image).shape[2:])
        image_tokens = grid[0] * grid[1]
        self.peers: list[Peer] = [make_peer(spec, image_tokens, image) for spec in args.peers]
        settings = {
            "name": name,
            "weights": weights_fingerprint(self.model),
            "image_tokens": image_tokens,
            "new_tokens": args.tokens,
            "arms": args.arms,
            "exits": self.exits,
            "peers": {peer.name: peer.facts() for peer in self.peers},
            "cost_model": args.cost_model,
        }
        machine = {name: value for name, value in environment(self.model, 1).items() if name != "batch_size"}
        machine["cores"] = os.cpu_count()
        self.record = Record(args.output, {"settings": settings, "environment": machine})
        if args.cost_model:
            self._take_costs(grid)

    def _take_costs(self, grid: tuple[int, int]) -> None:
        """Gives the model the costs of this device, those of the record where it has them, and keeps them."""
        content, config = self.record.content, self.model.generation_config
        if content["exit_costs"] is None:
            content["exit_costs"] = measure_costs(self.model, grid, text_tokens=self.inputs(1)["input_ids"].shape[1])
            self.record.save()
        config.exit_costs = (getattr(config, "exit_costs", None) or {}) | content["exit_costs"]
        path = None if self.args.model is None else Path(self.args.model) / "generation_config.json"
        if path is not None and path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8")) | {"exit_costs": config.exit_costs}
            write_whole(path, (json.dumps(saved, indent=2, sort_keys=True) + "\n").encode())

    def _exits(self) -> dict[str, dict[str, Any]]:
        exits = {name: {"exit_preset": name} for name in self.args.preset}
        for name, options in self.args.exits:
            if not isinstance(options, dict) or name in (*ARMS, *exits):
                raise ValueError(
                    f"`--exits` must be NAME={{...}} with options in JSON and a name that no other arm has, got "
                    f"{name}={options!r}."
                )
            exits[name] = options
        saved = {name: value for name, value in vars(self.model.generation_config).items() if "exit" in name}
        for options in exits.values():
            resolve_options(options, {}, saved, self.model.config)
        return exits

    def measure(self) -> None:
        """Measures the cells that the record lacks."""
        args = self.args
        wanted = {
            f"batch {batch}, beam {beams}": (batch, beams) for batch, beams in product(args.batch_sizes, args.beams)
        }
        missing = {name: sizes for name, sizes in wanted.items() if name not in self.record}
        arms = len(args.arms) + len(self.exits) + len(self.peers)
        with tqdm(total=len(missing) * arms * (args.repeats + 3), unit="run") as progress:
            for number, (name, (batch, beams)) in enumerate(missing.items(), 1):
                progress.set_description(name)
                self.record.add(name, self._cell(batch, beams, progress.update))
                # Rounds that were cut short.
                progress.n = number * arms * (args.repeats + 3)
                progress.refresh()

    def _cell(self, batch: int, beams: int, advance: Callable[[], Any]) -> dict[str, Any]:
        args, inputs = self.args, self.inputs(batch)
        arms = make_arms(args.arms, self.model, inputs, self.exits, beams=beams, steps=args.tokens)
        arms += [peer.arm(inputs["pixel_values"]) for peer in self.peers]
        decoding = {
            "num_beams": beams,
            "max_new_tokens": args.tokens,
            "min_new_tokens": args.tokens,
            "do_sample": False,
            "return_dict_in_generate": True,
        }
        limits = {"repeats": args.repeats, "max_seconds": args.max_seconds, "advance": advance}
        return {"batch_size": batch, "beams": beams} | measure_cell(arms, decoding, **limits)


def run(args: argparse.Namespace) -> int:
    """Measures, writes the record, and shows it."""
    bench = Bench(args)
    bench.measure()
    table = markdown(bench.record.content)
    if args.table is not None:
        write_whole(args.table, table.encode())
    if args.plots is not None:
        draw_plot(bench.record.content, args.plots)
    tqdm.write(json.dumps(bench.record.content) if args.json else table)
    return 0


__all__ = ["Bench", "add_arguments", "add_model_arguments", "make_model", "run"]
