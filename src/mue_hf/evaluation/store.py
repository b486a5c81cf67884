"""Files that a run leaves for the next one, each whole or not at all: predictions, signals."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..files import write_whole
from ..inference.predict import Prediction
from .signals import Signals

# Names of the encoder's streams in a file of signals begin with it.
ENCODER = "encoder."


def content_key(content: Any) -> str:
    """A short name for what JSON can hold: other content, another name."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Writes predictions, a line each, for `read_predictions`."""
    write_whole(path, "".join(json.dumps(asdict(one)) + "\n" for one in predictions))


def read_predictions(path: Path) -> list[Prediction] | None:
    """What `write_predictions` wrote; None where there is no such file."""
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Prediction(**{name: _tuple(value) for name, value in row.items()}) for row in rows]


def write_signals(path: Path, signals: Signals) -> None:
    """Writes signals for `read_signals`."""
    tensors = {name: value for name, value in vars(signals).items() if name != "encoder"}
    tensors |= {ENCODER + stream: cosines for stream, cosines in signals.encoder.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_signals(path: Path) -> Signals | None:
    """What `write_signals` wrote; None where there is no such file."""
    if not path.exists():
        return None
    tensors = load_file(path)
    streams = [name for name in tensors if name.startswith(ENCODER)]
    encoder = {name.removeprefix(ENCODER): tensors.pop(name) for name in streams}
    return Signals(encoder=encoder, **tensors)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


__all__ = [
    "content_key",
    "read_predictions",
    "read_signals",
    "write_predictions",
    "write_signals",
]
