"""Reads OFA checkpoints in both published layouts, from a path or the Hub, without running code that they hold."""

import json
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from .names import some

WEIGHT_FILES = [
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
]
HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*.bin", "*.pt"]


def find_source(source: str | os.PathLike) -> tuple[str, Path, Path]:
    """The layout ("fairseq" or "transformers fork"), weight file and folder of a path or a Hub repository.

    Raises:
        `ValueError`: If nothing is there, or neither layout.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _download(os.fspath(source))
    if path.is_file():
        return "fairseq", path, path.parent
    weights = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if (path / "config.json").is_file() and weights:
        return "transformers fork", weights[0], path
    checkpoints = sorted(path.glob("*.pt"))
    if len(checkpoints) == 1:
        return "fairseq", checkpoints[0], path
    found = some(sorted(file.name for file in path.iterdir()))
    raise ValueError(
        f"`source` must be an OFA checkpoint: config.json beside one of {', '.join(WEIGHT_FILES)} (transformers "
        f"fork), or exactly one .pt file (fairseq); {path} holds {found or 'nothing'}."
    )


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".pt", ".bin", ".safetensors")):
        raise ValueError(f"`source` must exist or be a Hub repository such as OFA-Sys/ofa-base, got {name!r}.")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"`source` must be a local path or a Hub repository that can be read: {name!r} is no path here, and the "
            f"download failed ({type(error).__name__}); check the name, the network and your access."
        ) from error


def find_vocabulary(vocab: str | os.PathLike | None, folder: Path | None) -> Path:
    """The folder with vocab.json and merges.txt: `vocab`, or else that of the source (None if it has none)."""
    words = folder if vocab is None else Path(vocab).expanduser()
    if words is None:
        raise ValueError(
            "`vocab` is required for a fairseq file, which carries no vocabulary: pass --vocab DIR, a folder with "
            "OFA's vocab.json and merges.txt."
        )
    if missing := [name for name in ("vocab.json", "merges.txt") if not (words / name).is_file()]:
        raise ValueError(f"The vocabulary folder {words} lacks {' and '.join(missing)}; pass --vocab DIR with both.")
    return words


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an OFA checkpoint.

    Raises:
        `ValueError`: If it cannot be read, or belongs to a converted checkpoint.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file, but cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    if content.get("model_type") == "mue":
        raise ValueError(f"`source` must be an OFA checkpoint, but {path} says that it is converted already.")
    return content


def read_weights(layout: str, file: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors by OFA's names and the settings beside them of what [`find_source`] found.

    Raises:
        `ValueError`: If a file is damaged, missing, or holds more than tensors and settings without `allow_pickle`.
    """
    if layout == "fairseq":
        weights, settings = _read_fairseq(file, allow_pickle)
    else:
        weights, settings = _read_fork(file, allow_pickle), read_json(file.parent / "config.json")
    other = [f"{name} ({type(value).__name__})" for name, value in weights.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{file} must hold tensors only where the weights are, got {some(other)}.")
    return weights, settings


def _read_fork(file: Path, allow_pickle: bool) -> dict[str, Any]:
    shards = [file]
    if file.suffix == ".json":
        shards = [file.parent / name for name in sorted(set(read_json(file).get("weight_map", {}).values()))]
        if (absent := [shard.name for shard in shards if not shard.is_file()]) or not shards:
            raise ValueError(f"{file} must name files beside it; missing: {some(absent) or 'all, it names none'}.")
    weights: dict[str, Any] = {}
    for shard in tqdm(shards, desc="Reading", unit="file", disable=None):
        try:
            weights |= load_file(shard) if shard.suffix == ".safetensors" else _unpickle(shard, allow_pickle)
        except SafetensorError as error:
            raise ValueError(f"{shard} must be a safetensors file, but cannot be read: {error}.") from error
    return weights


def _read_fairseq(file: Path, allow_pickle: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
    content = _unpickle(file, allow_pickle)
    if not isinstance(content.get("model"), dict):
        raise ValueError(
            f"{file} must be a fairseq checkpoint with a dict `model`, got {some([str(key) for key in content])}; "
            f"for the transformers fork pass the folder with its config.json."
        )
    # Older files hold the arguments under "args", newer ones under "cfg" with the model's own part inside.
    arguments = content.get("args") or (content.get("cfg") or {}).get("model") or {}
    return content["model"], arguments if isinstance(arguments, Mapping) else vars(arguments)


def _unpickle(file: Path, allow_pickle: bool) -> dict[str, Any]:
    """What `torch.save` wrote; nothing but tensors, plain containers, arguments and numbers unless allowed."""
    # Plain data without code of its own: fairseq's arguments, and the losses that numpy averaged.
    scalar = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    harmless += [Namespace, np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64"))]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(file, map_location="cpu", weights_only=not allow_pickle)
    except ImportError as error:
        raise ValueError(f"{file} holds objects of a package that is not installed: {error}.") from error
    # A damaged pickle raises almost anything.
    except Exception as error:
        if foreign := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            raise ValueError(
                f"{file} holds Python objects besides tensors ({foreign.group(1)}), and loading those can run code; "
                f"pass --allow-pickle (allow_pickle=True) only if you trust whoever made the file."
            ) from error
        raise ValueError(
            f"{file} must be a file written by torch.save, but it cannot be read ({type(error).__name__}); "
            f"it may be damaged or incomplete."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dict of tensors, got {type(content).__name__}; pass OFA's.")
    return content


__all__ = ["find_source", "find_vocabulary", "read_json", "read_weights"]
