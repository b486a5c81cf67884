"""The files of an export: which graphs a model needs, what their manifest says, and whether they are what it says."""

import json
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER, MANIFEST = "onnx", "manifest.json"
FORMAT, OPSET = 4, 20
# Linear layers that have a graph each, by encoder or decoder: what they multiply is as long as the image.
LINEAR = {"encoder": ("image_proj", "pos_q_linear", "pos_k_linear"), "decoder": ("cross_pos_k_linear",)}
# Of each such piece of a file of weights its first bytes are looked at when a model is loaded.
PIECE, LOOKED_AT = 2**16, 2**12


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sampled_sha256(path: Path) -> str:
    """SHA-256 of a file's size and of the first 4 KiB of every 64 KiB, those of each tensor where it is a file of
    safetensors: training, and other weights, change them. It reads a sixteenth of a large file."""
    size = path.stat().st_size
    digest, starts = sha256(str(size).encode()), [0]
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            first = 8 + min(size, int.from_bytes(file.read(8), "little"))
            header = file.read(first - 8)
            digest.update(header)
            # a damaged file has another size or header than the manifest's
            with suppress(ValueError, LookupError, TypeError, AttributeError):
                tensors = [tensor for tensor in json.loads(header).values() if "data_offsets" in tensor]
                starts = sorted({first + tensor["data_offsets"][0] for tensor in tensors})
        for start, end in pairwise([*starts, size]):
            for place in range(start, end, PIECE):
                file.seek(place)
                digest.update(file.read(min(LOOKED_AT, end - place)))
    return digest.hexdigest()


def graph_names(config: Any) -> list[str]:
    """The graphs that a model of this config needs; "trunk" may be one more."""
    names = [*LINEAR["encoder"], *LINEAR["decoder"]]
    for number in range(config.encoder_layers):
        names += [f"encoder_{number}_project", f"encoder_{number}"]
    for number in range(config.decoder_layers):
        names += [f"decoder_{number}_project", f"cross_{number}", f"decoder_{number}"]
    return [*names, "head"]


def read_manifest(folder: Path, whole: bool = False) -> dict[str, Any]:
    """The manifest of an export, whose graphs and weights are the files that are there.

    Args:
        folder (`Path`): of the checkpoint.
        whole (`bool`, *optional*, defaults to `False`): whether weights are read as a whole, or as
            [`sampled_sha256`] does.

    Raises:
        ValueError: if there is no such manifest, or a file that it lists is missing or another one.
    """
    path = folder / FOLDER / MANIFEST
    remedy = "run `mue-hf export` again, with --overwrite."
    if not path.is_file():
        raise ValueError(
            f'`engine="onnxruntime"` needs a folder that `mue-hf export CKPT DIR` wrote, got {str(folder)!r} without '
            f"{FOLDER}/{MANIFEST}; export the checkpoint, and load DIR."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        opset, version = manifest["opset"], manifest["format"]
        files = _listed_files(manifest, whole) if (version, opset) == (FORMAT, OPSET) else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be the manifest of an export, got {error!r}; {remedy}") from error
    if (version, opset) != (FORMAT, OPSET):
        raise ValueError(
            f"{path} must have format {FORMAT} and `opset` {OPSET}, got {version!r} and {opset!r}; {remedy}"
        )
    for name, (digest, expected) in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold {name}, which its manifest lists; {remedy}")
        if digest(folder / name) != expected:
            raise ValueError(f"{name} in {folder} must have the SHA-256 of the manifest, but it was changed; {remedy}")
    return manifest


def _listed_files(manifest: dict[str, Any], whole: bool) -> dict[str, tuple[Callable[[Path], str], str]]:
    """Name of each file -> how it is digested, and the digest. KeyError for a manifest that lacks something."""
    graphs = manifest["graphs"].values()
    weights = {f"{FOLDER}/{graph['data']}": graph["data_sha256"] for graph in graphs} | manifest["weights"]
    samples = {name: manifest["samples"][name] for name in weights}
    for name in ("session_options", "precision", "attention", "fingerprint"):
        manifest[name]
    [graph["precision"] for graph in graphs]
    files = {f"{FOLDER}/{graph['file']}": (sha256_of, graph["sha256"]) for graph in graphs}
    some = weights.items() if whole else samples.items()
    return files | {name: (sha256_of if whole else sampled_sha256, digest) for name, digest in some}


def engine_fingerprint(manifest: dict[str, Any]) -> str:
    """What presets and records take for the weights: float32 gives the tokens and depths of torch; graphs in int8 make
    it another model, each one, and so do what its trunk was calibrated on, and attention in bfloat16."""
    int8 = sorted(name for name, graph in manifest["graphs"].items() if graph["precision"] != "float32")
    weights = manifest["fingerprint"]
    if not int8 and manifest["attention"] == "float32":
        return weights
    facts = [weights, int8, manifest.get("calibration"), manifest["attention"]]
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


__all__ = [
    "FOLDER",
    "FORMAT",
    "LINEAR",
    "MANIFEST",
    "OPSET",
    "engine_fingerprint",
    "graph_names",
    "read_manifest",
    "sampled_sha256",
    "sha256_of",
]
