"""What predictions are worth: quality, depths, the paper's R, FLOPs, lengths, and time against full depth."""

import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..inference.flops import caption_flops, decoder_layer_flops, trunk_flops
from ..inference.predict import Prediction, predict
from ..metrics import bootstrap_interval, caption_scores, entailment_scores
from ..metrics.intervals import percentile_interval, resampling_weights
from ..model.answers_mue import answer_tree
from ..model.criteria_mue import CRITERIA
from ..model.exit_options_mue import resolve_options
from ..model.processing_mue import MuEProcessor
from .signals import Signals

VERSIONS = ("mue-hf", "torch", "transformers", "timm", "numpy")


@dataclass(frozen=True)
class Meter:
    """
    What the figures of one run have in common.

    Args:
        model, processor: those that predict.
        task (`str`): "captioning" or "entailment".
        fields (sequence [rows] of `dict`): the rows without their images: "references", or "label" and maybe "kind".
        decoding (`dict`): options of `generate` that are no exits.
        prompt_type (`str`): see [`predict`].
        metrics, tokenizer: see [`caption_scores`].
        resamples (`int`): draws of images for the intervals.
    """

    model: PreTrainedModel
    processor: MuEProcessor
    task: str
    fields: Sequence[Mapping[str, Any]]
    decoding: Mapping[str, Any]
    prompt_type: str = "prev_output"
    metrics: Sequence[str] = ("bleu", "meteor", "rouge_l", "cider")
    tokenizer: str = "ptb"
    resamples: int = 1000

    def figures(
        self,
        predictions: Sequence[Prediction],
        exits: Mapping[str, Any],
        full: Sequence[Prediction],
        against: Sequence[Prediction],
    ) -> dict[str, Any]:
        """Everything about a point but its time: `predictions` under `exits`, beside those at full depth (`full`) and
        those of the point that it is compared with (`against`)."""
        config = self.model.config
        image_ids = [one.image_id for one in predictions]
        same = [float(one.output == other.output) for one, other in zip(predictions, full, strict=True)]
        quality = self.quality(predictions)
        easy, hard = extremes(predictions)
        return {
            "quality": {name: value for name, value in quality.items() if name != "intervals"},
            "intervals": quality["intervals"],
            "difference": self.difference(predictions, against),
            "identical": fmean(same),
            "identical_interval": bootstrap_interval(same, image_ids, resamples=self.resamples),
            "depth": mean_depths(predictions),
            "depth_counts": depth_counts(predictions),
            "layers": {"encoder": config.encoder_layers, "decoder": config.decoder_layers},
            "layers_skipped": expected_time_reduction(config, predictions),
            "flops": self.flops(predictions, exits),
            "length": {
                "tokens": fmean(len(one.token_ids) for one in predictions),
                "full_depth_tokens": fmean(len(one.token_ids) for one in full),
                "words": fmean(len(one.output.split()) for one in predictions),
                "full_depth_words": fmean(len(one.output.split()) for one in full),
            },
            "depth_by_position": depth_by_position(predictions) if self.task == "captioning" else None,
            "by_kind": self.by_kind(predictions),
            "easiest": easy,
            "hardest": hard,
        }

    def quality(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """The scores of the task with their "intervals"."""
        if self.task == "captioning":
            return caption_scores(
                [one.output for one in predictions],
                [row["references"] for row in self.fields],
                metrics=self.metrics,
                tokenizer=self.tokenizer,
                resamples=self.resamples,
            )
        return self._accuracy(predictions, self.fields)

    def difference(self, predictions: Sequence[Prediction], against: Sequence[Prediction]) -> dict[str, Any]:
        """How far the main score ("score": CIDEr, accuracy, or else the first metric) is above that of `against` on
        the same rows: "mean" over rows and "interval"."""
        name, ours = self._row_scores(predictions)
        _, theirs = self._row_scores(against)
        differences = [one - other for one, other in zip(ours, theirs, strict=True)]
        image_ids = [one.image_id for one in predictions]
        return {
            "score": name,
            "mean": fmean(differences),
            "interval": bootstrap_interval(differences, image_ids, resamples=self.resamples),
        }

    def _row_scores(self, predictions: Sequence[Prediction]) -> tuple[str, list[float]]:
        if self.task == "entailment":
            answers = self.processor.entailment_answers
            pairs = zip(predictions, self.fields, strict=True)
            return "accuracy", [float(one.output == answers[row["label"]]) for one, row in pairs]
        scores = caption_scores(
            [one.output for one in predictions],
            [row["references"] for row in self.fields],
            metrics=["cider" if "cider" in self.metrics else self.metrics[0]],
            tokenizer=self.tokenizer,
            per_image=True,
        )["per_image"]
        # Of BLEU the last is BLEU-4.
        name = list(scores)[-1]
        return name, scores[name]

    def _accuracy(self, predictions: Sequence[Prediction], fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        classes = {answer: label for label, answer in self.processor.entailment_answers.items()}
        return entailment_scores(
            [classes[one.output] for one in predictions],
            [row["label"] for row in fields],
            image_ids=[one.image_id for one in predictions],
            labels=list(classes.values()),
            resamples=self.resamples,
        )

    def by_kind(self, predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]] | None:
        """Accuracy, depths and base rate (the share of the most frequent label) of each kind of statement."""
        if self.task != "entailment" or "kind" not in self.fields[0]:
            return None
        groups = defaultdict(list)
        for one, row in zip(predictions, self.fields, strict=True):
            groups[str(row["kind"])].append((one, row))
        kinds = {}
        for kind, pairs in groups.items():
            some, rows = zip(*pairs, strict=True)
            scores = self._accuracy(some, rows)
            kinds[kind] = {
                "rows": len(rows),
                "accuracy": scores["accuracy"],
                "interval": scores["intervals"]["accuracy"],
                "base_rate": max(Counter(row["label"] for row in rows).values()) / len(rows),
                "depth": mean_depths(some),
            }
        return kinds

    def flops(self, predictions: Sequence[Prediction], exits: Mapping[str, Any]) -> dict[str, Any]:
        """Mean FLOPs of an output that is alone in its batch, and the share skipped against all layers for the same
        tokens, with and without the image trunk. Depths of the returned caption stand for those of the other beams."""
        config = self.model.config
        saved = self.model.generation_config.to_dict()
        options = resolve_options(exits, {}, saved, config)
        size = self.processor.image_processor.size
        trunk, channels, image_tokens = trunk_flops(self.model, (3, size["height"], size["width"]))
        settings = saved | dict(self.decoding)
        common = {
            "channels": channels,
            "max_tokens": settings.get("max_new_tokens") or (settings.get("max_length") or 20) - 1,
            "beams": settings.get("num_beams") or 1,
        }
        count = self._answer_flops if self.task == "entailment" else caption_flops
        totals: Counter[str] = Counter()
        for one in predictions:
            image = bool(one.image_exit_layers)
            sizes = common | {
                "image_tokens": image_tokens * image,
                "text_tokens": one.text_tokens,
                "trunk": trunk * image,
            }
            depth = config.encoder_layers
            ran = count(
                config,
                one.decoder_exit_layers,
                image_exit_layers=one.image_exit_layers,
                text_exit_layers=one.text_exit_layers,
                exit_kv=options.exit_kv,
                criterion=options.exit_criterion if options.active else "never",
                **sizes,
            )
            everything = [config.decoder_layers] * len(one.decoder_exit_layers)
            full = count(
                config, everything, image_exit_layers=depth * image, text_exit_layers=depth, criterion="never", **sizes
            )
            totals.update(ran=sum(ran.values()), full=sum(full.values()), trunk=sizes["trunk"])
            totals.update({f"part {name}": value for name, value in ran.items()})
        rows = len(predictions)
        return {
            "mean": totals["ran"] / rows,
            "full_depth_mean": totals["full"] / rows,
            "skipped": 1 - totals["ran"] / totals["full"],
            "skipped_without_trunk": 1 - (totals["ran"] - totals["trunk"]) / (totals["full"] - totals["trunk"]),
            "parts": {
                name.removeprefix("part "): total / rows for name, total in totals.items() if name.startswith("part ")
            },
        }

    def _answer_flops(
        self, config: Any, depths: Sequence[int], *, criterion: str, text_tokens: int, **sizes: Any
    ) -> dict[str, int]:
        """`caption_flops` for closed answers: the prompt runs at once, once for each place where answers part, and
        the head has a row for each allowed token."""
        answers = list(self.processor.entailment_answers.values())
        tree = answer_tree(self.processor.encode_answers(answers), self.processor.tokenizer.eos_token_id)
        parting = {prefix: tokens for prefix, tokens in tree.items() if len(tokens) > 1}
        # The encoder's prompt without </s>, or <s> alone; and the longest beginning of an answer that is run.
        prompt = text_tokens - 1 if self.prompt_type == "prev_output" else 1
        length = prompt + max(map(len, parting))
        sizes |= {"text_tokens": text_tokens, "max_tokens": length, "beams": 1}
        # A token that runs no layer leaves what all of them share.
        parts = caption_flops(config, [0], **sizes)
        memory = sizes["image_tokens"] + text_tokens
        parts["cross_keys"] += max(depths) * 2 * 2 * memory * config.d_model**2
        parts["decoder"] += sum(depths) * length * decoder_layer_flops(config, length - 1, memory)
        # Criteria that look at the output read the whole vocabulary.
        looks = (
            sum(min(depth, config.decoder_layers - 1) for depth in depths) if CRITERIA[criterion].needs_logits else 0
        )
        rows = sum(map(len, parting.values())) + looks * config.vocab_size
        parts["head"] = 2 * config.d_model * rows
        return parts

    def time(
        self,
        rows: Sequence[Mapping[str, Any]],
        exits: Mapping[str, Any],
        *,
        batch_size: int = 1,
        repeats: int = 5,
        progress: bool = True,
    ) -> dict[str, Any]:
        """
        Seconds of trunk, encoder and decoder under `exits` and at full depth, in turns in this process.

        Args:
            rows: to be timed, with images; reading and resizing them is not timed.
            batch_size (`int`, *optional*, defaults to 1): rows per call.
            repeats (`int`, *optional*, defaults to 5): timed runs of each call, after one to warm up.

        Returns:
            `dict`: "seconds" and "full_depth_seconds" per row (means over calls of medians over repeats), "speedup"
            (their ratio) and "speedup_interval" (95 %, calls resampled), and what was timed.
        """
        ways = [dict(self.decoding) | dict(exits), dict(self.decoding) | {"exit_criterion": "never"}]
        calls = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        seconds: list[list[float]] = []
        for call in tqdm(calls, desc="timing", unit="call", disable=not progress):
            taken: list[list[float]] = [[], []]
            for repeat in range(repeats + 1):
                # Whichever comes second finds warmer caches: they swap.
                for way in (0, 1) if repeat % 2 else (1, 0):
                    some = predict(
                        self.model,
                        self.processor,
                        call,
                        self.task,
                        ways[way],
                        batch_size=batch_size,
                        prompt_type=self.prompt_type,
                        progress=False,
                    )
                    if repeat:
                        taken[way].append(sum(one.seconds for one in some))
            seconds.append([median(times) for times in taken])
        medians = np.array(seconds)
        sums = resampling_weights(len(medians), 1000, 0) @ medians
        exit_seconds, full_seconds = (medians.sum(0) / len(rows)).tolist()
        return {
            "seconds": exit_seconds,
            "full_depth_seconds": full_seconds,
            "speedup": full_seconds / exit_seconds,
            "speedup_interval": percentile_interval(sums[:, 1] / sums[:, 0], 0.95),
            "rows": len(rows),
            "batch_size": batch_size,
            "repeats": repeats,
        }


def expected_time_reduction(config: Any, predictions: Sequence[Prediction]) -> dict[str, float | None]:
    """
    R of the MuE paper over all words: 1 - sum(n_E + n_D) / sum(N_E + N_D). It counts layers, every layer alike.

    The paper does not say how the depths of image and text make n_E.

    Returns:
        `dict`: "mean" (n_E is their mean), "sum" (n_E is their sum, N_E both stacks), "without_text" (n_E is the
        image's alone: the constant prompt of captioning has next to no cost, and would count in full; None where a row
        has no image).
    """
    encoder, decoder = config.encoder_layers, config.decoder_layers
    ran: Counter[str] = Counter()
    full: Counter[str] = Counter()
    for one in predictions:
        words, tokens = len(one.decoder_exit_layers), sum(one.decoder_exit_layers)
        streams = [depth for depth in (one.image_exit_layers, one.text_exit_layers) if depth]
        parts = {
            "mean": (sum(streams) / max(len(streams), 1), encoder * bool(streams)),
            "sum": (sum(streams), encoder * len(streams)),
            "without_text": (one.image_exit_layers, encoder * bool(one.image_exit_layers)),
        }
        for name, (depth, deepest) in parts.items():
            ran[name] += words * depth + tokens
            full[name] += words * (deepest + decoder)
    reductions: dict[str, float | None] = {name: 1 - ran[name] / full[name] if full[name] else 0.0 for name in full}
    if not all(one.image_exit_layers for one in predictions):
        reductions["without_text"] = None
    return reductions


def mean_depths(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Mean layers of "image" and "text" over rows, and of "decoder" over tokens."""
    tokens = [depth for one in predictions for depth in one.decoder_exit_layers]
    return {
        "image": fmean(one.image_exit_layers for one in predictions),
        "text": fmean(one.text_exit_layers for one in predictions),
        "decoder": fmean(tokens or [0]),
    }


def depth_counts(predictions: Sequence[Prediction]) -> dict[str, dict[str, int]]:
    """How many rows ("image", "text") and tokens ("decoder") ran how many layers."""
    counts = {
        "image": Counter(one.image_exit_layers for one in predictions),
        "text": Counter(one.text_exit_layers for one in predictions),
        "decoder": Counter(depth for one in predictions for depth in one.decoder_exit_layers),
    }
    # JSON has text keys only.
    return {name: {str(depth): count[depth] for depth in sorted(count)} for name, count in counts.items()}


def depth_by_position(predictions: Sequence[Prediction]) -> list[dict[str, float]]:
    """Mean decoder layers and number of outputs at each token position, from the first."""
    longest = max(len(one.decoder_exit_layers) for one in predictions)
    columns = [
        [one.decoder_exit_layers[at] for one in predictions if at < len(one.decoder_exit_layers)]
        for at in range(longest)
    ]
    return [{"depth": fmean(column), "outputs": len(column)} for column in columns]


def extremes(predictions: Sequence[Prediction], count: int = 10) -> tuple[list[dict], list[dict]]:
    """The images of the least and of the most mean depth: encoder (mean of the streams) plus decoder layers."""
    ordered = sorted(predictions, key=lambda one: one.image_id)
    means = []
    for image_id, group in groupby(ordered, key=lambda one: one.image_id):
        some = [mean_depths([one]) for one in group]
        depth = fmean((one["image"] + one["text"]) / 2 + one["decoder"] for one in some)
        means.append({"image_id": image_id, "depth": depth})
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


def token_oracle(full: Sequence[Prediction], signals: Signals) -> list[Prediction]:
    """
    The predictions at full depth, each token at the first layer from which the best token stays that of the last.

    No criterion can leave earlier without another token, given the keys and values of all layers. It is read off
    `signals`, recorded while `full` was made without beams; nothing was skipped.
    """
    layers = signals.agreeing.shape[1]
    # Layers at the end that agree without a break.
    settled = signals.agreeing.flip(1).int().cumprod(1).sum(1)
    depths: list[list[int]] = [[] for _ in full]
    for sample, depth in zip(signals.samples[signals.rows].tolist(), (layers - settled + 1).tolist(), strict=True):
        depths[sample].append(depth)
    return [replace(one, decoder_exit_layers=tuple(some)) for one, some in zip(full, depths, strict=True)]


def environment(model: PreTrainedModel, batch_size: int) -> dict[str, Any]:
    """What the figures were measured on: hardware, threads, dtype and versions."""
    if model.device.type == "cuda":
        hardware = torch.cuda.get_device_name(model.device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        hardware = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": str(model.device),
        "hardware": hardware,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


__all__ = [
    "Meter",
    "depth_by_position",
    "depth_counts",
    "environment",
    "expected_time_reduction",
    "extremes",
    "mean_depths",
    "similarity_curves",
    "token_oracle",
]
