"""What a checkpoint must have to be published: whole files, and presets and records of its own weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..inference.loading import check_not_replaced
from ..model.exit_options_mue import resolve_options
from ..model.graph_files_mue import FOLDER, MANIFEST, engine_fingerprint, read_manifest
from ..model.modeling_mue import MuEForConditionalGeneration
from ..training.card import exit_presets

NEEDED = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16", "float16")
# What the card says of presets that were calibrated on graphs in int8.
INT8_ENGINE = 'int8 with `engine="onnxruntime"` alone'


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads weights from, the index of several among them; all of them are there."""
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
    """Raises a ValueError unless this is a folder with all files of a MuE model and its processor; loads nothing."""
    check_not_replaced(folder)
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
    """The model of a checkpoint folder, in evaluation mode and in a dtype, that of its config for "auto"; a ValueError
    if weights are damaged or missing."""
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "output_loading_info": True,
    }
    try:
        # The annotation does not know that it may return two things.
        loaded: Any = MuEForConditionalGeneration.from_pretrained(folder, **options)
        model, info = loaded
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {error}; save the model again.") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} tensors, {missing[0]} among them; save the model again."
        )
    return model.eval()


def matching_records(
    folder: Path,
    model: PreTrainedModel,
    fingerprint: Callable[[str], str | None],
    records: Sequence[Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    """The records that were measured on the weights and presets of a checkpoint; `fingerprint` is that of its weights
    in a dtype.

    Raises:
        ValueError: if none was measured on these weights, or one with thresholds that its preset has no more.
    """
    kept = [record for record in records if record["weights_fingerprint"] == fingerprint(record["dtype"])]
    if not kept:
        raise ValueError(
            f"`--evaluation` must hold records of the weights in {folder}, got {len(records)} of other weights; run "
            "`mue-hf evaluate` on this checkpoint."
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


def preset_dtypes(folder: Path, model: PreTrainedModel, fingerprint: Callable[[str], str | None]) -> dict[str, str]:
    """The dtype in which each calibrated preset holds, or the engine, by name; a ValueError if one is of other
    weights."""
    dtypes, engine = {}, None
    if (folder / FOLDER / MANIFEST).is_file():
        engine = engine_fingerprint(read_manifest(folder))
    for name, preset in exit_presets(model).items():
        expected = preset.get("weights_fingerprint")
        if expected is None:
            continue
        found = next((dtype for dtype in DTYPES if fingerprint(dtype) == expected), None)
        found = INT8_ENGINE if found is None and expected == engine else found
        if found is None:
            raise ValueError(
                f"the preset {name!r} was calibrated on other weights than those in {folder}: what it promises does "
                "not hold; run `mue-hf calibrate` again, or remove it from generation_config.json."
            )
        dtypes[name] = found
    return dtypes


__all__ = ["WEIGHTS_INDEX", "check_folder", "load_complete_model", "matching_records", "preset_dtypes", "weight_files"]
