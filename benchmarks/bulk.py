"""Bulk captioning in torch and with exports on ONNX Runtime: images a second, memory, and the share of decoding.

    mue-hf export checkpoints/mue-photos-small runs/photos-onnx
    python benchmarks/bulk.py PHOTOS --model checkpoints/mue-photos-small --exports runs/photos-onnx

Each cell is a fresh `mue-hf caption --out`, in turns with the others; its rate is that of the command's own summary,
without the start of the process. Memory is what Linux says is resident (RSS, with pages of mapped files that are in
use): the highest of the main process and of the largest one that decodes. Decoding is timed apart, in this process on
one thread; its share is of the time that a row takes in the cell, above which one worker cannot keep up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from measuring import make_parser, write_results

from mue_hf.benchmarking.tables import markdown_table
from mue_hf.cli.options import at_least
from mue_hf.evaluation.measure import environment
from mue_hf.inference.sources import Source
from mue_hf.inference.timing import in_turns
from mue_hf.model.images_mue import load_image
from mue_hf.model.processing_mue import MuEProcessor

# What multiprocessing's processes have in their command line; the server that forks workers decodes nothing.
WORKER = b"multiprocessing"
INTERVAL = 0.05


def resident() -> dict[int, tuple[int, float, bool]]:
    """Processes: number -> parent, MiB of resident memory, whether multiprocessing made it."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            pages = int((folder / "statm").read_text().split()[1])
            made = WORKER in (folder / "cmdline").read_bytes()
        except (OSError, IndexError):
            # it has ended
            continue
        found[int(folder.name)] = parent, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, made
    return found


def watched(command: list[str], threads: int) -> tuple[str, dict[str, float]]:
    """Runs a command; what it prints, and its highest memory and that of its workers, in MiB."""
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
    peaks = {"main_mib": 0.0, "worker_mib": 0.0}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, env=variables, stdout=printed, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            now = resident()
            if process.pid in now:
                peaks["main_mib"] = max(peaks["main_mib"], now[process.pid][1])
            below = {number for number, (parent, _, made) in now.items() if parent == process.pid and made}
            # workers are children of the server, or of the process itself
            inside = [mib for number, (parent, mib, made) in now.items() if made and {number, parent} & below]
            peaks["worker_mib"] = max([peaks["worker_mib"], *inside])
            time.sleep(INTERVAL)
        printed.seek(0)
        if process.returncode not in (0, 1):
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        return printed.read(), peaks


def caption(cell: dict[str, Any], common: list[str]) -> dict[str, Any]:
    """One fresh run: images a second, and MiB."""
    with tempfile.TemporaryDirectory() as folder:
        where = ["--out", str(Path(folder, "out.jsonl")), "--json"]
        given = [f"--{name.replace('_', '-')}={value}" for name, value in cell.items()]
        command = [sys.executable, "-m", "mue_hf.cli", "caption", *common, *given, *where]
        printed, peaks = watched(command, cell["threads"])
    done = json.loads(printed.splitlines()[-1])
    return {"rows": done["new_rows"], "bad": done["bad"], "images_per_second": done["rows_per_second"], **peaks}


def decode_seconds(model: str, images: list[str], repeats: int) -> dict[str, float]:
    """Seconds an image: opening and decoding it, and that with what the processor does; medians of rounds."""
    # the processes that decode have one thread as well
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    processor = MuEProcessor.from_pretrained(model).image_processor
    pictures = [row.image for row in Source(images).rows() if row.fault is None]

    def decode() -> float:
        start = time.perf_counter()
        for picture in pictures:
            load_image(picture)
        return (time.perf_counter() - start) / len(pictures)

    def both() -> float:
        start = time.perf_counter()
        for picture in pictures:
            processor(load_image(picture), return_tensors="pt")
        return (time.perf_counter() - start) / len(pictures)

    taken = in_turns({"decode": decode, "prepare": both}, repeats + 1)
    torch.set_num_threads(threads)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One record: the cells in turns, and decoding apart."""
    models = {"torch": (args.model, "torch")} | {Path(name).name: (name, "onnxruntime") for name in args.exports}
    common = [*args.images, *(["--preset", args.preset] if args.preset else []), "--num-beams", str(args.beams)]
    cells = {}
    for threads, size, workers, (name, (model, engine)) in product(
        args.threads, args.batch_sizes, args.workers, models.items()
    ):
        given = {"model": model, "engine": engine, "threads": threads, "batch_size": size, "workers": workers}
        cells[name, threads, size, workers] = given
    # first, since it fails at an image that cannot be used
    decoding, names, rows = decode_seconds(args.model, args.images, args.repeats), ("engine", "threads"), []
    found = in_turns({key: partial(caption, given, common) for key, given in cells.items()}, args.repeats)
    for key, runs in found.items():
        row = dict(zip((*names, "batch_size", "workers"), key, strict=True))
        row |= {name: median(run[name] for run in runs) for name in runs[0]}
        row["decode_share"] = decoding["decode"] * row["images_per_second"]
        row["prepare_share"] = decoding["prepare"] * row["images_per_second"]
        rows.append(row)
    here: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    machine = {name: environment(here, 1)[name] for name in ("hardware", "python", "versions")}
    settings = {name: getattr(args, name) for name in ("model", "images", "beams", "preset", "repeats")}
    return {**settings, "environment": machine, "decoding": decoding, "rows": rows}


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    rows = [
        {
            **{name.replace("_", " "): row[name] for name in ("engine", "threads", "batch_size", "workers")},
            "images/s": f"{row['images_per_second']:.1f}",
            "decoding": f"{row['decode_share']:.1%}",
            "with resizing": f"{row['prepare_share']:.1%}",
            "main MiB": f"{row['main_mib']:.0f}",
            "each worker MiB": f"{row['worker_mib']:.0f}" if row["worker_mib"] else "-",
        }
        for row in record["rows"]
    ]
    taken = {name: f"{1000 * seconds:.1f} ms" for name, seconds in record["decoding"].items()}
    lines = [
        f"{record['model']}, {record['rows'][0]['rows']:.0f} images, {record['beams']} beams, preset "
        f"{record['preset']}, medians of {record['repeats']} runs ({record['environment']['hardware']}). To decode an "
        f"image takes {taken['decode']}, with resizing {taken['prepare']}: shares of the time of a row, beside which "
        "workers do it.",
        "",
        *markdown_table(rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("images", nargs="+", help="what `mue-hf caption --out` takes")
    parser.add_argument("--model", required=True, help="a checkpoint folder, for torch")
    parser.add_argument("--exports", nargs="*", default=[], metavar="DIR", help="folders of `mue-hf export`")
    parser.add_argument("--preset", metavar="NAME", help="exits; default: as `mue-hf caption` chooses")
    parser.add_argument("--beams", type=at_least(1), default=1)
    parser.add_argument("--batch-sizes", type=at_least(1), nargs="+", default=[1, 16])
    parser.add_argument("--workers", type=at_least(0), nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=at_least(1), nargs="+", default=[1, 2])
    args = parser.parse_args(argv)
    record = measure(args)
    write_results(args, record, markdown(record))


if __name__ == "__main__":
    main()
