"""Presets in the generation_config.json of a checkpoint."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..model.criteria_mue import CRITERIA
from ..model.exit_options_mue import SHIPPED_PRESETS, ExitOptions


def write_preset(
    folder: str | os.PathLike, name: str, preset: Mapping[str, Any], exit_candidates: Sequence[int] | None = None
) -> None:
    """Adds a preset to the generation_config.json of a checkpoint, in place of one of the same name, and the tokens
    that its criterion looks at.

    Raises:
        ValueError: if there is no such file, it is damaged, the name is empty or that of a preset of the paper, or
            another preset of the same weights looks at other tokens that are saved.
    """
    path = check_preset(folder, name)
    config = json.loads(path.read_text())
    presets = {other: dict(one) for other, one in (config.get("exit_presets") or {}).items() if other != name}
    if exit_candidates is not None:
        _share_candidates(config.get("exit_candidates"), exit_candidates, presets, preset)
        config["exit_candidates"] = list(exit_candidates)
    config["exit_presets"] = presets | {name: dict(preset)}
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _share_candidates(
    saved: Sequence[int] | None, tokens: Sequence[int], presets: dict[str, Any], preset: Mapping[str, Any]
) -> None:
    """Lets the other presets look at what they looked at when `tokens` take the place of those that are `saved`."""
    looking = [
        name
        for name, one in presets.items()
        if CRITERIA[one.get("exit_criterion", ExitOptions().exit_criterion)].needs_logits
        and "exit_candidates" not in one
    ]
    if saved is None:
        for name in looking:
            # the whole vocabulary
            presets[name]["exit_candidates"] = None
        return
    # what other weights promise is void already
    weights = preset.get("weights_fingerprint")
    bound = [name for name in looking if presets[name].get("weights_fingerprint") == weights]
    if bound and sorted(saved) != sorted(tokens):
        raise ValueError(
            f"`exit_candidates` must stay the {len(saved)} tokens that are saved, which the presets {bound} look at, "
            f"got {len(tokens)} others; calibrate with the saved ones, or take these presets out of the file first."
        )


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
