"""Soak of bulk captioning: damaged images, kills at random moments, torn files; nothing lost, nothing doubled.

`make soak` runs it on 2,000 images with worker processes, `test_soak.py` on fewer. Each run is `mue-hf caption` in a
process of its own that is killed with SIGKILL, until one of them reaches the end.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bulk_fixtures import make_checkpoint, make_images

from mue_hf import cli


def start(arguments: list[str], log: Path) -> int:
    """Forks a process that runs one command; its number. The parent has imported all, so that it starts at once."""
    child = os.fork()
    if child:
        return child
    # A group of its own: workers of a killed process must end by themselves.
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os._exit(cli.main(arguments))


def ended(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition: Callable[..., bool], seconds: float, *arguments: Any) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition(*arguments):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def reached(out: Path, part: Path, goal: float) -> bool:
    return size(part) > goal or out.exists()


def soak(folder: Path, count: int, workers: int, seed: int, kills: int, out_name: str) -> dict:
    """
    One soak.

    Args:
        folder: an empty one, for images, checkpoint and results.
        count: images; a quarter of them is damaged.
        workers: of each run.
        seed: of images, moments and tears.
        kills: how many runs are killed at the least.
        out_name: the result's file name.

    Returns:
        What happened, and how many rows were lost, doubled, or differ from those of a run that nobody killed.
    """
    draw = random.Random(seed)
    # Started processes must not find threads of this one.
    torch.set_num_threads(1)
    made = make_images(folder / "images", count, 0.25, seed)
    names = folder / "images" / "list.txt"
    names.write_text("".join(f"{name}\n" for name in made))
    checkpoint = make_checkpoint(folder / "checkpoint")
    log, out = folder / "log.txt", folder / out_name
    part = folder / f"{out_name}.part"
    fixed = ["caption", str(names), "--model", str(checkpoint), "--dtype", "float64"]

    def command(path: Path) -> list[str]:
        # What may differ between runs does.
        options = {"--out": path, "--workers": workers, "--batch-size": draw.choice([1, 3, 8, 16])}
        return fixed + [str(word) for option in options.items() for word in option]

    whole = folder / "whole.jsonl"
    _, status = os.waitpid(start([*command(whole)], log), 0)
    if os.waitstatus_to_exitcode(status) != 1:
        raise RuntimeError(f"the run that nobody kills must end with 1: {log.read_text()}")

    killed = torn = orphans = 0
    share = count / max(kills, 1)
    while True:
        child = start(command(out), log)
        if killed == kills:
            os.waitpid(child, 0)
            break
        # Somewhere in the rows that are this run's share.
        goal = size(part) + draw.random() * share * size(whole) / count
        wait_until(reached, 120, out, part, goal)
        time.sleep(draw.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        orphans += not wait_until(ended, 20, child)
        if size(part) and draw.random() < 0.5:
            # What a loss of power may leave.
            torn += 1
            content = part.read_bytes()
            part.write_bytes(content[: -draw.randint(1, 200)] if draw.random() < 0.5 else content + content[-99:-9])
    expected, rows = ([json.loads(line) for line in path.read_text().splitlines()] for path in (whole, out))
    numbers = [row["row"] for row in rows]
    bad = [row["image"] for row in rows if row["error"] is not None]
    return {
        "seed": seed,
        "images": count,
        "damaged": sum(damage is not None for damage in made.values()),
        "recorded": len(bad),
        "recorded wrongly": len(set(bad) ^ {name for name, damage in made.items() if damage is not None}),
        "kills": killed,
        "torn files": torn,
        "workers that outlived their run": orphans,
        "rows": len(rows),
        "lost": len(set(range(count)) - set(numbers)),
        "doubled": len(numbers) - len(set(numbers)),
        "out of order": int(numbers != sorted(numbers)),
        "different": sum(row != other for row, other in zip(rows, expected, strict=False)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    args = parser.parse_args()
    sys.stdout.write(f"seed {args.seed}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), args.images, args.workers, args.seed, args.kills, "out.jsonl")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    faults = ("recorded wrongly", "workers that outlived their run", "lost", "doubled", "out of order", "different")
    return int(any(result[name] for name in faults))


if __name__ == "__main__":
    sys.exit(main())
