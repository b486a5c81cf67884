"""From a picture to patches: any transformers or timm backbone, and where each patch sits on OFA's position grid."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel

# Pixels of one call on a CPU: memory for the feature maps of more is mapped anew by every operation.
# An image of 480 x 480 has less.
PIXELS_AT_ONCE = 2**18


def load_trunk(config: Any) -> PreTrainedModel:
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
    if pixel_values.device.type == "cpu" and not trunk.training and not torch.compiler.is_compiling():
        parts = pixel_values.split(max(1, PIXELS_AT_ONCE // pixel_values[0, 0].numel()))
        maps = [trunk(part).feature_maps[-1] for part in parts]
        return torch.cat(maps) if len(maps) > 1 else maps[0]
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


def add_patch_bias(table: Tensor, grid: tuple[int, int], bucket_size: int, scores: Tensor, out: Tensor) -> None:
    """out = scores [heads, patches, patches] + the relative position bias of a grid of (rows, columns) patches, looked
    up in `table` [distances, heads]: once for each distance, and copied along the diagonals."""
    (rows, columns), span = grid, 2 * bucket_size - 1
    biases = table[: span * span].t().unflatten(1, (span, span))
    rows_at, columns_at = (slice(bucket_size - n, bucket_size + n - 1) for n in grid)
    # [heads, row of the key minus row of the query, column of the query minus column of the key]
    biases = biases[:, rows_at, columns_at].flip(1)
    column = torch.arange(columns, device=table.device)
    # [heads, column of the query, distance of rows, column of the key]
    biases = biases[:, :, column[:, None] - column + columns - 1].transpose(1, 2).contiguous()
    scores = scores.unflatten(2, grid).unflatten(1, grid)
    out = out.unflatten(2, grid).unflatten(1, grid)
    for row in range(rows):
        torch.add(scores[:, row], biases[:, :, rows - 1 - row : 2 * rows - 1 - row], out=out[:, row])


__all__ = [
    "add_patch_bias",
    "check_features",
    "load_trunk",
    "patch_positions",
    "patch_relative_index",
    "trunk_features",
]
