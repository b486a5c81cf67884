"""What a checkpoint must have to be published: whole files, and presets and records of its own weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..model.exit_options_mue import resolve_options
from ..model.generation_mue import weights_fingerprint
from ..model.modeling_mue import MuEForConditionalGeneration

NEEDED = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16", "float16")


def weight_files(folder: Path) -> list[Path]:
    """
    The files that `from_pretrained` reads weights from, the index of several among them.

    Raises:
        ValueError: if there are none, or some of several are missing.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.is_file():
        raise ValueError(
            f"{folder} must hold safetensors weights, got neither {WEIGHTS} nor {WEIGHTS_INDEX}; load the model and "
            "save it with `model.save_pretrained`."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must list the weights, got {error!r}; save the model again.") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {missing}, which {WEIGHTS_INDEX} lists; copy them, or save the model again.")
    return [index, *(folder / name for name in names)]


def check_folder(folder: Path) -> None:
    """
    Looks for what a published checkpoint must have, before anything is loaded.

    Raises:
        ValueError: if it is no folder with a MuE model, or lacks files.
    """
    if not folder.is_dir():
        raise ValueError(f"the checkpoint must be a folder, got {folder}; download or convert it first.")
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}; save the model and its processor there with `save_pretrained`."
        )
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} must be JSON: {error}; save the model again.") from error
    if model_type != "mue":
        raise ValueError(
            f'the checkpoint must have model_type "mue", got {model_type!r} in {folder}; `mue-hf convert` makes one '
            "from an OFA checkpoint."
        )
    weight_files(folder)


def load_complete_model(folder: Path, dtype: str = "float32") -> MuEForConditionalGeneration:
    """
    The model of a checkpoint folder, all of whose weights are there.

    Raises:
        ValueError: if the weights are damaged or are not all that the configuration asks for.
    """
    try:
        # The annotation of `from_pretrained` does not know that it may return two things.
        loaded: Any = MuEForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True
        )
        model, info = loaded
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {error}; save the model again.") from error
    if info["missing_keys"]:
        raise ValueError(
            f"the weights in {folder} lack {len(info['missing_keys'])} tensors, {sorted(info['missing_keys'])[0]} "
            "among them; save the model again."
        )
    return model.eval()


class Fingerprints:
    """Those of a checkpoint folder's weights by dtype, each loaded when it is first asked for."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self.known = {"float32": weights_fingerprint(model)}

    def __getitem__(self, dtype: str) -> str | None:
        if dtype not in self.known:
            self.known[dtype] = weights_fingerprint(load_complete_model(self.folder, dtype))
        return self.known[dtype]


def matching_records(
    model: PreTrainedModel, fingerprints: Fingerprints, records: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """
    The records that were measured on the weights and presets of a checkpoint folder.

    Raises:
        ValueError: if none was measured on these weights, or one with thresholds that its preset has no more.
    """
    kept = [record for record in records if record["weights_fingerprint"] == fingerprints[record["dtype"]]]
    if not kept:
        raise ValueError(
            f"`--evaluation` must hold records of the weights in {fingerprints.folder}, got {len(records)} of other "
            "weights; run `mue-hf evaluate` on this checkpoint."
        )
    saved = model.generation_config.to_dict()
    for record in kept:
        if record["criterion"] == "presets" and "options" in record:
            now = json.loads(json.dumps(asdict(resolve_options(record["exits"], {}, saved, model.config))))
            # an option that went since then says nothing
            if any(now[name] != value for name, value in record["options"].items() if name in now):
                raise ValueError(
                    f"the preset {record['name']!r} was evaluated with other thresholds than it has now; run `mue-hf "
                    "evaluate` again."
                )
    return kept


def preset_dtypes(fingerprints: Fingerprints, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """
    The dtype in which each calibrated preset holds, by name.

    Raises:
        ValueError: if one was calibrated on other weights.
    """
    dtypes = {}
    for name, preset in presets.items():
        expected = preset.get("weights_fingerprint")
        if expected is None:
            continue
        found = next((dtype for dtype in DTYPES if fingerprints[dtype] == expected), None)
        if found is None:
            raise ValueError(
                f"the preset {name!r} was calibrated on other weights than those in {fingerprints.folder}: what it "
                "promises does not hold; run `mue-hf calibrate` again, or remove it from generation_config.json."
            )
        dtypes[name] = found
    return dtypes


__all__ = [
    "WEIGHTS_INDEX",
    "Fingerprints",
    "check_folder",
    "load_complete_model",
    "matching_records",
    "preset_dtypes",
    "weight_files",
]
