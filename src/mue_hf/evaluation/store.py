"""Files that a run leaves for the next one: records, and each whole or not at all, predictions and signals."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from ..data.features import trunk_fingerprint, unfolded
from ..files import write_whole
from ..inference.predict import Prediction
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .signals import Signals

# Begins the names of the encoder's streams in a file of signals.
ENCODER = "encoder."


def content_key(content: Any) -> str:
    """A short name for what JSON can hold: other content, another name."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def conditions(
    model: MuEForConditionalGeneration, processor: MuEProcessor, data: str, task: str, prompt_type: str
) -> dict[str, Any]:
    """What outputs depend on beside the options of their call, in words and fingerprints; `data` is that of the rows.
    Exits that are saved with the model are left out: every run states its own."""
    others = ("transformers_version", "_from_model_config")
    saved = model.generation_config.to_dict().items()
    decoding = {name: value for name, value in saved if "exit" not in name and name not in others}
    with unfolded(model):
        weights = trunk_fingerprint(model)
    known = {"task": task, "weights": weights, "data": data, "decoding": decoding, "prompt_type": prompt_type}
    return known | {"processor": processor.image_processor.to_dict()}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; a last line that an interruption cut is dropped. A ValueError if another line is
    no record, before anything is dropped."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.decode().splitlines(), 1):
        try:
            records.append(json.loads(line))
            records[-1]["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`--output` must hold records, got in line {number} of {path}: {error}.") from error
    cut, start = content[len(whole) :], b'{"key"'
    if not start.startswith(cut[: len(start)]):
        raise ValueError(f"`--output` must hold records, got something else at the end of {path}; name another file.")
    if cut:
        os.truncate(path, len(whole))
    return records


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a record to a results file; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(json.dumps(record).encode() + b"\n")


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Writes predictions, a line each, for `read_predictions`."""
    write_whole(path, "".join(json.dumps(asdict(one)) + "\n" for one in predictions))


def read_predictions(path: Path) -> list[Prediction] | None:
    """What `write_predictions` wrote; None where there is no such file."""
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lists = ("decoder_exit_layers", "token_ids")
    return [Prediction(**row | {name: tuple(row[name]) for name in lists}) for row in rows]


def write_signals(path: Path, signals: Signals) -> None:
    """Writes signals for `read_signals`."""
    tensors = {name: value for name, value in vars(signals).items() if name != "encoder"}
    tensors |= {ENCODER + stream: cosines for stream, cosines in signals.encoder.items()}
    write_whole(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_signals(path: Path) -> Signals | None:
    """What `write_signals` wrote; None where there is no such file."""
    if not path.exists():
        return None
    tensors = load_file(path)
    streams = [name for name in tensors if name.startswith(ENCODER)]
    encoder = {name.removeprefix(ENCODER): tensors.pop(name) for name in streams}
    return Signals(encoder=encoder, **tensors)


__all__ = [
    "append_record",
    "conditions",
    "content_key",
    "read_predictions",
    "read_records",
    "read_signals",
    "write_predictions",
    "write_signals",
]
