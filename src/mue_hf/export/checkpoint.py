"""A checkpoint folder with ONNX graphs beside its weights, each checked against torch, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download

from ..files import write_whole
from ..inference.loading import check_not_replaced
from ..model.configuration_mue import MuEConfig
from ..model.engine_mue import load_onnxruntime
from ..model.graph_files_mue import (
    FOLDER,
    FORMAT,
    MANIFEST,
    OPSET,
    graph_names,
    read_manifest,
    sampled_sha256,
    sha256_of,
)
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.presets_mue import weights_fingerprint
from ..model.processing_mue import MuEProcessor
from ..publishing.checkpoint import check_folder, load_complete_model, weight_files
from .graphs import Part, apart, graph_of, parts_of, trunk_graph, with_weights
from .images import CalibrationImages
from .int8 import IMAGES_AT_ONCE, STATIC_OPTIONS, dynamic_int8, in_float, static_int8

# What a graph may differ by from torch, as a share of the largest value; more is a mistake of the export.
TOLERANCES = {"float32": 1e-3, "int8": 0.25}
# The same for a trunk in int8, whose many layers add up what they round.
TRUNK_TOLERANCE = 0.5
PRECISIONS = tuple(TOLERANCES)
ATTENTIONS = ("float32", "bfloat16")
PACKAGES = ("mue-hf", "torch", "transformers", "onnx", "onnxruntime", "onnxscript")
# Worker threads sleep between calls, and the sessions of a process share one arena.
SESSION_OPTIONS = {"session.intra_op.allow_spinning": "0", "session.use_env_allocators": "1"}
JOURNAL = "done.json"

Report = Callable[[str, dict[str, Any]], None]


def export_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    precision: str = "float32",
    image_size: Sequence[int] | None = None,
    trunk: bool = True,
    images: CalibrationImages | None = None,
    int8_trunk: bool = False,
    attention: str = "float32",
    keep_float: Sequence[str] = (),
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Writes a copy of a checkpoint with its graphs in the folder `onnx`. A run that was interrupted goes on where it
    was, from a folder beside the destination, if weights, versions and options are those it had.

    Args:
        source: a checkpoint folder, or a Hub id.
        destination: where nothing is, an empty folder, or what the same call wrote before, which is kept.
        precision (`str`): "float32", or "int8": weights and inputs of the matrices in layers and head, see
            [`dynamic_int8`]; the trunk stays in float32.
        image_size ((height, width), *optional*): pixels that the trunk is traced on. Default: the processor's.
        trunk (`bool`): False leaves the image trunk to torch.
        images ([`CalibrationImages`], *optional*): what `int8_trunk` takes the ranges of values from.
        int8_trunk (`bool`): with "int8" the trunk too, see [`static_int8`].
        attention (`str`): "float32", or with "int8" also "bfloat16": what the encoder's attention computes in.
        keep_float (sequence of `str`): with "int8", graphs that stay in float32, "encoder_*" for all that begin so.
        overwrite (`bool`): True replaces a checkpoint folder at the destination.
        report (`Callable`, *optional*): is told of each graph: its name, and its entry in the manifest with "kept".

    Returns:
        `dict`: the manifest.

    Raises:
        ValueError: before any work for a missing package, another kind of checkpoint, a destination that holds
            something else, and options of int8 that do not fit; for a trunk that cannot be exported, and a graph that
            does not give what torch gives.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {list(PRECISIONS)}, got {precision!r}; check the spelling.")
    versions, folder = _versions(), checkpoint_folder(source)
    destination = Path(destination).absolute()
    if folder.absolute() == destination:
        raise ValueError(f"the destination must be another folder than the checkpoint, got {destination} for both.")
    size = MuEProcessor.from_pretrained(folder).image_processor.size
    settings: dict[str, Any] = {
        "format": FORMAT,
        "opset": OPSET,
        "precision": precision,
        "attention": _attention(attention, precision),
        "int8": _int8_graphs(folder, precision, trunk, int8_trunk, keep_float),
        "calibration": _calibration(images, int8_trunk),
        "image_size": list(image_size or (size["height"], size["width"])) if trunk else None,
        "versions": versions,
        "session_options": SESSION_OPTIONS,
        "weights": {path.name: sha256_of(path) for path in weight_files(folder)},
    }
    if (manifest := _finished(destination, settings, overwrite)) is not None:
        if report is not None:
            for name, graph in manifest["graphs"].items():
                report(name, graph | {"kept": True})
        return manifest
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(f".{destination.name}.part")
    with FileLock(f"{part}.lock"):
        model = load_complete_model(folder)
        fingerprint = weights_fingerprint(model)
        model.fold_batch_norms()
        graphs = _write_graphs(model, part, settings, images, report)
        for path in folder.iterdir():
            if path.is_file():
                shutil.copy2(path, part / path.name)
        files = [*settings["weights"], *(f"{FOLDER}/{graph['data']}" for graph in graphs.values())]
        manifest = settings | {
            "fingerprint": fingerprint,
            "samples": {name: sampled_sha256(part / name) for name in files},
            "graphs": {name: graphs[name] for name in sorted(graphs)},
        }
        write_whole(part / FOLDER / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        (part / FOLDER / JOURNAL).unlink()
        old = destination.with_name(f".{destination.name}.old")
        if destination.exists():
            destination.rename(old)
        part.rename(destination)
        shutil.rmtree(old, ignore_errors=True)
    Path(f"{part}.lock").unlink(missing_ok=True)
    return manifest


def checkpoint_folder(source: str | os.PathLike) -> Path:
    """The folder of a checkpoint, downloaded where `source` is a Hub id.

    Raises:
        ValueError: see [`check_folder`].
    """
    check_not_replaced(str(source))
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source)))
    check_folder(folder)
    return folder


def _int8_graphs(folder: Path, precision: str, trunk: bool, int8_trunk: bool, keep_float: Sequence[str]) -> list[str]:
    """The names of the graphs in int8.

    Raises:
        ValueError: for options that contradict each other.
    """
    if precision != "int8":
        if int8_trunk or keep_float:
            name = "int8_trunk" if int8_trunk else "keep_float"
            raise ValueError(f'`{name}` goes with `precision="int8"`, got {precision!r}; pass --int8 too, or drop it.')
        return []
    if int8_trunk and not trunk:
        raise ValueError("`int8_trunk` needs the trunk among the graphs, but it is left to torch; drop one of them.")
    names = [*(["trunk"] if int8_trunk else []), *graph_names(MuEConfig.from_pretrained(folder))]
    left = set(in_float(names, keep_float))
    return [name for name in names if name not in left]


def _attention(attention: str, precision: str) -> str:
    """What the encoder's attention computes in.

    Raises:
        ValueError: for another dtype, and for bfloat16 beside graphs in float32, which give what torch gives.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"`attention` must be one of {list(ATTENTIONS)}, got {attention!r}; check the spelling.")
    if attention != "float32" and precision != "int8":
        raise ValueError(
            f'`attention="{attention}"` goes with `precision="int8"`, got {precision!r}; pass --int8 too, or drop it.'
        )
    return attention


def _calibration(images: CalibrationImages | None, int8_trunk: bool) -> dict[str, Any] | None:
    """What the manifest says of how the trunk was quantised."""
    if not int8_trunk:
        return None
    if images is None:
        raise ValueError("`int8_trunk` needs images that say how large its values are; pass --calibrate-on IMAGES.")
    return images.record | STATIC_OPTIONS


def _versions() -> dict[str, str]:
    try:
        return {name: version(name) for name in PACKAGES}
    except ModuleNotFoundError as error:
        raise ValueError(f"export needs the extra `export` ({error}): pip install 'mue-hf[export]'") from error


def _finished(destination: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest at the destination, if the same call wrote it and all of it is there; None where it can be written.

    Raises:
        ValueError: if something else is there.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    try:
        manifest = read_manifest(destination, whole=True)
    except ValueError:
        manifest = {}
    if manifest and manifest == manifest | settings:
        return manifest
    if not overwrite:
        raise ValueError(
            f"the destination must be empty, new, or of the same weights, versions and options, got {destination}; "
            "choose another or pass --overwrite."
        )
    if not (destination / "config.json").is_file():
        raise ValueError(
            f"only a checkpoint can be overwritten, but {destination} has no config.json; choose another."
        )
    return None


def _write_graphs(
    model: MuEForConditionalGeneration,
    part: Path,
    settings: dict[str, Any],
    images: CalibrationImages | None,
    report: Report | None,
) -> dict[str, dict[str, Any]]:
    """Writes the graphs that a folder lacks; returns their entries of the manifest."""
    folder, done = part / FOLDER, _done(part, settings)
    # graphs of which others are copies with other weights
    bases: dict[str | None, Any] = {}
    for name, piece in parts_of(model, settings["image_size"]):
        kept = name in done
        if not kept:
            base, fixed_size = bases.get(piece.like), None
            graph = None if base is None else with_weights(base, piece.module)
            if graph is None and name == "trunk":
                graph, fixed_size = trunk_graph(piece, model.config)
            graph = graph_of(piece) if graph is None else graph
            bases.setdefault(piece.like or name, graph)
            precision = "int8" if name in settings["int8"] else "float32"
            if precision == "int8":
                graph = _in_int8(graph, name, piece, images)
            done[name] = {"precision": precision, "error": _error(name, piece, graph.SerializeToString(), precision)}
            done[name] |= _write_graph(graph, name, folder)
            if name == "trunk":
                done[name]["channels"] = model.get_encoder().image_proj.in_features
            if fixed_size:
                done[name]["image_size"] = fixed_size
            write_whole(folder / JOURNAL, json.dumps({"settings": settings, "graphs": done}))
        if report:
            report(name, done[name] | {"kept": kept})
    return done


def _write_graph(graph: Any, name: str, folder: Path) -> dict[str, str]:
    """Writes a graph, and its weights beside it; returns what the manifest says of the files."""
    file, data = folder / f"{name}.onnx", folder / f"{name}.data"
    # bases of other graphs keep their weights
    without, weights = apart(graph, data.name)
    write_whole(file, without)
    write_whole(data, weights)
    return {"file": file.name, "sha256": sha256_of(file), "data": data.name, "data_sha256": sha256_of(data)}


def _in_int8(graph: Any, name: str, piece: Part, images: CalibrationImages | None) -> Any:
    """A graph in int8; the trunk is compared on the images then."""
    if name != "trunk" or images is None:
        return dynamic_int8(graph)
    piece.example = (next(images.batches(IMAGES_AT_ONCE)),)
    return static_int8(graph, images.batches(IMAGES_AT_ONCE))


def _done(part: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The graphs that an interrupted run with these settings left whole; what another one left is removed."""
    try:
        journal = json.loads((part / FOLDER / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        journal = {}
    if journal.get("settings") != settings:
        shutil.rmtree(part, ignore_errors=True)
        return {}

    def there(graph: dict[str, Any]) -> bool:
        files = {part / FOLDER / graph["file"]: graph["sha256"], part / FOLDER / graph["data"]: graph["data_sha256"]}
        return all(file.is_file() and sha256_of(file) == expected for file, expected in files.items())

    return {name: graph for name, graph in journal["graphs"].items() if there(graph)}


@torch.no_grad()
def _error(name: str, piece: Part, content: bytes, precision: str) -> float:
    """The largest difference between what a graph and its module give, as a share of the largest value.

    Raises:
        ValueError: if it is above the tolerance.
    """
    tolerance = TRUNK_TOLERANCE if (name, precision) == ("trunk", "int8") else TOLERANCES[precision]
    expected = piece.module(*piece.example)
    expected = expected if isinstance(expected, tuple) else (expected,)
    session = load_onnxruntime().InferenceSession(content, providers=["CPUExecutionProvider"])
    feed = {key: value.numpy() for key, value in zip(piece.inputs, piece.example, strict=True)}
    got = [torch.from_numpy(value) for value in session.run(None, feed)]
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))
    if not error <= tolerance:
        raise ValueError(
            f"the graph {name!r} must give what torch gives, but differs by {error:.1e} of the largest value, above "
            f"{tolerance:.0e}; in int8 pass --keep-float {name}, in float32 report this with the versions installed."
        )
    return error


__all__ = ["ATTENTIONS", "PRECISIONS", "checkpoint_folder", "export_checkpoint"]
