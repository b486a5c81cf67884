"""From the start of a process to its first caption, in torch and with exports on ONNX Runtime: seconds and memory.

    mue-hf export checkpoints/mue-photos-small runs/photos-onnx
    python benchmarks/cold_start.py --model checkpoints/mue-photos-small --exports runs/photos-onnx

Each cell is a fresh process, in turns with the others. Wall-clock and CPU seconds are split into imports, loading with
folded batch norms, and the first call of `generate` with the image's preprocessing. Memory is what Linux says of the
process (VmRSS, VmHWM): after loading, at its highest, and at its highest in the call alone, all with the pages of
mapped files that are in use. Files are in the page cache after the first round, which is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from measuring import make_parser, write_results
from one_cold_start import STAGES

from mue_hf.benchmarking.tables import markdown_table
from mue_hf.cli.options import at_least
from mue_hf.inference.timing import in_turns

PHOTOS = Path("examples/photos")


def cold_start(given: dict[str, Any]) -> dict[str, Any]:
    """One in a process of its own, with as many threads of OpenMP as it is given."""
    variables = os.environ | {"OMP_NUM_THREADS": str(given["threads"]), "TQDM_DISABLE": "1"}
    told = json.dumps(given | {"start": time.monotonic()})
    command = [sys.executable, str(Path(__file__).with_name("one_cold_start.py")), told]
    return json.loads(subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True).stdout)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds of one cell; the sum of the stages as "total"."""
    for run in runs:
        run["total"] = {unit: sum(run[stage][unit] for stage in STAGES) for unit in ("seconds", "cpu_seconds")}
    groups = {name: runs[0][name] for name in (*STAGES, "total", "mib")}
    return {name: {key: median(run[name][key] for run in runs) for key in keys} for name, keys in groups.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One record: all cells, their rounds in turns after one that warms the page cache."""
    models = {"torch": (args.model, "torch")} | {Path(folder).name: (folder, "onnxruntime") for folder in args.exports}
    common = {"images": args.images, "tokens": args.tokens}
    cells = {}
    for threads, size, beams, (name, (model, engine)) in product(
        args.threads, args.batch_sizes, args.beams, models.items()
    ):
        given = {"model": model, "engine": engine, "threads": threads, "batch_size": size, "beams": beams}
        cells[name, threads, size, beams] = common | given
    found = in_turns({key: partial(cold_start, given) for key, given in cells.items()}, args.repeats + 1)
    rows, names = [], ("engine", "threads", "batch_size", "beams")
    for key, runs in found.items():
        machine = runs[0]["environment"]
        rows.append(dict(zip(names, key, strict=True)) | {"environment": machine} | summary(runs[1:]))
    return {"model": args.model, "tokens": args.tokens, "repeats": args.repeats, "rows": rows}


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    machine = record["rows"][0]["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = []
    for row in record["rows"]:
        one = {name.replace("_", " "): row[name] for name in ("engine", "threads", "batch_size", "beams")}
        one |= {f"{stage} s": f"{row[stage]['seconds']:.2f}" for stage in (*STAGES, "total")}
        one |= {"total CPU s": f"{row['total']['cpu_seconds']:.2f}"}
        rows.append(one | {f"{name} MiB": f"{mib:.0f}" for name, mib in row["mib"].items()})
    lines = [
        f"{record['model']}, {record['tokens']} tokens, medians of {record['repeats']} fresh processes "
        f"({machine['hardware']}; {versions}).",
        "",
        *markdown_table(rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--model", required=True, help="a checkpoint folder, for torch")
    parser.add_argument("--exports", nargs="*", default=[], metavar="DIR", help="folders of `mue-hf export`")
    parser.add_argument("--threads", type=at_least(1), nargs="+", default=[1])
    parser.add_argument("--batch-sizes", type=at_least(1), nargs="+", default=[1, 8])
    parser.add_argument("--beams", type=at_least(1), nargs="+", default=[1, 5])
    parser.add_argument("--tokens", type=at_least(1), default=16, help="new tokens of each caption (16)")
    parser.add_argument("--images", nargs="+", metavar="FILE", help=f"photos, in turns; default: {PHOTOS}")
    args = parser.parse_args(argv)
    args.images = args.images or sorted(map(str, PHOTOS.glob("*.jpg")))
    record = measure(args)
    write_results(args, record, markdown(record))


if __name__ == "__main__":
    main()
