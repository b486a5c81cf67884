"""Bulk captioning under kills, in short: `make soak` is the long version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(
    ("images", "workers", "kills"),
    [pytest.param(150, 0, 8, id="without workers"), pytest.param(80, 2, 3, id="with workers")],
)
def test_nothing_is_lost_or_doubled(images, workers, kills):
    """A process of its own, which forks: this one has threads. A failure prints the seed."""
    program = Path(__file__).parents[1] / "soak.py"
    counts = {"--images": images, "--workers": workers, "--kills": kills}
    arguments = [str(word) for option in counts.items() for word in option]
    result = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
