"""How deep predictions went: means, counts, by token position, by image, by layer, and at the oracle's exits."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch

from ..inference.flops import filled_layers
from ..inference.predict import Prediction
from ..model.criteria_mue import LAYER_OPTIONS
from .signals import Signals


def _stream_depths(predictions: Sequence[Prediction]) -> dict[str, list[int]]:
    """The depths of all rows ("image", "text") and tokens ("decoder")."""
    return {
        "image": [one.image_exit_layers for one in predictions],
        "text": [one.text_exit_layers for one in predictions],
        "decoder": [depth for one in predictions for depth in one.decoder_exit_layers],
    }


def mean_depths(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Mean layers of "image" and "text" over rows, and of "decoder" over tokens."""
    return {name: fmean(depths or [0]) for name, depths in _stream_depths(predictions).items()}


def executed_layers(predictions: Sequence[Prediction], exit_kv: str) -> float:
    """Decoder layers that run for a token, mean of outputs that are alone in their batch; with "exact" those that
    earlier tokens skipped and later ones ask for are among them."""
    ran = sum(sum(one.decoder_exit_layers) for one in predictions)
    if exit_kv == "exact":
        ran += sum(sum(filled_layers(one.decoder_exit_layers)) for one in predictions)
    return ran / max(sum(len(one.decoder_exit_layers) for one in predictions), 1)


def depth_counts(predictions: Sequence[Prediction]) -> dict[str, dict[str, int]]:
    """How many rows ("image", "text") and tokens ("decoder") ran how many layers; the keys are text, as in JSON."""
    counts = {name: Counter(depths) for name, depths in _stream_depths(predictions).items()}
    return {name: {str(depth): count[depth] for depth in sorted(count)} for name, count in counts.items()}


def depth_by_position(predictions: Sequence[Prediction]) -> list[dict[str, float]]:
    """Mean decoder layers and number of outputs at each token position, from the first."""
    columns = zip_longest(*(one.decoder_exit_layers for one in predictions))
    there = [[depth for depth in column if depth is not None] for column in columns]
    return [{"depth": fmean(column), "outputs": len(column)} for column in there]


def extremes(predictions: Sequence[Prediction], count: int = 10) -> tuple[list[dict], list[dict]]:
    """The images of the least and of the most mean depth: encoder (mean of the streams) plus decoder layers."""
    depths = defaultdict(list)
    for one in sorted(predictions, key=lambda one: one.image_id):
        mean = mean_depths([one])
        depths[one.image_id].append((mean["image"] + mean["text"]) / 2 + mean["decoder"])
    means: list[dict[str, Any]] = [{"image_id": image_id, "depth": fmean(some)} for image_id, some in depths.items()]
    means.sort(key=lambda one: one["depth"])
    return means[:count], means[::-1][:count]


def similarity_curves(signals: Signals) -> dict[str, dict[str, list[float]]]:
    """How much each layer changes its stream: "mean", "low" and "high" (quartiles) of the cosine by layer for each
    stream, over samples or tokens, and for the decoder "agreeing", the share of tokens that the layer already gives
    as the last one does."""
    curves = {}
    for name, cosines in {**signals.encoder, "decoder": signals.decoder}.items():
        cosines = cosines[~cosines.isnan().any(dim=1)].double()
        if len(cosines):
            low, high = cosines.quantile(cosines.new_tensor([0.25, 0.75]), dim=0).tolist()
            curves[name] = {"mean": cosines.mean(0).tolist(), "low": low, "high": high}
    curves["decoder"]["agreeing"] = signals.agreeing.double().mean(0).tolist()
    return curves


def shuffled_depths(
    reference: Sequence[Prediction], decomposed: bool, seed: int = 0
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """The shuffled-depth baseline of `reference`: the image's depths shuffled among images, the text's among rows, and
    for each row one decoder depth drawn from those of all tokens. Yields rows with one decoder depth, and the exit
    options that run them so; `decomposed` says whether image and text have streams of their own."""
    rng = random.Random(seed)
    images = {one.image_id: one.image_exit_layers for one in reference}
    image_depths = dict(zip(images, rng.sample(list(images.values()), len(images)), strict=True))
    text = rng.sample([one.text_exit_layers for one in reference], len(reference))
    tokens = [depth for one in reference for depth in one.decoder_exit_layers]
    groups = defaultdict(list)
    for index in range(len(reference)):
        groups[rng.choice(tokens)].append(index)
    for depth, indices in groups.items():
        # A row without the stream has depth 0, which no layer can have; what is passed for it does not matter.
        image = torch.tensor([max(image_depths[reference[index].image_id], 1) for index in indices])
        other = torch.tensor([max(text[index], 1) for index in indices])
        depths: dict[str, Any] = {"image": image, "text": other} if decomposed else {"encoder": other}
        options = {LAYER_OPTIONS[stream]: value for stream, value in (depths | {"decoder": depth}).items()}
        yield indices, {"exit_criterion": "fixed"} | options


def token_oracle(full: Sequence[Prediction], signals: Signals) -> list[Prediction]:
    """The predictions at full depth, each token at the first layer from which the best token stays that of the last:
    no criterion can exit earlier without another token, given the keys and values of all layers. `signals` were
    recorded while `full` was made without beams."""
    layers = signals.agreeing.shape[1]
    # Layers at the end that agree without a break.
    settled = signals.agreeing.flip(1).int().cumprod(1).sum(1)
    counts = signals.samples[signals.rows].bincount(minlength=len(full))
    depths = (layers - settled + 1).split(counts.tolist())
    return [replace(one, decoder_exit_layers=tuple(some.tolist())) for one, some in zip(full, depths, strict=True)]


__all__ = [
    "depth_by_position",
    "depth_counts",
    "executed_layers",
    "extremes",
    "mean_depths",
    "shuffled_depths",
    "similarity_curves",
    "token_oracle",
]
