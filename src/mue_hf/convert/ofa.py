"""Turns an OFA checkpoint, in the layout of its transformers fork or of fairseq, into a folder for `from_pretrained`.

Read `NAMES` for what becomes of each tensor, `rename_weights` for the one loop and its checks.
"""

import argparse
import json
import math
import os
import re
import shutil
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
from transformers import GenerationConfig

from ..model.configuration_mue import MuEConfig, resnet_backbone_kwargs
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEImageProcessor, MuEProcessor, MuETokenizer

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*.bin", "*.pt"]

OFA_CODES, OFA_BINS = 8192, 1000

# How OFA writes captions (run_scripts/caption/evaluate_caption_base.sh): up to 16 tokens, then a forced </s>.
CAPTION_DECODING = {
    "num_beams": 5,
    "max_new_tokens": 17,
    "min_new_tokens": 1,
    "no_repeat_ngram_size": 3,
    "length_penalty": 1.0,
    "early_stopping": True,
}

SPECIAL_TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")

# Fields of an OFA config.json or of fairseq's arguments that no shape shows and that MuEConfig keeps.
KEPT_SETTINGS = (
    *SPECIAL_TOKENS,
    "activation_dropout",
    "activation_function",
    "attention_dropout",
    "attn_scale_factor",
    "code_image_size",
    "dropout",
)
FAIRSEQ_SETTINGS = {"activation_fn": "activation_function"}

# Switches of OFA under which the same tensors compute something else. All released models have these values.
FIXED_SETTINGS = {
    "add_type_embedding": True,
    "code_layernorm_embedding": True,
    "decoder_normalize_before": True,
    "disable_entangle": True,
    "encoder_normalize_before": True,
    "entangle_position_embedding": False,
    "interpolate_position": False,
    "layernorm_embedding": True,
    "no_scale_embedding": True,
    "normalize_before": True,
    "normformer": True,
    "patch_layernorm_embedding": True,
    "scale_attn": True,
    "scale_embedding": False,
    "scale_fc": True,
    "scale_heads": True,
    "scale_resids": False,
    "sync_bn": False,
}

ENCODER_MODULES = (
    "image_proj",
    "image_rel_pos_table_list.{}",
    "layers.{}.ffn_layer_norm",
    "layers.{}.self_attn_mid_layer_norm",
    "patch_layernorm_embedding",
    "pos_k_linear",
    "pos_q_linear",
    "type_embedding",
)
DECODER_MODULES = (
    "code_layernorm_embedding",
    "cross_pos_k_linear",
    "cross_pos_q_linear",
    "image_rel_pos_table_list.{}",
    "layers.{}.cross_attn",
    "layers.{}.cross_attn_layer_norm",
    "layers.{}.cross_attn_mid_layer_norm",
    "layers.{}.ffn_layer_norm",
    "layers.{}.self_attn_mid_layer_norm",
    "self_pos_k_linear",
    "self_pos_q_linear",
)
COMMON_MODULES = (
    "embed_image_positions",
    "embed_positions",
    "image_pos_ln",
    "layer_norm",
    "layernorm_embedding",
    "layers.{}.fc1",
    "layers.{}.fc2",
    "layers.{}.final_layer_norm",
    "layers.{}.self_attn",
    "layers.{}.self_attn_layer_norm",
    "pos_ln",
    "token_rel_pos_table_list.{}",
)

TRUNK = "encoder.embed_images"
TRUNK_BLOCKS = {
    f"{TRUNK}.layer{stage + 1}.{{}}.{old}": f"{TRUNK}.encoder.stages.{stage}.layers.{{}}.{new}"
    for stage in range(3)
    for old, new in {
        "conv1": "layer.0.convolution",
        "bn1": "layer.0.normalization",
        "conv2": "layer.1.convolution",
        "bn2": "layer.1.normalization",
        "conv3": "layer.2.convolution",
        "bn3": "layer.2.normalization",
        "downsample.0": "shortcut.convolution",
        "downsample.1": "shortcut.normalization",
    }.items()
}

# OFA's module -> MuEModel's, for both layouts at once. `{}` is a number; None means dropped on purpose: the index
# buffers are computed here. Several names of one tied matrix must hold the same numbers.
NAMES: dict[str, str | None] = {
    "encoder.embed_tokens": "shared",
    "decoder.embed_tokens": "shared",
    "decoder.output_projection": "shared",
    "lm_head": "shared",
    "encoder.version": None,
    "decoder.version": None,
    "encoder.token_rp_bucket": None,
    "decoder.token_rp_bucket": None,
    "encoder.image_rp_bucket": None,
    "decoder.image_rp_bucket": None,
    "encoder.image_position_idx": None,
    "decoder.image_position_idx": None,
    "encoder.layers.{}.attn_ln": "encoder.layers.{}.self_attn_mid_layer_norm",
    "encoder.layers.{}.ffn_layernorm": "encoder.layers.{}.ffn_layer_norm",
    "decoder.layers.{}.self_attn_ln": "decoder.layers.{}.self_attn_mid_layer_norm",
    "decoder.layers.{}.cross_attn_ln": "decoder.layers.{}.cross_attn_mid_layer_norm",
    "decoder.layers.{}.ffn_layernorm": "decoder.layers.{}.ffn_layer_norm",
    "decoder.layers.{}.encoder_attn": "decoder.layers.{}.cross_attn",
    "decoder.layers.{}.encoder_attn_layer_norm": "decoder.layers.{}.cross_attn_layer_norm",
    f"{TRUNK}.conv1": f"{TRUNK}.embedder.embedder.convolution",
    f"{TRUNK}.bn1": f"{TRUNK}.embedder.embedder.normalization",
    **TRUNK_BLOCKS,
    **{name: name for name in (f"encoder.{module}" for module in COMMON_MODULES + ENCODER_MODULES)},
    **{name: name for name in (f"decoder.{module}" for module in COMMON_MODULES + DECODER_MODULES)},
}
PATTERNS = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(\..+)?"), new) for old, new in NAMES.items()]


def rename(key: str) -> str | None:
    """The name in `MuEForConditionalGeneration` of OFA's tensor `key`.

    Args:
        key (`str`): Name in either layout, e.g. `"decoder.layers.0.encoder_attn.k_proj.bias"`.

    Returns:
        `str` or `None`: New name, e.g. `"model.decoder.layers.0.cross_attn.k_proj.bias"`; None if dropped on purpose.

    Raises:
        `KeyError`: If the table has no entry for it.
    """
    for pattern, new in PATTERNS:
        match = pattern.fullmatch(key)
        if match:
            *numbers, parameter = match.groups()
            return None if new is None else f"model.{new.format(*numbers)}{parameter or ''}"
    raise KeyError(key)


def rename_weights(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a whole checkpoint and checks that nothing is left over on either side.

    Args:
        weights (`Mapping[str, Tensor]`): OFA's tensors by name, either layout.
        target (`Mapping[str, Tensor]`):
            The model's tensors to fill, by name, the copies of tied matrices left out. Only their shapes are read.

    Returns:
        `dict[str, Tensor]`: One tensor per name of `target`.

    Raises:
        `ValueError`: If a source name is unknown, a target is not filled, shapes differ, or tied copies differ.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tqdm(weights.items(), desc="Renaming weights", unit="tensor", disable=None):
        try:
            name = rename(key)
        except KeyError:
            unknown.append(key)
            continue
        if name is None:
            continue
        if name not in target:
            unknown.append(key)
        elif tensor.shape != target[name].shape:
            raise ValueError(
                f"`{key}` must have the shape {tuple(target[name].shape)} of `{name}`, got {tuple(tensor.shape)}; "
                f"the checkpoint mixes sizes."
            )
        elif name in renamed and not torch.equal(renamed[name], tensor):
            raise ValueError(
                f"`{key}` must equal the other copies of `{name}`, since OFA ties them, but its numbers differ; "
                f"the checkpoint was not trained with tied embeddings."
            )
        else:
            renamed.setdefault(name, tensor)
    # Frozen batch norms have no such counter, and nothing reads it.
    for name in target:
        if name.endswith(".num_batches_tracked"):
            renamed.setdefault(name, torch.zeros((), dtype=torch.long))
    missing = [name for name in target if name not in renamed]
    if unknown:
        raise ValueError(f"The checkpoint has {len(unknown)} tensors that OFA has not: {_some(unknown)}.")
    if missing:
        raise ValueError(f"The checkpoint lacks {len(missing)} tensors: {_some(missing)}.")
    return renamed


def read_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every size that a config needs, read from the shapes.

    Args:
        weights (`Mapping[str, Tensor]`): OFA's tensors by name, either layout.

    Returns:
        `dict[str, Any]`: Fields of [`MuEConfig`], the trunk's among them.

    Raises:
        `ValueError`: If a tensor that shows a size is missing or has a shape that no OFA has.
    """

    def rows(name: str) -> int:
        if name not in weights or not weights[name].dim():
            raise ValueError(f"The checkpoint lacks `{name}`, which shows a size; is it an OFA checkpoint?")
        return weights[name].shape[0]

    def count(prefix: str) -> int:
        numbers = {key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)}
        if not numbers:
            raise ValueError(f"The checkpoint has no tensor named `{prefix}...`; is it an OFA checkpoint?")
        return len(numbers)

    image_bucket = math.isqrt(max(rows("encoder.embed_image_positions.weight") - 1, 0))
    grid = {
        "encoder.embed_image_positions.weight": image_bucket**2 + 1,
        "encoder.image_rel_pos_table_list.0.weight": (2 * image_bucket - 1) ** 2 + 3,
    }
    for name, expected in grid.items():
        if rows(name) != expected:
            raise ValueError(
                f"`{name}` must have {expected} rows for a grid of {image_bucket} x {image_bucket} patches, "
                f"got {rows(name)}."
            )
    trunk = resnet_backbone_kwargs("resnet50") | {"depths": [count(f"{TRUNK}.layer{stage}.") for stage in (1, 2, 3)]}
    return {
        "vocab_size": rows("encoder.embed_tokens.weight"),
        "d_model": rows("encoder.layernorm_embedding.weight"),
        "max_position_embeddings": rows("encoder.embed_positions.weight") - 2,
        "encoder_layers": count("encoder.layers."),
        "encoder_ffn_dim": rows("encoder.layers.0.fc1.weight"),
        "encoder_attention_heads": rows("encoder.layers.0.self_attn.c_attn"),
        "decoder_layers": count("decoder.layers."),
        "decoder_ffn_dim": rows("decoder.layers.0.fc1.weight"),
        "decoder_attention_heads": rows("decoder.layers.0.self_attn.c_attn"),
        "token_bucket_size": (rows("encoder.token_rel_pos_table_list.0.weight") + 1) // 2,
        "image_bucket_size": image_bucket,
        "backbone_config": trunk,
    }


def make_config(weights: Mapping[str, Tensor], settings: Mapping[str, Any], decompose: bool = False) -> MuEConfig:
    """The config of a converted checkpoint.

    Args:
        weights (`Mapping[str, Tensor]`): OFA's tensors by name, either layout.
        settings (`Mapping[str, Any]`): The fields of the fork's config.json, or fairseq's model arguments.
        decompose (`bool`, *optional*, defaults to `False`): The value of `modality_decomposition`.

    Returns:
        [`MuEConfig`]: Sizes from the shapes, the rest from `settings` where it says something.

    Raises:
        `ValueError`: If `settings` contradicts the shapes or asks for a variant of OFA that MuE does not compute.
    """
    sizes = read_sizes(weights)
    for field, value in FIXED_SETTINGS.items():
        if settings.get(field) is not None and settings[field] != value:
            raise ValueError(
                f"`{field}` must be {value} in the source's settings, got {settings[field]!r}; "
                f"MuE does not compute this variant of OFA, which no released model uses."
            )
    for field, value in sizes.items():
        if field in settings and settings[field] != value:
            raise ValueError(
                f"`{field}` must be {value}, as the shapes of the tensors say, got {settings[field]!r} in the "
                f"source's settings; the settings belong to another checkpoint."
            )
    renamed = {FAIRSEQ_SETTINGS.get(field, field): value for field, value in settings.items()}
    kept = {field: renamed[field] for field in KEPT_SETTINGS if renamed.get(field) is not None}
    return MuEConfig(**sizes, **kept, modality_decomposition=decompose)


def convert_ofa(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    vocab: str | os.PathLike | None = None,
    decompose: bool = False,
    allow_pickle: bool = False,
    image_size: int = 480,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Converts an OFA checkpoint into a folder that `from_pretrained` loads.

    Args:
        source (`str` or `os.PathLike`):
            A folder in the layout of OFA's transformers fork, a fairseq `.pt` file (or the folder around one), or
            the name of a Hub repository that holds either.
        destination (`str` or `os.PathLike`): Folder to write, whole or not at all.
        vocab (`str` or `os.PathLike`, *optional*):
            Folder with vocab.json and merges.txt. Required for fairseq files, which carry no vocabulary.
        decompose (`bool`, *optional*, defaults to `False`):
            False keeps OFA's joint encoder, so that the result computes what its source did. True sets MuE's separate
            streams, for fine-tuning or for weights trained with them.
        allow_pickle (`bool`, *optional*, defaults to `False`):
            True loads files that hold more than tensors and plain settings, which may run any code in them.
        image_size (`int`, *optional*, defaults to 480): Side in pixels to which the processor resizes images.
        overwrite (`bool`, *optional*, defaults to `False`): True replaces a checkpoint folder at `destination`.

    Returns:
        `dict[str, Any]`: The summary: layout, parameter count, dtype, sizes and destination.

    Raises:
        `ValueError`: If the source has neither layout, has tensors too many or too few, or lacks a vocabulary; or if
            the destination is in use.
    """
    target = Path(destination).expanduser().absolute()
    _check_destination(target, overwrite)
    layout, file, folder = _find(source)
    if target.resolve() == folder.resolve():
        raise ValueError(f"`destination` must not be the folder of the source, got {target}; choose another.")
    words = _find_vocabulary(vocab, folder if layout == "transformers fork" else None)
    if layout == "fairseq":
        weights, settings = _read_fairseq(file, allow_pickle)
    else:
        weights, settings = _read_fork(file, allow_pickle), _read_json(folder / "config.json")
    config = make_config(weights, settings, decompose)
    processor = _make_processor(words, config, image_size)

    with torch.device("meta"):
        model = MuEForConditionalGeneration(config)
    empty = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    renamed = rename_weights(weights, empty)
    foreign = [
        f"{name} ({tensor.dtype})"
        for name, tensor in renamed.items()
        if tensor.is_floating_point() != empty[name].is_floating_point()
    ]
    if foreign:
        raise ValueError(f"Weights must be floating point numbers, got {_some(foreign)}; convert the source first.")
    dtype = renamed["model.shared.weight"].dtype
    renamed = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in renamed.items()}
    model.load_state_dict(renamed, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    tokens = {field: getattr(config, field) for field in SPECIAL_TOKENS}
    model.generation_config = GenerationConfig(**CAPTION_DECODING, **tokens, forced_eos_token_id=config.eos_token_id)

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        replaced = partial.with_suffix(".replaced")
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sizes = {field: value for field, value in read_sizes(weights).items() if field != "backbone_config"}
    return {
        "source": str(source),
        "destination": str(target),
        "layout": layout,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "encoder": "decomposed" if decompose else "joint",
        "trunk_depths": list(config.backbone_config.depths),
        **sizes,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `mue-hf convert`."""
    parser.epilog = "example: mue-hf convert caption_base_best.pt ofa-base-caption --vocab OFA-base"
    parser.add_argument("source", metavar="SRC", help="folder of the fork, fairseq .pt file, or Hub repository")
    parser.add_argument("destination", metavar="DST", help="folder to write")
    parser.add_argument("--vocab", metavar="DIR", help="folder with vocab.json and merges.txt (needed for fairseq)")
    parser.add_argument(
        "--decompose", action="store_true", help="separate image and text streams (MuE) instead of OFA's joint encoder"
    )
    parser.add_argument("--image-size", type=int, default=480, help="side in pixels of resized images (default: 480)")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load a file that holds Python objects besides tensors: RUNS ANY CODE IN IT, so only for files you trust",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at DST")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs `mue-hf convert` and prints a summary.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declared.

    Returns:
        `int`: Exit status 0.

    Raises:
        `ValueError`: See [`convert_ofa`].
    """
    summary = convert_ofa(
        args.source,
        args.destination,
        vocab=args.vocab,
        decompose=args.decompose,
        allow_pickle=args.allow_pickle,
        image_size=args.image_size,
        overwrite=args.overwrite,
    )
    if args.json:
        print(json.dumps(summary))
        return 0
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):<24}{f'{value:,}' if name == 'parameters' else value}")
    return 0


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _check_destination(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"`destination` must be a folder, got the file {target}; choose another name.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"`destination` must be empty or new, got {target}; choose another or pass --overwrite.")
    if not (target / "config.json").is_file():
        raise ValueError(f"`destination` must be a checkpoint to be overwritten, but {target} has no config.json.")


def _find(source: str | os.PathLike) -> tuple[str, Path, Path]:
    """Layout, weight file and folder of `source`, downloaded if it is no local path."""
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
    found = sorted(file.name for file in path.iterdir())
    raise ValueError(
        f"`source` must be an OFA checkpoint: config.json beside one of {', '.join(WEIGHT_FILES)} (transformers "
        f"fork), or exactly one .pt file (fairseq); {path} holds {_some(found) or 'nothing'}."
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


def _find_vocabulary(vocab: str | os.PathLike | None, folder: Path | None) -> Path:
    words = folder if vocab is None else Path(vocab).expanduser()
    if words is None:
        raise ValueError(
            "`vocab` is required for a fairseq file, which carries no vocabulary: pass --vocab DIR, a folder with "
            "OFA's vocab.json and merges.txt."
        )
    missing = [name for name in ("vocab.json", "merges.txt") if not (words / name).is_file()]
    if missing:
        raise ValueError(f"The vocabulary folder {words} lacks {' and '.join(missing)}; pass --vocab DIR with both.")
    return words


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file, but cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    if content.get("model_type") == "mue":
        raise ValueError(f"`source` must be an OFA checkpoint, but {path} says that it is converted already.")
    return content


def _read_fork(file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    shards = [file]
    if file.suffix == ".json":
        shards = [file.parent / name for name in sorted(set(_read_json(file).get("weight_map", {}).values()))]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent or not shards:
            raise ValueError(f"{file} must name files beside it; missing: {_some(absent) or 'all, it names none'}.")
    weights: dict[str, Tensor] = {}
    for shard in tqdm(shards, desc="Reading", unit="file", disable=None):
        weights.update(_read_safetensors(shard) if shard.suffix == ".safetensors" else _unpickle(shard, allow_pickle))
    return _only_tensors(weights, file)


def _read_fairseq(file: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    content = _unpickle(file, allow_pickle)
    if not isinstance(content.get("model"), dict):
        raise ValueError(
            f"{file} must be a fairseq checkpoint with a dict `model`, got {_some([str(key) for key in content])}; "
            f"for the transformers fork pass the folder with its config.json."
        )
    # Older files hold the arguments under "args", newer ones under "cfg" with the model's own part inside.
    arguments = content.get("args") or (content.get("cfg") or {}).get("model") or {}
    settings = arguments if isinstance(arguments, Mapping) else vars(arguments)
    return _only_tensors(content["model"], file), settings


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} must be a safetensors file, but cannot be read: {error}.") from error


def _unpickle(file: Path, allow_pickle: bool) -> dict[str, Any]:
    """What `torch.save` wrote; nothing but tensors, plain containers, arguments and numbers unless allowed."""
    scalar = np.float64(0).__reduce__()[0]
    # Plain data without code of its own: fairseq's arguments, and the losses that numpy averaged.
    harmless = [
        argparse.Namespace,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(file, map_location="cpu", weights_only=not allow_pickle)
    except ImportError as error:
        raise ValueError(f"{file} holds objects of a package that is not installed: {error}.") from error
    # A damaged pickle raises almost anything.
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if foreign:
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


def _only_tensors(weights: dict[str, Any], file: Path) -> dict[str, Tensor]:
    other = [f"{name} ({type(value).__name__})" for name, value in weights.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{file} must hold tensors only where the weights are, got {_some(other)}.")
    return weights


def _make_processor(words: Path, config: MuEConfig, image_size: int) -> MuEProcessor:
    side = math.ceil(image_size / 16)
    if not 1 <= side <= config.image_bucket_size:
        raise ValueError(
            f"`image_size` must lie between 1 and {16 * config.image_bucket_size}, so that every patch has a "
            f"position, got {image_size}; pass --image-size."
        )
    room = config.vocab_size - len(_read_json(words / "vocab.json"))
    # OFA's image codes and location bins follow the words; a model without those embeddings has neither.
    codes = OFA_CODES if room >= OFA_CODES else 0
    bins = OFA_BINS if room >= OFA_CODES + OFA_BINS else 0
    tokenizer = MuETokenizer.from_pretrained(words, num_codes=codes, num_bins=bins)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The vocabulary in {words} must fit the checkpoint's {config.vocab_size} embeddings, got "
            f"{len(tokenizer)} tokens; pass --vocab DIR with the checkpoint's own."
        )
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name) != getattr(config, name):
            raise ValueError(
                f"`{name}` must be {getattr(config, name)} as in the checkpoint's config, got "
                f"{getattr(tokenizer, name)} in the vocabulary in {words}; pass --vocab DIR with the checkpoint's own."
            )
    image_processor = MuEImageProcessor(size={"height": image_size, "width": image_size})
    return MuEProcessor(image_processor, tokenizer)


__all__ = ["add_arguments", "convert_ofa", "make_config", "read_sizes", "rename", "rename_weights", "run"]
