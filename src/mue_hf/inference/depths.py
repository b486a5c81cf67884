"""The depths that a call reached, and R: the share of layers that it skipped as the MuE paper counts it."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Depths:
    """
    Layers that one output took.

    Args:
        image_exit_layers, text_exit_layers (`int`): encoder layers that each stream ran; 0 without that stream.
        decoder_exit_layers (`tuple[int, ...]`): decoder layers of each new token, or of each branching node of the
            answers' trie.
    """

    image_exit_layers: int
    text_exit_layers: int
    decoder_exit_layers: tuple[int, ...]


def read_depths(output: Any) -> list[Depths]:
    """Depths by row of what `generate(..., return_dict_in_generate=True)` or `score_answers(..., return_dict=True)`
    returned, one output to a row."""
    rows = zip(
        output.image_exit_layers.tolist(),
        output.text_exit_layers.tolist(),
        output.decoder_exit_layers.tolist(),
        strict=True,
    )
    # 0 stands where a row had ended before the others
    return [Depths(image, text, tuple(depth for depth in tokens if depth)) for image, text, tokens in rows]


def new_tokens(output: Any) -> list[tuple[int, ...]]:
    """Token ids by row that `generate` added, `</s>` included, as many as [`read_depths`] has depths."""
    depths = output.decoder_exit_layers
    new = output.sequences[:, output.sequences.shape[1] - depths.shape[1] :].tolist()
    return [tuple(ids[:count]) for ids, count in zip(new, (depths > 0).sum(1).tolist(), strict=True)]


def expected_time_reduction(config: PreTrainedConfig, outputs: Iterable[Depths]) -> dict[str, float | None]:
    """
    R of the MuE paper over all words: 1 - sum(n_E + n_D) / sum(N_E + N_D). A layer counts the same whatever it costs,
    so this is neither FLOPs nor time, and a stream that an output lacks does not count.

    The paper does not say how the depths of image and text make n_E.

    Returns:
        `dict`: "mean" (n_E is their mean), "sum" (n_E is their sum, N_E both stacks), "without_text" (n_E is the
        image's alone: the constant prompt of captioning has next to no cost, and would count in full; None where an
        output has no image).
    """
    encoder, decoder = config.encoder_layers, config.decoder_layers
    ran: defaultdict[str, float] = defaultdict(float)
    full: defaultdict[str, float] = defaultdict(float)
    images = True
    for one in outputs:
        words, tokens = len(one.decoder_exit_layers), sum(one.decoder_exit_layers)
        image = one.image_exit_layers
        streams = [depth for depth in (image, one.text_exit_layers) if depth]
        parts = {
            "mean": (sum(streams) / max(len(streams), 1), encoder * bool(streams)),
            "sum": (sum(streams), encoder * len(streams)),
            "without_text": (image, encoder * bool(image)),
        }
        for name, (depth, deepest) in parts.items():
            ran[name] += words * depth + tokens
            full[name] += words * (deepest + decoder)
        images = images and bool(image)
    reductions: dict[str, float | None] = {
        name: 1 - ran[name] / full[name] if full[name] else 0.0 for name in ("mean", "sum", "without_text")
    }
    return reductions if images else reductions | {"without_text": None}


def layers_skipped(config: PreTrainedConfig, depths: Depths) -> float:
    """R of one output, the mean of its streams as n_E; see [`expected_time_reduction`]."""
    return expected_time_reduction(config, [depths])["mean"] or 0.0


__all__ = ["Depths", "expected_time_reduction", "layers_skipped", "new_tokens", "read_depths"]
