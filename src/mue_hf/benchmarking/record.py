"""The record of a benchmark: one JSON file, written whole after every cell, from which an interrupted run goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_whole

# Keys of version 0.1.
RENAMED = {"arms": "variants", "saving_kept": "realised_saving"}


def upgraded(record: Any) -> Any:
    """A record with the keys of this version; where nothing says what ran a variant, it was torch."""
    record = _renamed(record)
    record["settings"].setdefault("exports", {})
    torch = {"engine": "torch", "precision": record["environment"].get("dtype")}
    for cell in record["cells"].values():
        cell |= {"variants": {name: torch | one for name, one in cell["variants"].items()}}
    return record


def _renamed(part: Any) -> Any:
    if isinstance(part, list):
        return [_renamed(value) for value in part]
    if isinstance(part, dict):
        return {RENAMED.get(name, name): _renamed(value) for name, value in part.items()}
    return part


class Record:
    """Cells by name, and the settings and the machine that all of them belong to.

    Args:
        path (`Path`): the file; what it holds already is kept.
        head (`dict`): "settings" and "environment"; the file must have been made under the same.

    Raises:
        ValueError: if the file is no such record, or belongs to other settings or another machine.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]):
        self.path = path
        # As JSON gives it back: tuples are lists.
        self.content: dict[str, Any] = json.loads(json.dumps({**head, "cells": {}}))
        if not path.exists():
            return
        try:
            before = upgraded(json.loads(path.read_text(encoding="utf-8")))
            self.content["cells"] = before["cells"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`output` {path} is no record of mue-hf bench; name another file.") from error
        for part in head:
            for name, ours in self.content[part].items():
                if ours != (theirs := before.get(part, {}).get(name)):
                    raise ValueError(
                        f"`output` {path} holds cells with {name} = {theirs!r}, this run has {ours!r}; name another "
                        "file, or delete this one."
                    )

    def __contains__(self, name: str) -> bool:
        return name in self.content["cells"]

    def add(self, name: str, cell: Mapping[str, Any]) -> None:
        """Adds a cell and writes the file."""
        self.content["cells"][name] = json.loads(json.dumps(cell))
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")


__all__ = ["Record", "upgraded"]
