"""`mue-hf bench`: what exits and the package's fast paths save in layers, in FLOPs and on the clock."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmarking.models import TimedModel, checkpoint_model, random_model
from ..benchmarking.peers import PEERS
from ..benchmarking.run import Bench
from ..benchmarking.tables import draw_plot, markdown
from ..benchmarking.variants import DEFAULT_VARIANTS, TORCH_ONLY, variant_names
from ..evaluation.plots import require_matplotlib
from ..files import write_whole
from ..model.configuration_mue import SIZES
from ..model.engine_mue import ENGINES
from .options import RenamedOption, add_device_arguments, at_least, setting

EPILOG = """examples:
  mue-hf bench --size base --image-size 480 --threads 2 --batch-sizes 1 4 --beams 1 5 --output runs/speed.json
  mue-hf bench --model CHECKPOINT --preset balanced --images photos/*.jpg --variants stock lossless --threads 2
  mue-hf bench --model CHECKPOINT --exports runs/float32 runs/int8 --variants stock lossless half --threads 1
  mue-hf bench --size tiny --image-size 128 --variants lossless half --exits 'low={"decoder_exit_threshold": 0.5}'

With --exports every variant but {references} and peers runs on each of these folders too.

All variants of a cell (a batch size and a number of beams) take turns in one process. A cell that the output file has
is not measured again, so an interrupted run goes on where it was. Weights are random without --model; then shapes, not
captions, are what is timed, and thresholds mean nothing: force depths with the variants half and spread. Every caption
has exactly --tokens tokens. Layers, FLOPs and time are different things; all three are reported."""


def add_model_arguments(parser: Any) -> None:
    """Declares what says which model runs on which images, and where: what [`load_timed_model`] reads."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", choices=sorted(SIZES), default="base", help="OFA's shapes, random weights (base)")
    which.add_argument("--model", metavar="CKPT", help="a checkpoint instead: folder or Hub id")
    pixels = "with random weights (default: 480); a checkpoint has its own"
    parser.add_argument("--image-size", type=at_least(16), metavar="PX", help=pixels)
    parser.add_argument("--images", nargs="+", metavar="FILE", help="with --model: photos, in turns; default: noise")
    add_device_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf bench` takes."""
    parser.epilog = EPILOG.replace("{references}", ", ".join(TORCH_ONLY))
    model = parser.add_argument_group("model")
    add_model_arguments(model)
    exports = "with --model: folders that `mue-hf export` made of it, which ONNX Runtime runs beside torch"
    model.add_argument("--exports", nargs="+", default=[], metavar="DIR", help=exports)
    engine = "onnxruntime: the folder of --model is an export itself, and among --exports"
    model.add_argument("--engine", choices=["torch", *ENGINES], default="torch", help=engine)
    what = parser.add_argument_group("what is timed")
    what.add_argument("--tokens", type=at_least(1), default=16, metavar="N", help="new tokens of each caption (16)")
    sizes: dict[str, Any] = {"type": at_least(1), "metavar": "B"}
    what.add_argument("--batch-sizes", nargs="*", default=[1, 4, 16], help="none is allowed (1 4 16)", **sizes)
    what.add_argument("--beams", nargs="+", default=[1, 5], help="(1 5)", **sizes)
    names = variant_names()
    variants: dict[str, Any] = {"nargs": "+", "choices": names, "default": list(DEFAULT_VARIANTS), "metavar": "NAME"}
    known = f"some of {', '.join(names)} (the first {len(DEFAULT_VARIANTS)}); see the table's legend"
    what.add_argument("--variants", help=known, **variants)
    what.add_argument("--arms", dest="variants", action=RenamedOption, help=argparse.SUPPRESS, **variants)
    what.add_argument("--preset", action="append", default=[], metavar="NAME", help="one more variant; repeatable")
    exits = "one more variant, with these exit options in JSON; may be repeated"
    what.add_argument("--exits", type=setting, action="append", default=[], metavar="NAME={...}", help=exits)
    peers = f"one more variant each: {', '.join(PEERS)}, random weights, as many image tokens"
    peers += "; PEER:PX for another size, PEER:native for the published one"
    what.add_argument("--peers", nargs="+", default=[], metavar="PEER", help=peers)
    what.add_argument("--repeats", type=at_least(1), default=10, metavar="N", help="rounds of each cell (10)")
    seconds = "a cell begins no further round after this time, but for three"
    what.add_argument("--max-seconds", type=float, metavar="S", help=seconds)
    what.add_argument("--cost-model", action="store_true", help=argparse.SUPPRESS)
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("mue-bench.json"), metavar="FILE", help="(mue-bench.json)")
    output.add_argument("--table", type=Path, metavar="FILE", help="the Markdown tables, which also go to stdout")
    output.add_argument("--plots", type=Path, metavar="DIR", help="folder of a plot of time against FLOPs")
    output.add_argument("--json", action="store_true", help="the record on stdout instead of the tables")


def load_timed_model(args: argparse.Namespace, exports: Sequence[str] = ()) -> TimedModel:
    """The model that the arguments of [`add_model_arguments`] name, with exports; a ValueError if they contradict each
    other."""
    where = {"device": args.device, "dtype": args.dtype, "threads": args.threads}
    if args.model is None:
        if args.images:
            raise ValueError("`--images` needs a checkpoint; pass `--model`.")
        return random_model(args.size, args.image_size or 480, **where)
    if args.image_size:
        raise ValueError("`--image-size` is for random weights; a checkpoint's processor has its own.")
    return checkpoint_model(args.model, args.images or (), exports, **where)


def _exports(args: argparse.Namespace) -> list[str]:
    """The exports that the arguments name.

    Raises:
        ValueError: for one that is no folder, and where they cannot be of the model.
    """
    if args.model is None and (args.exports or args.engine != "torch"):
        raise ValueError(
            "`--exports` and `--engine` need the checkpoint that `mue-hf export` ran on; pass `--model` "
            "(`benchmarks/random_checkpoint.py` writes one of random weights)."
        )
    if missing := [folder for folder in args.exports if not Path(folder).is_dir()]:
        raise ValueError(f"`--exports` must be folders that `mue-hf export` wrote, got {missing}; check the path.")
    return [*args.exports, *([] if args.engine == "torch" else [args.model])]


def run(args: argparse.Namespace) -> int:
    """Measures, writes the record, and shows it."""
    if args.cost_model:
        print("mue-hf bench: --cost-model is ignored: exited rows leave the batch at once", file=sys.stderr)
    if args.plots is not None:
        require_matplotlib()
        if "lossless" not in args.variants:
            raise ValueError(
                "`--plots` needs the variant lossless, which the others are drawn against; add it to `--variants`."
            )
    if args.model is None and args.preset:
        raise ValueError("`--preset` needs a checkpoint; pass `--model`.")
    exits: dict[str, Any] = {name: {"exit_preset": name} for name in args.preset}
    for name, options in args.exits:
        if not isinstance(options, dict) or name in exits:
            raise ValueError(
                "`--exits` must be NAME={...} with options in JSON and a name that no other variant has, got "
                f"{name}={options!r}."
            )
        exits[name] = options
    what = {"variants": args.variants, "exits": exits, "peers": args.peers, "tokens": args.tokens}
    bench = Bench(load_timed_model(args, _exports(args)), args.output, **what)
    record = bench.measure(args.batch_sizes, args.beams, repeats=args.repeats, max_seconds=args.max_seconds)
    table = markdown(record)
    if args.table is not None:
        write_whole(args.table, table)
    if args.plots is not None:
        draw_plot(record, args.plots)
    print(json.dumps(record) if args.json else table)
    return 0


__all__ = ["add_arguments", "add_model_arguments", "load_timed_model", "run"]
