"""benchmarks/compare_versions.py: a checkout beside itself gives the same tokens."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_checkout_beside_itself():
    command = [sys.executable, "benchmarks/compare_versions.py", ".", ".", "--model", "checkpoints/mue-scenes-small"]
    command += ["--image-size", "64", "--tokens", "2", "--rounds", "2", "--generate", "exit_criterion=never"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[\d.]+ s before, [\d.]+ s after: [\d.]+ \[[\d., -]+\]; the same tokens\n", done.stdout)
