"""Presets in the generation_config.json of a checkpoint."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..model.exit_options_mue import SHIPPED_PRESETS


def write_preset(folder: str | os.PathLike, name: str, preset: Mapping[str, Any]) -> None:
    """Adds a preset to the generation_config.json of a checkpoint, in place of one of the same name; a ValueError if
    there is no such file, it is damaged, or the name is empty or that of a preset of the paper."""
    path = check_preset(folder, name)
    config = json.loads(path.read_text())
    config["exit_presets"] = (config.get("exit_presets") or {}) | {name: dict(preset)}
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_preset(folder: str | os.PathLike, name: str) -> Path:
    """The file that `write_preset` would change, if it could."""
    if name in SHIPPED_PRESETS or not name.strip():
        raise ValueError(f"`preset` must be a name of its own, got {name!r}; choose another.")
    path = Path(folder) / "generation_config.json"
    try:
        json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the checkpoint must be a local folder with a whole generation_config.json, got {path}: {error}; "
            "save the model there with `save_pretrained`."
        ) from error
    return path


__all__ = ["check_preset", "write_preset"]
