"""Two checkouts of this package in turns: what a change costs, or saves, in whole captions at fixed settings.

    git worktree add ../before REVISION
    python benchmarks/compare_versions.py ../before . --model checkpoints/mue-photos-small --batch-size 16
    python benchmarks/compare_versions.py ../before . --image-size 480        # OFA-base shapes, random weights

Each checkout runs in a process of its own, in the same environment; they take turns. Printed are the median CPU
seconds of both, the second as a ratio of the first with its quartiles over rounds, and whether the tokens are equal.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles


def work(checkout: str, args: argparse.Namespace) -> None:
    """Captions the same pictures once for every line on stdin; prints CPU seconds and tokens."""
    sys.path.insert(0, str(Path(checkout) / "src"))
    import torch

    from mue_hf import MuEConfig, MuEForConditionalGeneration

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.model is None:
        model = MuEForConditionalGeneration(MuEConfig.from_size("base"))
    else:
        model = MuEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    model.eval().requires_grad_(False)
    if hasattr(model, "fold_batch_norms"):  # version 0.1.0 did so by itself
        model.fold_batch_norms()
    inputs = {
        "pixel_values": torch.randn(args.batch_size, 3, args.image_size, args.image_size),
        "input_ids": torch.arange(4, 12).repeat(args.batch_size, 1),
    }
    options = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "num_beams": args.num_beams}
    for _ in sys.stdin:
        start = time.process_time()
        tokens = model.generate(**inputs, **options, **dict(args.generate))
        print(json.dumps([time.process_time() - start, tokens.tolist()]), flush=True)


def setting(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value in JSON or a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, metavar="CHECKOUT", help="folders with src/mue_hf: before and after")
    parser.add_argument("--model", help="a checkpoint folder (default: OFA-base shapes with random weights)")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--generate", type=setting, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    command = [sys.executable, *sys.argv, "--worker"]
    workers = [subprocess.Popen([*command, checkout], **pipes) for checkout in args.checkouts]

    def run(worker: subprocess.Popen) -> list:
        worker.stdin.write("\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    same = run(workers[0])[1] == run(workers[1])[1]
    seconds: list[tuple[float, float]] = []
    for number in range(args.rounds):
        turn = workers if number % 2 else workers[::-1]
        found = {worker.pid: run(worker)[0] for worker in turn}
        seconds.append((found[workers[0].pid], found[workers[1].pid]))
    for worker in workers:
        worker.communicate()
    before, after = (median(column) for column in zip(*seconds, strict=True))
    low, _, high = quantiles([second / first for first, second in seconds], n=4)
    print(f"{before:.4f} s before, {after:.4f} s after: {after / before:.3f} [{low:.3f}, {high:.3f}]", end="; ")
    print("the same tokens" if same else "OTHER tokens")


if __name__ == "__main__":
    main()
