"""From a picture to patches: any transformers or timm backbone, and where each patch sits on OFA's position grid."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone


def load_trunk(config: Any) -> nn.Module:
    """The backbone of a `MuEConfig`, randomly initialised. Its last feature map holds the image tokens."""
    trunk_config = config.backbone_config
    if trunk_config._attn_implementation == "sdpa":
        # Asked of encoder and decoder, it need not exist for the trunk; where it does, it is the default.
        trunk_config._attn_implementation = None
    return AutoBackbone.from_config(trunk_config)


def trunk_features(trunk: nn.Module, pixel_values: Tensor) -> Tensor:
    """Runs the trunk: pixels [batch, 3, height, width] -> features [batch, channels, rows, columns].

    Raises:
        ValueError: if the pixels have another shape.
    """
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
        raise ValueError(
            f"`pixel_values` must have the shape [batch, 3, height, width], got {list(pixel_values.shape)}; "
            "make them with the processor."
        )
    return trunk(pixel_values).feature_maps[-1]


def check_features(features: Tensor, channels: int, bucket_size: int) -> None:
    """Raises a ValueError unless features are [batch, channels, rows, columns] on a grid that has positions."""
    if features.dim() != 4 or features.shape[1] != channels:
        raise ValueError(
            f"`image_features` must have the shape [batch, {channels}, rows, columns], got {list(features.shape)}; "
            "pass the last feature map of this model's trunk."
        )
    rows, columns = features.shape[2:]
    if max(rows, columns) > bucket_size:
        raise ValueError(
            f"the image gives {rows} x {columns} patches, but `image_bucket_size` has positions for at most "
            f"{bucket_size} x {bucket_size}; resize the image to a smaller one."
        )


def patch_positions(rows: int, columns: int, bucket_size: int, device: torch.device) -> Tensor:
    """Position ids [rows * columns] in row-major order: row * bucket_size + column + 1 (id 0 is OFA's code token)."""
    row = torch.arange(rows, device=device).unsqueeze(1)
    return (row * bucket_size + torch.arange(columns, device=device) + 1).flatten()


def patch_relative_index(rows: int, columns: int, bucket_size: int, device: torch.device) -> Tensor:
    """Indices [patches, patches] (query, key) into the image's relative position table."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    span = bucket_size - 1
    return (row[:, None] - row + span) * (2 * span + 1) + column[:, None] - column + span


__all__ = ["check_features", "load_trunk", "patch_positions", "patch_relative_index", "trunk_features"]
