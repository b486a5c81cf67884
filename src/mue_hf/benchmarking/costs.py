"""Measures what layer calls of a model take on its device, so that batches shrink when it pays."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.cache_mue import MuECache
from ..model.costs_mue import device_key
from ..model.criteria_mue import ExitPolicy
from ..model.exit_options_mue import ExitOptions

# (rows, depth of each row or None for all layers) -> a run of one stack
Prepare = Callable[[int, Tensor | None], Callable[[], None]]


def measure_costs(
    model: PreTrainedModel,
    image_grid: tuple[int, int],
    text_tokens: int = 8,
    batch_sizes: Sequence[int] = (1, 4, 8),
    repeats: int = 5,
) -> dict[str, dict[str, dict[str, float]]]:
    """Times each stack of a model with all its layers, and with half of the rows leaving after the first.

    Keep the result with the model, `model.generation_config.exit_costs = measure_costs(...)`: it is saved there.

    Args:
        model (`MuEForConditionalGeneration`): in evaluation mode, on the device and in the dtype to measure.
        image_grid (`tuple[int, int]`): rows and columns of patches.
        text_tokens (`int`): tokens of a text.
        batch_sizes (`Sequence[int]`): at least two sizes.
        repeats (`int`): runs of each, of which the median counts.

    Returns:
        `dict`: {device: {stream: {"fixed", "per_row", "shrink"}}} in seconds: a layer call on n rows takes
        fixed + n * per_row, and taking rows out of a batch takes shrink.

    Raises:
        ValueError: if fewer than two batch sizes are given.
    """
    sizes = sorted(set(batch_sizes))
    if len(sizes) < 2:
        raise ValueError(f"`batch_sizes` must hold at least two sizes, to tell rows apart, got {list(batch_sizes)}.")
    config = model.config
    channels = model.get_encoder().image_proj.in_features
    image = {"image_features": torch.randn(1, channels, *image_grid, dtype=model.dtype, device=model.device)}
    text = {"input_ids": torch.randint(config.vocab_size, (max(sizes), text_tokens), device=model.device)}
    # random ids may be padding, which is text here
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    streams = {"image": image, "text": text} if config.modality_decomposition else {"encoder": image | text}
    with torch.no_grad():
        costs = {
            name: _fit(_encoder_runs(model, name, inputs), config.encoder_layers, sizes, repeats)
            for name, inputs in streams.items()
        }
        runs = _decoder_runs(model, image | {name: values[:1] for name, values in text.items()})
        costs["decoder"] = _fit(runs, config.decoder_layers, sizes, repeats)
    return {device_key(model.device): costs}


def _encoder_runs(model: PreTrainedModel, stream: str, inputs: dict[str, Tensor]) -> Prepare:
    def prepare(rows: int, depths: Tensor | None) -> Callable[[], None]:
        batch = {name: x[:rows] if len(x) > 1 else x.expand(rows, *x.shape[1:]) for name, x in inputs.items()}
        options = ExitOptions()
        if depths is not None:
            chosen: dict[str, Any] = {f"{stream}_exit_layer": depths}
            options = ExitOptions(exit_criterion="fixed", **chosen)
        return lambda: model.get_encoder()(**batch, exit_options=options)

    return prepare


def _decoder_runs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Prepare:
    encoded = model.get_encoder()(**inputs)

    def prepare(rows: int, depths: Tensor | None) -> Callable[[], None]:
        fields = {name: x.expand(rows, *x.shape[1:]) for name, x in encoded.items()}
        outputs = type(encoded)(**fields)
        ids = torch.full((rows, 1), model.config.decoder_start_token_id, device=model.device)
        policy = ExitPolicy() if depths is None else ExitPolicy("fixed", depth=depths)
        cache = MuECache(model.config)
        # all layers make their keys of the encoder's output, once
        model.get_decoder()(outputs, ids, cache=cache)

        def run() -> None:
            model.get_decoder()(outputs, ids, cache=cache, policy=policy)
            cache.crop(-1)

        return run

    return prepare


def _fit(prepare: Prepare, layers: int, sizes: Sequence[int], repeats: int) -> dict[str, float]:
    whole = [_median(prepare(rows, None), repeats) for rows in sizes]
    per_row, fixed = np.polyfit(sizes, whole, 1) / layers
    rows = sizes[-1]
    depths = torch.full((rows,), layers)
    depths[: rows // 2] = 1
    halved = _median(prepare(rows, depths), repeats)
    expected = whole[-1] - per_row * (rows // 2) * (layers - 1)
    costs = {"fixed": fixed, "per_row": per_row, "shrink": halved - expected}
    return {name: max(float(seconds), 0.0) for name, seconds in costs.items()}


def _median(run: Callable[[], None], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    # the first run allocates
    return float(np.median(seconds[1:]))


__all__ = ["measure_costs"]
