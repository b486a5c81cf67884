"""OFA's names of tensors and this package's: `NAMES` says where they differ, `rename_weights` leaves none over."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

TRUNK = "encoder.embed_images"
TRUNK_BLOCK = {
    "conv1": "layer.0.convolution",
    "bn1": "layer.0.normalization",
    "conv2": "layer.1.convolution",
    "bn2": "layer.1.normalization",
    "conv3": "layer.2.convolution",
    "bn3": "layer.2.normalization",
    "downsample.0": "shortcut.convolution",
    "downsample.1": "shortcut.normalization",
}
# OFA's module -> MuEModel's where they differ, for both layouts at once. `{}` is a number; None means dropped on
# purpose: the index buffers are computed here. Several names of one tied matrix must hold the same numbers.
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
    **{
        f"{TRUNK}.layer{stage + 1}.{{}}.{old}": f"{TRUNK}.encoder.stages.{stage}.layers.{{}}.{new}"
        for stage in range(3)
        for old, new in TRUNK_BLOCK.items()
    },
}
PATTERNS = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(\..+)?"), new) for old, new in NAMES.items()]


def some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def rename(key: str) -> str | None:
    """The name in `MuEForConditionalGeneration` of OFA's tensor `key`, of either layout; None if it is dropped."""
    for pattern, new in PATTERNS:
        if match := pattern.fullmatch(key):
            *numbers, parameter = match.groups()
            return None if new is None else f"model.{new.format(*numbers)}{parameter or ''}"
    return f"model.{key}"


def rename_weights(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a whole checkpoint and checks that nothing is left over on either side.

    Args:
        weights (`Mapping[str, Tensor]`): OFA's tensors by name, either layout.
        target (`Mapping[str, Tensor]`): The model's tensors to fill, by name, the copies of tied matrices left out.
            Only their shapes are read.

    Returns:
        `dict[str, Tensor]`: One tensor per name of `target`.

    Raises:
        `ValueError`: If a source name is unknown, a target is not filled, shapes differ, or tied copies differ.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tqdm(weights.items(), desc="Renaming weights", unit="tensor", disable=None):
        name = rename(key)
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
            renamed[name] = tensor
    if unknown:
        raise ValueError(f"The checkpoint has {len(unknown)} tensors that OFA has not: {some(unknown)}.")
    # Frozen batch norms have no such counter, and nothing reads it.
    counters = [name for name in target if name.endswith(".num_batches_tracked")]
    renamed = {name: torch.zeros((), dtype=torch.long) for name in counters} | renamed
    missing = [name for name in target if name not in renamed]
    if missing:
        raise ValueError(f"The checkpoint lacks {len(missing)} tensors: {some(missing)}.")
    return renamed


__all__ = ["TRUNK", "rename", "rename_weights", "some"]
