"""Files and folders that appear whole or not at all, and JSON lines of which some may be broken."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a name beside `path` to write to, and makes that file `path` when the block ends well: whoever reads
    `path` finds the old content or all of the new. Makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        # the name must not reach the disk before the content
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes text (UTF-8) or bytes to a file, whole or not at all; makes its folder."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Gives a new folder beside `path` to fill, and makes it `path` when the block ends well.

    Args:
        path: where nothing is, or an empty folder.
        overwrite (`bool`, *optional*, defaults to `False`): True replaces a checkpoint folder too.

    Raises:
        `ValueError`: Before the block, if something else is there.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"The destination must be a folder, got the file {path}; choose another name.")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"The destination must be empty or new, got {path}; choose another or pass --overwrite.")
        if not (path / "config.json").is_file():
            raise ValueError(f"Only a checkpoint can be overwritten, but {path} has no config.json; choose another.")
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            path.rename(old)
        part.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def json_lines(path: str | os.PathLike) -> Iterator[dict[str, Any] | str]:
    """The objects of a JSONL file, in UTF-8 with or without a mark, blank lines passed over; in place of a line that
    holds no object a sentence that says so, with its number from 1."""
    with open(path, encoding="utf-8-sig", errors="backslashreplace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (RecursionError, ValueError) as error:
                yield f"line {number} must be JSON, got an error: {error}."
            else:
                yield record if isinstance(record, dict) else f"line {number} must be a JSON object."


__all__ = ["json_lines", "whole_file", "whole_folder", "write_whole"]
