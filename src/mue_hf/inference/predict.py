"""Captions or answers for the rows of a data set, with the depths that they took: what evaluation and calibration run.

Outputs come from real generation (or real scoring) under the given exits; nothing is replayed or teacher-forced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BatchFeature

from ..model.exit_options_mue import CONFIG_NAMES, check_names, resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import CAPTION_PROMPT, MuEProcessor
from .depths import Depths, new_tokens, read_depths
from .loading import evaluating
from .timing import timed

TASKS = ("captioning", "entailment")
# Task -> texts of a row, the first of them needed.
TEXTS = {"captioning": (), "entailment": ("hypothesis", "premise"), "vqa": ("text",)}
# Options of `generate` that transformers does not check: the least whole number, or None for any number.
NUMBERS = {
    "num_beams": 1,
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
    "length_penalty": None,
    "repetition_penalty": None,
    "temperature": None,
    "top_p": None,
}


@dataclass(frozen=True)
class Prediction(Depths):
    """
    What one row gave, and the depths that it took.

    Args:
        output (`str`): the caption, without punctuation as OFA evaluates it, or the answer "yes", "no" or "maybe".
        token_ids (`tuple[int, ...]`): the new tokens with their `</s>`; of an answer its tokens alone.
        text_tokens (`int`): tokens of the prompt.
        seconds (`float`): of its batch's trunk, encoder and decoder, divided by the rows of the batch.
    """

    image_id: str
    output: str
    token_ids: tuple[int, ...]
    text_tokens: int
    seconds: float


def predict(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    rows: Sequence[Mapping[str, Any]],
    task: str,
    options: Mapping[str, Any] | None = None,
    *,
    batch_size: int = 16,
    prompt_type: str = "prev_output",
    progress: bool = True,
) -> list[Prediction]:
    """
    Runs the model on every row.

    Neighbours of one image share it: its trunk runs once in a batch, and so does its encoder stream where all images
    of the batch have equally many rows.

    Args:
        model, processor: on the model's device, in its dtype; put into evaluation mode for the time.
        rows (sequence of `dict`): as [`load_captioning`] or [`load_entailment`] gives them: "image_id", "image" (None
            for a row without one) or "image_features" [channels, rows, columns], and for entailment "hypothesis" and
            "premise".
        task (`str`): "captioning" or "entailment".
        options (`dict`, *optional*): of `generate`, exits included; for entailment exit options alone. A tensor
            [rows] as `image_exit_layer` or `text_exit_layer` gives each row a depth; rows of one image get that of its
            first.
        batch_size, progress: rows per call, and whether a bar is shown.
        prompt_type (`str`, *optional*, defaults to `"prev_output"`): for entailment, what the decoder reads before the
            answer: the prompt of the encoder, or with "none" `<s>` alone.

    Returns:
        `list[Prediction]`: one per row, in their order.

    Raises:
        ValueError: if the task, an option or a row is not one of these, before the first row is run.
    """
    _check(rows, task, batch_size, prompt_type)
    options = task_options(task, options or {})
    for name, value in options.items():
        if isinstance(value, Tensor) and len(value) != len(rows):
            raise ValueError(f"`{name}` must hold one depth per row, {len(rows)}, got {len(value)}; pass as many.")
    resolve_options(options, {}, model.generation_config.to_dict(), model.config)
    predictions: list[Prediction] = []
    bar = tqdm(total=len(rows), desc=task, unit="row", leave=None, disable=not progress)
    with bar, evaluating(model), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
            cut = {
                name: value[start : start + len(batch)] if isinstance(value, Tensor) else value
                for name, value in options.items()
            }
            predictions += _run(model, processor, batch, task, cut, prompt_type)
            bar.update(len(batch))
    return predictions


def _check(rows: Sequence[Mapping[str, Any]], task: str, batch_size: int, prompt_type: str) -> None:
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {list(TASKS)}, got {task!r}; choose one of them.")
    if not len(rows):
        raise ValueError("`rows` must hold at least one row, got none; check the data and its split.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}; pass more.")
    if prompt_type not in ("prev_output", "none"):
        raise ValueError(f'`prompt_type` must be "prev_output" or "none", got {prompt_type!r}; pass either.')
    missing = {"image_id", *TEXTS[task][:1]} - rows[0].keys()
    if missing or not {"image", "image_features"} & rows[0].keys():
        raise ValueError(
            f"`rows` must have image_id, image or image_features{', hypothesis' * (task == 'entailment')}, got "
            f"{sorted(rows[0])}; load them with `load_{task}`."
        )


def task_options(task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate` or `score_answers`, checked, by which each row has one output whatever is saved.

    Raises:
        ValueError: for decoding options of a task without it, several captions, and no number where one belongs.
    """
    check_names(options, CONFIG_NAMES)
    if task != "captioning":
        if foreign := sorted(options.keys() - CONFIG_NAMES):
            raise ValueError(f"`options` of {task} must be exit options, got {foreign}; answers are not generated.")
        return dict(options)
    for name, value in options.items():
        if name not in NUMBERS or value is None:
            continue
        least = NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, Real if least is None else Integral):
            kind = "a number" if least is None else "a whole number"
            raise ValueError(f"`{name}` must be {kind}, got {value!r}; pass one.")
        if least is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}; pass more.")
    if (count := options.get("num_return_sequences", 1)) != 1:
        raise ValueError(f"`num_return_sequences` must be 1, got {count}; a row has one caption.")
    return {**options, "num_return_sequences": 1}


def encode_texts(processor: MuEProcessor, task: str, rows: Sequence[Mapping[str, Any]]) -> BatchFeature:
    """The model's inputs for the texts of rows."""
    if task == "captioning":
        return processor(text=[CAPTION_PROMPT] * len(rows))
    texts: dict[str, Any] = {name: [row.get(name) for row in rows] for name in TEXTS[task]}
    return processor(task=task, **texts)


def run_task(
    model: MuEForConditionalGeneration,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    answer_ids: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Captions, or scores of answers, with their depths."""
    if answer_ids is None:
        return model.generate(**inputs, **options, return_dict_in_generate=True)
    return model.score_answers(answer_ids, **inputs, **options, return_dict=True)


def _run(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    batch: list[Mapping[str, Any]],
    task: str,
    options: dict[str, Any],
    prompt_type: str,
) -> list[Prediction]:
    groups = [list(group) for _, group in groupby(batch, key=lambda row: row["image_id"])]
    inputs = _inputs(processor, batch, [group[0] for group in groups], task, prompt_type)
    inputs = inputs.to(model.device, model.dtype)
    text_tokens = inputs["attention_mask"].sum(1).tolist()
    answers = list(processor.entailment_answers.values()) if task == "entailment" else []
    answer_ids = processor.encode_answers(answers) if answers else None

    def call() -> Any:
        _spread(model, inputs, [len(group) for group in groups], options)
        return run_task(model, inputs, options, answer_ids)

    output, seconds = timed(call, model.device)
    if answer_ids is None:
        outputs, token_ids = processor.post_process_captions(output.sequences), new_tokens(output)
    else:
        best = output.scores.argmax(1).tolist()
        outputs, token_ids = [answers[index] for index in best], [tuple(answer_ids[index]) for index in best]
    image_ids, each = [row["image_id"] for row in batch], seconds / len(batch)
    columns = zip(read_depths(output), image_ids, outputs, token_ids, text_tokens, strict=True)
    return [
        Prediction(**vars(depths), image_id=image, output=text, token_ids=ids, text_tokens=count, seconds=each)
        for depths, image, text, ids, count in columns
    ]


def _inputs(
    processor: MuEProcessor, batch: list[Mapping], pictures: list[Mapping], task: str, prompt_type: str
) -> BatchFeature:
    """The model's inputs for the texts of the rows `batch` and the images of the rows `pictures`."""
    inputs = encode_texts(processor, task, batch)
    if prompt_type == "none":
        for name in ("decoder_input_ids", "decoder_attention_mask"):
            inputs.pop(name, None)
    if "image_features" in pictures[0]:
        inputs["image_features"] = torch.stack([torch.as_tensor(row["image_features"]) for row in pictures])
    else:
        # Its texts are those of captioning, one per image; they are not used.
        encoded = processor(images=[row["image"] for row in pictures])
        inputs |= {name: encoded[name] for name in ("pixel_values", "patch_mask") if name in encoded}
    return inputs


def _spread(
    model: MuEForConditionalGeneration, inputs: BatchFeature, counts: list[int], options: dict[str, Any]
) -> None:
    """Lets images and their depths fit the texts: one image for as many texts each, or else one per text."""
    first = torch.tensor([0, *counts]).cumsum(0)[:-1]
    if len(set(counts)) > 1:
        if "pixel_values" in inputs:
            inputs["image_features"] = model.model.trunk_features(inputs.pop("pixel_values"))
        first = first.repeat_interleave(torch.tensor(counts))
        repeats = torch.tensor(counts, device=model.device)
        for name in ("image_features", "patch_mask"):
            if name in inputs:
                inputs[name] = inputs[name].repeat_interleave(repeats, dim=0)
    if isinstance(options.get("image_exit_layer"), Tensor):
        options["image_exit_layer"] = options["image_exit_layer"][first]


__all__ = ["TASKS", "Prediction", "encode_texts", "predict", "run_task", "task_options"]
