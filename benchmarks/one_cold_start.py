"""One cold start, which `cold_start.py` runs in a process of its own: nothing is imported before the clock is read."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("imports", "loading", "caption")


def memory(name: str) -> float:
    """MiB of this process by the name that Linux gives them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def work(given: dict[str, Any]) -> dict[str, Any]:
    """One cold start in this process, begun at `given["start"]`: seconds of each stage, and MiB.

    `time.monotonic` is the same clock in all processes; `getrusage` counts the CPU from the process's beginning.
    """
    marks = [(given["start"], 0.0)]

    def mark() -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        marks.append((time.monotonic(), used.ru_utime + used.ru_stime))

    from PIL import Image

    from mue_hf.inference.loading import load_checkpoint
    from mue_hf.model.engine_mue import load_onnxruntime

    if given["engine"] != "torch":
        load_onnxruntime()
    mark()
    model, processor = load_checkpoint(given["model"], threads=given["threads"], engine=given["engine"])
    mark()
    loaded, peak = memory("VmRSS"), memory("VmHWM")
    # the highest so far is forgotten
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    images = [Image.open(given["images"][row % len(given["images"])]) for row in range(given["batch_size"])]
    options = {"num_beams": given["beams"], "exit_criterion": "never", "do_sample": False}
    model.generate(
        **processor(images=images), **options, max_new_tokens=given["tokens"], min_new_tokens=given["tokens"]
    )
    mark()
    taken = {
        name: {"seconds": after[0] - before[0], "cpu_seconds": after[1] - before[1]}
        for name, before, after in zip(STAGES, marks, marks[1:], strict=False)
    }
    call = memory("VmHWM")
    from mue_hf.evaluation.measure import environment

    mib = {"loaded": loaded, "caption": call, "peak": max(peak, call)}
    return {**taken, "mib": mib, "environment": environment(model, given["batch_size"])}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(work(json.loads(sys.argv[1]))))
