"""The model card of a checkpoint: what it is, what was measured on it, and what its exit presets promise."""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult
from transformers import PreTrainedModel

from ..evaluation.tables import describe_environment, describe_samples, make_table
from ..metrics.intervals import rounded_up
from ..training.card import About, exit_presets, fill_card

# Scores that a model index names: how it calls the metric, and how people do.
INDEXED = {
    "accuracy": ("accuracy", "accuracy"),
    "bleu_4": ("bleu", "BLEU-4"),
    "cider": ("cider", "CIDEr-D"),
    "meteor": ("meteor", "METEOR"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "spice": ("spice", "SPICE"),
}
# Records that differ in one of these cannot stand in one table.
GROUPED = ("task", "data", "decoding", "prompt_type", "premise", "images", "dtype")


def read_about(path: str | os.PathLike) -> About:
    """What a card states beside measurements, from a TOML file; a ValueError if it does not fit [`About`]."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--about` must be a TOML file, got {path}: {error}; fix or drop it.") from error
    types = {one.name: one.type for one in fields(About)}
    if unknown := sorted(content.keys() - types.keys()):
        raise ValueError(f"`--about` has {unknown} in {path}, which no card shows; it may have {sorted(types)}.")
    containers: dict[Any, type] = {list[str]: list, dict[str, str]: dict}
    for name, value in content.items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        container = containers.get(types[name], str)
        if not isinstance(value, container) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"`{name}` must be a {types[name]} of text in {path}, got {value!r}; see `About`.")
    return About(**content)


def read_evaluation(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a file that `mue-hf evaluate` wrote, of points with one name the last; a ValueError if it holds
    something else."""
    points: dict[str, dict[str, Any]] = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            points[json.dumps([record[name] for name in ("name", "weights_fingerprint", *GROUPED)])] = record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`--evaluation` must be a file of `mue-hf evaluate --output`, got {path}: {error!r}; run it again."
        ) from error
    if not points:
        raise ValueError(f"`--evaluation` must hold records, got none in {path}; run `mue-hf evaluate`.")
    return list(points.values())


def public_record(record: Mapping[str, Any], model_id: str) -> dict[str, Any]:
    """A record for others to read: under the model's public name, and without the folders of this machine."""

    def public(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
        path = PurePath(holder[name])
        outside = path.is_absolute() or holder[name].startswith((".", "~"))
        return {**holder, name: path.name if outside else holder[name]}

    ends: dict[str, Any] = {end: [public(one, "image_id") for one in record[end]] for end in ("easiest", "hardest")}
    if record.get("samples"):
        ends["samples"] = {place: public(one, "image_id") for place, one in record["samples"].items()}
    if record.get("words_from"):
        sources, split = record["words_from"]
        ends["words_from"] = [[public({"data": source}, "data")["data"] for source in sources], split]
    return {**record, **ends, "model": model_id, "source": public(record["source"], "data")}


def evaluation_groups(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Records that may stand in one table: of the same task, data and decoding, in their order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(json.dumps([record[name] for name in GROUPED], sort_keys=True), []).append(record)
    return list(groups.values())


def render_card(
    model: PreTrainedModel,
    model_id: str,
    about: About,
    groups: Sequence[Sequence[Mapping[str, Any]]] = (),
    plots: Sequence[str] = (),
    dtypes: Mapping[str, str] | None = None,
    carries_code: bool = True,
) -> str:
    """The card as Markdown with a metadata block.

    Args:
        model ([`MuEForConditionalGeneration`]): whose configuration and exit presets are described.
        model_id (`str`): Hub id or folder by which it is loaded.
        about ([`About`]): what its makers state.
        groups: see [`evaluation_groups`].
        plots (sequence of `str`): the name of a picture for each group, empty for none.
        dtypes (`dict[str, str]`, *optional*): names of calibrated presets to the dtype in which they hold.
        carries_code (`bool`, *optional*, defaults to `True`): whether it loads without this package.
    """
    promises = {
        name: _promise(preset, (dtypes or {}).get(name)) if "risk" in preset else "none: chosen by hand"
        for name, preset in exit_presets(model).items()
    }
    pairs = zip(groups, plots or [""] * len(groups), strict=True)
    described = [_describe_group(group, about) | {"plot": plot} for group, plot in pairs]
    results = [result for group in groups for result in _index(group, about)]
    return fill_card(model, model_id, about, promises, described, results, carries_code)


def _promise(preset: Mapping[str, Any], dtype: str | None) -> str:
    """What a preset promises in words: about outputs, or about scores."""
    limit = rounded_up(preset.get("budget", preset["bound"]))
    captions = preset["task"] == "captioning"
    if preset["risk"] == "disagreement":
        what = f"about outputs: at most {100 * limit:.3g}% of the {'captions' if captions else 'answers'} "
        what += "are others than without exits"
    else:
        score = "CIDEr-D (1 is what papers call 100)" if captions else "accuracy"
        what = f"about scores: {score} falls by at most {limit:.3g} on average, though outputs may change"
    if preset.get("guarantee") == "expectation":
        surely = "in expectation over calibrations (conformal risk control), not with confidence for this one"
    else:
        surely = f"with confidence {1 - preset['delta']:.0%} ({preset['method']})"
    sentence = f"{what}, {surely}; tested on {preset['n']} images that the search had not seen"
    settings: dict[str, Any] = dict(preset.get("certified_for", {}))
    settings.pop("dtype", None)
    batch = settings.pop("batch_size", None)
    if settings := settings or preset.get("generation", {}):
        sentence += f", under `{json.dumps(settings)}`"
    return sentence + (f", in batches of {batch}" if batch else "") + (f", in {dtype}" if dtype else "")


def _data_name(record: Mapping[str, Any], about: About) -> str:
    data = record["source"]["data"]
    return about.data_names.get(data) or about.data_names.get(PurePath(data).name) or data


def _describe_group(group: Sequence[Mapping[str, Any]], about: About) -> dict[str, str | None]:
    first = group[0]
    title = f"{first['task'].capitalize()} on {_data_name(first, about)}"
    title += {"shuffled": ", shuffled images", "none": ", without images"}.get(first["images"], "")
    rows = f"{first['rows']} rows of {first['image_count']} images"
    machine, versions = describe_environment(first)
    lines = [f"Split {first['source']['split']}, {rows}, {first['dtype']}, {first['measured_at'][:10]}."]
    if first["task"] == "captioning":
        decoding = sorted(first["decoding"].items())
        told = [f"{name}={value!r}" for name, value in decoding if value is not None and "token_id" not in name]
        lines.append(f"Decoding: `{', '.join(told)}`.")
        lines += [
            describe_samples(record) for record in group if record["criterion"] == "full" and record.get("samples")
        ]
    elif not first["premise"]:
        title += ", without premises"
    if timed := next((record["time"] for record in group if record["time"]), None):
        lines.append(
            f"Time is end to end without reading the image, at batch {timed['batch_size']}, in turns with full depth, "
            f"medians of {timed['repeats']} runs on {timed['rows']} rows ({machine})."
        )
    lines.append(f"Versions: {versions}.")
    return {"title": title, "table": make_table(group), "conditions": " ".join(lines)}


def _index(group: Sequence[Mapping[str, Any]], about: About) -> list[EvalResult]:
    """Entries of the model index: the points at full depth and of presets."""
    results = []
    for record in group:
        if record["criterion"] not in ("full", "presets") or record["images"] != "own":
            continue
        name = _data_name(record, about)
        shared = {
            "task_type": "image-to-text" if record["task"] == "captioning" else "visual-question-answering",
            "task_name": record["task"],
            "dataset_type": name.lower().replace(" ", "-"),
            "dataset_name": name,
            "dataset_split": record["source"]["split"],
        }
        for score, value in record["quality"].items():
            plain = score.removesuffix("_plain").removesuffix("_pretokenized")
            if plain in INDEXED:
                metric, label = INDEXED[plain]
                scored = {"metric_name": f"{label}, {record['name']}", "metric_value": round(value, 4)}
                results.append(EvalResult(metric_type=metric, **scored, **shared))
    return results


__all__ = ["About", "evaluation_groups", "public_record", "read_about", "read_evaluation", "render_card"]
