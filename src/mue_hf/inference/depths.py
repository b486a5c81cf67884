"""The depths that a call reached, and R: the share of layers that it skipped as the MuE paper counts it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Depths:
    """Layers that one output took: of each encoder stream, 0 without that stream, and of the decoder for each new
    token, or for each branching node of the answers' trie."""

    image_exit_layers: int
    text_exit_layers: int
    decoder_exit_layers: tuple[int, ...]


def read_depths(output: Any) -> list[Depths]:
    """Depths by row of what `generate(..., return_dict_in_generate=True)` or `score_answers(..., return_dict=True)`
    returned, one output to a row."""
    columns = (output.image_exit_layers, output.text_exit_layers, output.decoder_exit_layers)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    # 0 stands where a row had ended before the others
    return [Depths(image, text, tuple(filter(None, tokens))) for image, text, tokens in rows]


def new_tokens(output: Any) -> list[tuple[int, ...]]:
    """Token ids by row that `generate` added, `</s>` included, as many as [`read_depths`] has depths."""
    depths = output.decoder_exit_layers
    new = output.sequences[:, output.sequences.shape[1] - depths.shape[1] :].tolist()
    return [tuple(ids[:count]) for ids, count in zip(new, (depths > 0).sum(1).tolist(), strict=True)]


def expected_time_reduction(config: PreTrainedConfig, outputs: Iterable[Depths]) -> dict[str, float | None]:
    """R of the MuE paper over all words: 1 - sum(n_E + n_D) / sum(N_E + N_D). A layer counts the same whatever it
    costs, and a stream that an output lacks does not count.

    Returns:
        `dict`: the paper does not say how the depths of image and text make n_E: "mean" (n_E is their mean), "sum"
        (n_E is their sum, N_E both stacks), "without_text" (n_E is the image's alone: the constant prompt of
        captioning has next to no cost, and would count in full; None where an output has no image).
    """
    outputs = list(outputs)
    ran, full = (dict.fromkeys(("mean", "sum", "without_text"), 0.0) for _ in range(2))
    for one in outputs:
        words, tokens = len(one.decoder_exit_layers), sum(one.decoder_exit_layers)
        streams = {"image": one.image_exit_layers, "text": one.text_exit_layers}
        streams = {stream: depth for stream, depth in streams.items() if depth}
        total, whole, count = sum(streams.values()), sum(map(config.layers_of, streams)), max(len(streams), 1)
        parts = {
            "mean": (total / count, whole / count),
            "sum": (total, whole),
            "without_text": (one.image_exit_layers, config.layers_of("image") * bool(one.image_exit_layers)),
        }
        for name, (depth, deepest) in parts.items():
            ran[name] += words * depth + tokens
            full[name] += words * (deepest + config.decoder_layers)
    reductions: dict[str, float | None] = {name: 1 - ran[name] / full[name] if full[name] else 0.0 for name in ran}
    return reductions if all(one.image_exit_layers for one in outputs) else reductions | {"without_text": None}


def layers_skipped(config: PreTrainedConfig, depths: Depths) -> float:
    """R of one output, the mean of its streams as n_E; see [`expected_time_reduction`]."""
    return expected_time_reduction(config, [depths])["mean"] or 0.0


__all__ = ["Depths", "expected_time_reduction", "layers_skipped", "new_tokens", "read_depths"]
