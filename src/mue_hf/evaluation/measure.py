"""What predictions are worth: quality, depths, the paper's R, FLOPs, lengths, and time against full depth."""

import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..inference.depths import expected_time_reduction
from ..inference.flops import FlopCount, caption_flops, decoder_layer_flops, intermediate_logits
from ..inference.predict import Prediction, predict
from ..inference.timing import in_turns
from ..metrics import bootstrap_interval, caption_scores, entailment_scores
from ..metrics.intervals import percentile_interval, resampling_weights
from ..model.exit_options_mue import resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .depths import depth_by_position, depth_counts, executed_layers, extremes, mean_depths
from .signals import branching_nodes

VERSIONS = ("mue-hf", "torch", "transformers", "timm", "numpy")


@dataclass(frozen=True)
class Meter:
    """
    What the figures of one run have in common.

    Args:
        model, processor, task, prompt_type: see [`predict`].
        fields (sequence [rows] of `dict`): the rows without their images: "references", or "label" and maybe "kind".
        decoding (`dict`): options of `generate` that are no exits.
        metrics, tokenizer, resamples: see [`caption_scores`].
        words (sequence [rows] of `str`, *optional*): the labels of a baseline that sees words alone.
    """

    model: MuEForConditionalGeneration
    processor: MuEProcessor
    task: str
    fields: Sequence[Mapping[str, Any]]
    decoding: Mapping[str, Any]
    prompt_type: str = "prev_output"
    metrics: Sequence[str] = ("bleu", "meteor", "rouge_l", "cider")
    tokenizer: str = "ptb"
    resamples: int = 1000
    words: Sequence[str] | None = None

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
        same = [float(one.output == other.output) for one, other in zip(predictions, full, strict=True)]
        if self.task == "entailment":
            quality = self._accuracy(predictions, self.fields)
        else:
            quality = self._caption_scores(predictions, metrics=self.metrics, resamples=self.resamples)
        easy, hard = extremes(predictions)
        return {
            "quality": {name: value for name, value in quality.items() if name != "intervals"},
            "intervals": quality["intervals"],
            "difference": self.difference(predictions, against),
            "identical": fmean(same),
            "identical_interval": self._interval(same, predictions),
            "depth": mean_depths(predictions),
            "depth_counts": depth_counts(predictions),
            "executed": self.executed(predictions, exits),
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
            **({} if self.words is None else {"words": self.above_words(predictions, self.words)}),
            "samples": self.samples(predictions) if self.task == "captioning" else None,
            "easiest": easy,
            "hardest": hard,
        }

    def difference(self, predictions: Sequence[Prediction], against: Sequence[Prediction]) -> dict[str, Any]:
        """How far the main score ("score": CIDEr, accuracy, or else the first metric) is above that of `against`:
        "mean" over rows and "interval"."""
        name, ours = self._row_scores(predictions)
        _, theirs = self._row_scores(against)
        differences = [one - other for one, other in zip(ours, theirs, strict=True)]
        interval = self._interval(differences, predictions)
        return {"score": name, "mean": fmean(differences), "interval": interval}

    def samples(self, predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
        """The captions of the best, the median and the worst image by the main score: image, output and score."""
        name, scores = self._row_scores(predictions)
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        rows = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
        return {
            place: {"image_id": predictions[row].image_id, "output": predictions[row].output, name: scores[row]}
            for place, row in rows.items()
        }

    def _interval(self, values: Sequence[float], predictions: Sequence[Prediction]) -> tuple[float, float]:
        return bootstrap_interval(values, [one.image_id for one in predictions], resamples=self.resamples)

    def right_answers(self, predictions: Sequence[Prediction]) -> list[float]:
        """1 for each row of entailment with the right answer, 0 for the others."""
        answers = self.processor.entailment_answers
        pairs = zip(predictions, self.fields, strict=True)
        return [float(one.output == answers[row["label"]]) for one, row in pairs]

    def _row_scores(self, predictions: Sequence[Prediction]) -> tuple[str, list[float]]:
        if self.task == "entailment":
            return "accuracy", self.right_answers(predictions)
        metric = "cider" if "cider" in self.metrics else self.metrics[0]
        scores = self._caption_scores(predictions, metrics=[metric], per_image=True)["per_image"]
        # Of BLEU the last is BLEU-4.
        name = list(scores)[-1]
        return name, scores[name]

    def _caption_scores(self, predictions: Sequence[Prediction], **options: Any) -> dict[str, Any]:
        references = [row["references"] for row in self.fields]
        return caption_scores([one.output for one in predictions], references, tokenizer=self.tokenizer, **options)

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

    def above_words(self, predictions: Sequence[Prediction], words: Sequence[str]) -> dict[str, Any]:
        """Accuracy of the labels `words` of words alone, and how far the predictions are above it, with intervals over
        images: of all rows, and "by_kind" where rows have a kind."""
        ours = self.right_answers(predictions)
        theirs = [float(label == row["label"]) for label, row in zip(words, self.fields, strict=True)]

        def compared(rows: Sequence[int]) -> dict[str, Any]:
            some = [predictions[row] for row in rows]
            right, change = [theirs[row] for row in rows], [ours[row] - theirs[row] for row in rows]
            difference = {"mean": fmean(change), "interval": self._interval(change, some)}
            return {"accuracy": fmean(right), "interval": self._interval(right, some), "difference": difference}

        kinds = defaultdict(list)
        for number, row in enumerate(self.fields):
            kinds[str(row.get("kind"))].append(number)
        by_kind = {kind: compared(rows) for kind, rows in kinds.items()} if "kind" in self.fields[0] else None
        return {**compared(range(len(ours))), "by_kind": by_kind}

    def executed(self, predictions: Sequence[Prediction], exits: Mapping[str, Any]) -> float | None:
        """Decoder layers that run for a token of a caption, see [`executed_layers`]; the one decision about an answer
        has no later token."""
        if self.task == "entailment":
            return None
        options = resolve_options(
            {**self.decoding, **exits}, {}, self.model.generation_config.to_dict(), self.model.config
        )
        return executed_layers(predictions, options.exit_kv)

    def flops(self, predictions: Sequence[Prediction], exits: Mapping[str, Any]) -> dict[str, Any]:
        """Mean FLOPs of an output that is alone in its batch, and the share skipped against all layers for the same
        tokens, with and without the image trunk. Depths of the returned caption stand for those of the other beams."""
        count = caption_flops
        if self.task == "entailment":
            count = partial(self._answer_flops, branching_nodes(self.processor))
        flops = FlopCount(self.model, {**self.decoding, **exits}, count)
        size = self.processor.image_processor.size
        pixel_shape = (3, size["height"], size["width"])
        parts: Counter[str] = Counter()
        full_total = 0
        for one in predictions:
            ran, full = flops(pixel_shape if one.image_exit_layers else None, one.text_tokens, one)
            parts.update(ran)
            full_total += sum(full.values())
        rows, trunk, total = len(predictions), parts["trunk"], parts.total()
        return {
            "mean": total / rows,
            "full_depth_mean": full_total / rows,
            "skipped": 1 - total / full_total,
            "skipped_without_trunk": 1 - (total - trunk) / (full_total - trunk),
            "parts": {name: value / rows for name, value in parts.items()},
        }

    def _answer_flops(
        self, branching: Mapping, config: Any, depths: Sequence[int], *, criterion: str, text_tokens: int, **sizes: Any
    ) -> dict[str, int]:
        """`caption_flops` for closed answers: the prompt runs at once, for each branching node of their trie, and the
        head has a row for each allowed token."""
        # The encoder's prompt without </s>, or <s> alone; and the longest beginning of an answer that is run.
        prompt = text_tokens - 1 if self.prompt_type == "prev_output" else 1
        length = prompt + max(map(len, branching))
        sizes |= {"text_tokens": text_tokens, "max_tokens": length, "beams": 1, "rescore": False}
        # Criteria look at the answers' own tokens, whatever list there is for captions.
        looked_at = len({token for tokens in branching.values() for token in tokens})
        # A token that runs no layer costs what all of them share.
        parts = caption_flops(config, [0], **sizes)
        memory = sizes["image_tokens"] + text_tokens
        parts["cross_keys"] += max(depths) * 2 * 2 * memory * config.d_model**2
        parts["decoder"] += sum(depths) * length * decoder_layer_flops(config, length - 1, memory)
        rows = sum(map(len, branching.values())) + intermediate_logits(config, depths, criterion, looked_at)
        parts["head"] = 2 * config.d_model * rows
        return parts

    def time(
        self, rows: Sequence[Mapping[str, Any]], exits: Mapping[str, Any], *, batch_size: int = 1, repeats: int = 5
    ) -> dict[str, Any]:
        """
        Seconds of trunk, encoder and decoder under `exits` and at full depth, in turns in this process.

        Args:
            rows: to be timed, with images; reading and resizing them is not timed.
            batch_size, repeats (`int`): rows per call, and timed runs of each call, after one to warm up.

        Returns:
            `dict`: "seconds" and "full_depth_seconds" per row (means over calls of medians over repeats), "speedup"
            (their ratio) and "speedup_interval" (95 %, calls resampled), and what was timed.
        """
        ways = {"exits": exits, "full depth": {"exit_criterion": "never"}}
        calls = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        seconds: list[list[float]] = []
        for call in tqdm(calls, desc="timing", unit="call"):
            runs = {name: partial(self._seconds, call, options) for name, options in ways.items()}
            seconds.append([median(times[1:]) for times in in_turns(runs, repeats + 1).values()])
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

    def _seconds(self, call: Sequence[Mapping[str, Any]], exits: Mapping[str, Any]) -> float:
        settings: dict[str, Any] = {"batch_size": len(call), "prompt_type": self.prompt_type, "progress": False}
        made = predict(self.model, self.processor, call, self.task, {**self.decoding, **exits}, **settings)
        return sum(one.seconds for one in made)


def environment(model: PreTrainedModel, batch_size: int) -> dict[str, Any]:
    """What the figures were measured on: hardware, threads, dtype and versions."""
    if model.device.type == "cuda":
        hardware = torch.cuda.get_device_name(model.device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        hardware = names[0] if names else platform.processor() or platform.machine()
    engine = getattr(model, "engine", None)
    return ({} if engine is None else {"engine": f"onnxruntime {version('onnxruntime')}, {engine.precision}"}) | {
        "device": str(model.device),
        "hardware": hardware,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS if find_spec(name.replace("-", "_"))},
    }


__all__ = ["Meter", "environment"]
