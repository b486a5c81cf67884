"""Turns an OFA checkpoint, of the layout of its transformers fork or of fairseq, into one for `from_pretrained`."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..files import whole_folder
from ..model.configuration_mue import MuEConfig, resnet_backbone_kwargs
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEImageProcessor, MuEProcessor, MuETokenizer
from .names import TRUNK, rename_weights
from .read import find_source, find_vocabulary, read_json, read_weights

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
    for name, expected in {
        "encoder.embed_image_positions.weight": image_bucket**2 + 1,
        "encoder.image_rel_pos_table_list.0.weight": (2 * image_bucket - 1) ** 2 + 3,
    }.items():
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
        source (path): A folder in the layout of OFA's transformers fork, a fairseq `.pt` file (or the folder around
            one), or the name of a Hub repository that holds either.
        destination (path): Folder to write, whole or not at all.
        vocab (path, *optional*): Folder with vocab.json and merges.txt. Fairseq files, which carry none, need it.
        decompose (`bool`, *optional*, defaults to `False`): False keeps OFA's joint encoder, so that the result
            computes what its source did. True sets MuE's separate streams, for fine-tuning or weights trained so.
        allow_pickle (`bool`, *optional*, defaults to `False`): True loads files that hold more than tensors and plain
            settings, which may run any code in them.
        image_size (`int`, *optional*, defaults to 480): Side in pixels to which the processor resizes images.
        overwrite (`bool`, *optional*, defaults to `False`): True replaces a checkpoint folder at `destination`.

    Returns:
        `dict[str, Any]`: The summary: layout, parameter count, dtype, sizes and destination.

    Raises:
        `ValueError`: If the source is no such checkpoint or lacks a vocabulary, or if the destination is in use.
    """
    target = Path(destination).expanduser()
    with whole_folder(target, overwrite) as partial:
        layout, file, folder = find_source(source)
        if folder.resolve().is_relative_to(target.resolve()):
            raise ValueError(f"`destination` must not be the folder of the source, got {target}; choose another.")
        words = find_vocabulary(vocab, folder if layout == "transformers fork" else None)
        weights, settings = read_weights(layout, file, allow_pickle)
        config = make_config(weights, settings, decompose)
        processor = _make_processor(words, config, image_size)
        model = _make_model(weights, config)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    sizes = read_sizes(weights)
    return {
        "source": str(source),
        "destination": str(target.absolute()),
        "layout": layout,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "encoder": "decomposed" if decompose else "joint",
        "trunk_depths": sizes.pop("backbone_config")["depths"],
        **sizes,
    }


def _make_model(weights: Mapping[str, Tensor], config: MuEConfig) -> MuEForConditionalGeneration:
    with torch.device("meta"):
        model = MuEForConditionalGeneration(config)
    empty = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    renamed = rename_weights(weights, empty)
    for name, tensor in renamed.items():
        if tensor.is_floating_point() != empty[name].is_floating_point():
            raise ValueError(
                f"`{name}` must have weights of {empty[name].dtype}, got {tensor.dtype}; convert it first."
            )
    dtype = renamed["model.shared.weight"].dtype
    renamed = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in renamed.items()}
    model.load_state_dict(renamed, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    tokens = {field: getattr(config, field) for field in SPECIAL_TOKENS}
    model.generation_config = GenerationConfig(**CAPTION_DECODING, **tokens, forced_eos_token_id=config.eos_token_id)
    return model


def _make_processor(words: Path, config: MuEConfig, image_size: int) -> MuEProcessor:
    side = math.ceil(image_size / 16)
    if not 1 <= side <= config.image_bucket_size:
        raise ValueError(
            f"`image_size` must lie between 1 and {16 * config.image_bucket_size}, so that every patch has a "
            f"position, got {image_size}; pass --image-size."
        )
    room = config.vocab_size - len(read_json(words / "vocab.json"))
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
    return MuEProcessor(MuEImageProcessor(size={"height": image_size, "width": image_size}), tokenizer)


__all__ = ["convert_ofa", "make_config", "read_sizes"]
