"""Every block of README and docs that can be pasted is run in a copy of the repository's root, in small settings, but
for the commands that are named here with a reason."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mue_hf import cli
from mue_hf.model.criteria_mue import CRITERIA

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("**/*.md"))]
# What a command is or holds -> why it is not run.
NOT_RUN = {
    r"^make ": "a target, which sets up an environment of its own",
    r"^(\S*/)?pip install ": "an installation",
    r"^export PATH=": "the tests have the commands on their path",
    r"^mue-hf app": "a server",
    r"^mue-hf convert ": "needs OFA weights; tests/convert runs it on golden files",
    r"--budget 0\.01 ": "needs hundreds of scenes; the command of docs/evaluate.md is run",
    r" --ray": "tests/inference/test_bulk_ray.py runs it",
    r"examples/big_model\.py": "tests/examples/test_examples.py runs it",
    r" --multi_gpu ": "needs several GPUs",
    r"\b(CKPT|DATA|OFA|OUT|PHOTOS)\b": "a name in capitals stands for files that a user has",
    r"^torchrun|^ACCELERATE_USE_CPU=": "tests/examples/test_examples.py runs it in two processes",
}
# Pages whose commands are not run.
PAGES_NOT_RUN = {"docs/measurements/README.md": "the commands that made the tables take hours"}
# Blocks of a page that are run with those of another.
ELSEWHERE = {"docs/training.md": "README.md", "docs/results.md": "README.md"}
SMALLER = {
    "scenes:0:1250": "scenes:0:2",
    "scenes:0:250": "scenes:0:2",
    "scenes:0:60": "scenes:0:20",
    "scenes:0:40": "scenes:0:4",
    "scenes:0:20": "scenes:0:3",
    "--num_train_epochs 1": "--num_train_epochs 1 --per_device_train_batch_size 16",
    '"train": 60, "dev": 40, "test": 12': '"train": 16, "dev": 12, "test": 4',
    "--threads 2": "--threads 1",
    "--time-rows 60": "--time-rows 1",
    "--time-rows 4 --time-repeats 2": "--time-rows 1 --time-repeats 1",
    "--time-rows 2 --time-repeats 2": "--time-rows 1 --time-repeats 1",
    "--time-repeats 3": "--time-repeats 1",
    "--tokens 8": "--tokens 2",
    "--repeats 3": "--repeats 1",
    "--max_steps 40": "--max_steps 2",
    "max_steps=20": "max_steps=1",
    "SceneDataset(1000": "SceneDataset(10",
    "mue-photos-small runs/photos-onnx": "mue-photos-small runs/photos-onnx --torch-trunk",
}
# Commands that may end with another exit code than 0: whether so little data certify anything is luck.
CODES = {"mue-hf calibrate runs/walk/model": (0, 1)}


class Block(NamedTuple):
    """A fenced block: its page, its first line there, its language and its text."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S):
        yield Block(page, text[: match.start()].count("\n") + 2, match[1], match[2])


def commands(block: Block) -> list[str]:
    """The commands of a shell block, each in one piece."""
    lines = re.sub(r"\\\n\s*", "", block.text)
    # quotes may hold several lines
    found, started = [], ""
    for line in lines.splitlines():
        started += line
        if started.count("'") % 2 == 0:
            found.append(started)
            started = ""
        else:
            started += "\n"
    return [command for command in found if command.strip() and not command.startswith("#")]


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, f"{command} ")), None)


def smaller(text: str) -> str:
    for setting, small in SMALLER.items():
        text = text.replace(setting, small)
    return text


RUN = [block for page in PAGES if page not in PAGES_NOT_RUN for block in blocks(page)]
ALL = [block for page in PAGES for block in blocks(page)]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A copy of what the blocks read and write, as the working folder."""
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    for name in ("docs", "examples", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    criteria, threads = dict(CRITERIA), torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    for name in CRITERIA.keys() - criteria:
        del CRITERIA[name]


def run(command: str) -> int:
    """A command as a shell would run it; `mue-hf` and `python -c` in this process, whose imports are done."""
    if command.startswith("mue-hf "):
        return cli.main(shlex.split(command, comments=True)[1:])
    if command.startswith("python -c "):
        exec(shlex.split(command)[2], {"__name__": "__main__"})
        return 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-e", "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return 0


@pytest.mark.skipif(
    find_spec("datasets") is None or find_spec("timm") is None, reason="needs the extras train and timm"
)
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.page == page for block in RUN)])
def test_blocks_run(page, clone):
    done = {smaller(command) for block in RUN if block.page == ELSEWHERE.get(page) for command in commands(block)}
    for block in RUN:
        if block.page == page and block.language == "python":
            code = compile(smaller(block.text), f"{page}, line {block.line}", "exec")
            exec(code, {"__name__": "__main__"})
        elif block.page == page and block.language == "bash":
            for command in map(smaller, commands(block)):
                if reason(command) is None and command not in done:
                    allowed = next((codes for start, codes in CODES.items() if command.startswith(start)), (0,))
                    assert run(command) in allowed, f"{page}, line {block.line}: {command}"


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.page}:{block.line}")
def test_languages(block):
    """What a block is, is said: Python and shell are run, text is what they print."""
    assert block.language in ("python", "bash", "text")


def test_what_is_not_run_is_there():
    """A reason whose command is gone, and a smaller setting of nothing, are dropped."""
    found = [command for block in ALL if block.language == "bash" for command in commands(block)]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, f"{command} ") for command in found), pattern
    for setting in SMALLER:
        assert any(setting in block.text for block in RUN), setting
