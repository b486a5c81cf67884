"""Captions or answers for the rows of a data set, with the depths that they took: what evaluation and calibration run.

Outputs come from real generation (or real scoring) under the given exits; nothing is replayed or teacher-forced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..model.exit_options_mue import CONFIG_NAMES, check_names, resolve_options
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import CAPTION_PROMPT, MuEProcessor
from .depths import Depths, new_tokens, read_depths
from .loading import evaluating
from .timing import timed

TASKS = ("captioning", "entailment")
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
        image_id (`str`): that of the row.
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
        model ([`MuEForConditionalGeneration`]): on its device, in its dtype; put into evaluation mode for the time.
        processor ([`MuEProcessor`]): that of the model.
        rows (sequence of `dict`): as [`load_captioning`] or [`load_entailment`] gives them: "image_id", "image" (None
            for a row without one) or "image_features" [channels, rows, columns], and for entailment "hypothesis" and
            "premise".
        task (`str`): "captioning" or "entailment".
        options (`dict`, *optional*): of `generate`, exits included; for entailment exit options alone. A tensor
            [rows] as `image_exit_layer` or `text_exit_layer` gives each row a depth; rows of one image get that of its
            first.
        batch_size (`int`, *optional*, defaults to 16): rows per call.
        prompt_type (`str`, *optional*, defaults to `"prev_output"`): for entailment, what the decoder reads before the
            answer: "prev_output", the prompt of the encoder, or "none", `<s>` alone. See [`MuEDataCollator`].
        progress (`bool`, *optional*, defaults to `True`): whether a bar is shown.

    Returns:
        `list[Prediction]`: one per row, in their order.

    Raises:
        ValueError: if the task, an option or a row is not one of these, before the first row is run.
    """
    options = dict(options or {})
    _check(model, rows, task, options, batch_size, prompt_type)
    if task == "captioning":
        options = one_caption(options)
    predictions: list[Prediction] = []
    bar = tqdm(total=len(rows), desc=task, unit="row", leave=None, disable=not progress)
    with bar, evaluating(model), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
            inputs = model_inputs(model, processor, batch, task, prompt_type)
            counts = [len(list(group)) for _, group in groupby(row["image_id"] for row in batch)]
            cut = {
                name: value[start : start + len(batch)] if isinstance(value, Tensor) else value
                for name, value in options.items()
            }
            predictions += _run(model, processor, batch, inputs, counts, cut, task)
            bar.update(len(batch))
    return predictions


def one_caption(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate`, by which each image has one caption whatever is saved with the model.

    Raises:
        ValueError: if they ask for more, or one that must be a number is none.
    """
    for name, value in options.items():
        if name not in NUMBERS or value is None:
            continue
        least = NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, int if least is not None else int | float):
            kind = "a number" if least is None else "a whole number"
            raise ValueError(f"`{name}` must be {kind}, got {value!r}; pass one.")
        if least is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}; pass more.")
    count = options.get("num_return_sequences", 1)
    if count != 1:
        raise ValueError(f"`num_return_sequences` must be 1, got {count}; a row has one caption.")
    return {**options, "num_return_sequences": 1}


def _check(
    model: MuEForConditionalGeneration,
    rows: Sequence[Mapping[str, Any]],
    task: str,
    options: dict[str, Any],
    batch_size: int,
    prompt_type: str,
) -> None:
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {list(TASKS)}, got {task!r}; choose one of them.")
    if not len(rows):
        raise ValueError("`rows` must hold at least one row, got none; check the data and its split.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}; pass more.")
    if prompt_type not in ("prev_output", "none"):
        raise ValueError(f'`prompt_type` must be "prev_output" or "none", got {prompt_type!r}; pass either.')
    check_names(options, CONFIG_NAMES)
    foreign = sorted(options.keys() - CONFIG_NAMES)
    if task == "entailment" and foreign:
        raise ValueError(f"`options` of entailment must be exit options, got {foreign}; answers are not generated.")
    missing = {"image_id", *(("hypothesis",) if task == "entailment" else ())} - rows[0].keys()
    if missing or not {"image", "image_features"} & rows[0].keys():
        raise ValueError(
            f"`rows` must have image_id, image or image_features{', hypothesis' * (task == 'entailment')}, got "
            f"{sorted(rows[0])}; load them with `load_{task}`."
        )
    for name, value in options.items():
        if isinstance(value, Tensor) and len(value) != len(rows):
            raise ValueError(f"`{name}` must hold one depth per row, {len(rows)}, got {len(value)}; pass as many.")
    resolve_options(options, {}, model.generation_config.to_dict(), model.config)


def model_inputs(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    batch: list[Mapping[str, Any]],
    task: str,
    prompt_type: str,
) -> dict[str, Tensor]:
    """The model's inputs for a batch of rows, on its device and in its dtype: texts by row, and pictures by image, of
    which neighbours with one image_id share one. The other arguments are those of [`predict`]."""
    texts: dict[str, Any] = {"text": [CAPTION_PROMPT] * len(batch)}
    if task == "entailment":
        texts = {
            "task": "entailment",
            "hypothesis": [row["hypothesis"] for row in batch],
            "premise": [row.get("premise") for row in batch],
        }
    inputs = dict(processor(**texts))
    if prompt_type == "none":
        for name in ("decoder_input_ids", "decoder_attention_mask"):
            inputs.pop(name, None)
    pictures = [next(group) for _, group in groupby(batch, key=lambda row: row["image_id"])]
    if "image_features" in pictures[0]:
        inputs["image_features"] = torch.stack([torch.as_tensor(row["image_features"]) for row in pictures])
    else:
        # Its texts are those of captioning, one per image; they are not used.
        encoded = processor(images=[row["image"] for row in pictures])
        inputs |= {name: encoded[name] for name in ("pixel_values", "patch_mask") if name in encoded}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _spread(
    model: MuEForConditionalGeneration, inputs: dict[str, Tensor], counts: list[int], options: dict[str, Any]
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


def _run(
    model: MuEForConditionalGeneration,
    processor: MuEProcessor,
    batch: list[Mapping[str, Any]],
    inputs: dict[str, Tensor],
    counts: list[int],
    options: dict[str, Any],
    task: str,
) -> list[Prediction]:
    text_tokens = inputs["attention_mask"].sum(1).tolist()
    answers = list(processor.entailment_answers.values())
    answer_ids = processor.encode_answers(answers) if task == "entailment" else []

    def call() -> Any:
        _spread(model, inputs, counts, options)
        if task == "captioning":
            return model.generate(**inputs, **options, return_dict_in_generate=True)
        return model.score_answers(answer_ids, **inputs, **options, return_dict=True)

    output, seconds = timed(call, model.device)
    if task == "captioning":
        outputs, token_ids = processor.post_process_captions(output.sequences), new_tokens(output)
    else:
        best = output.scores.argmax(1).tolist()
        outputs, token_ids = [answers[index] for index in best], [tuple(answer_ids[index]) for index in best]
    columns = zip(batch, read_depths(output), outputs, token_ids, text_tokens, strict=True)
    return [
        Prediction(
            **vars(depths),
            image_id=row["image_id"],
            output=text,
            token_ids=ids,
            text_tokens=tokens,
            seconds=seconds / len(batch),
        )
        for row, depths, text, ids, tokens in columns
    ]


__all__ = ["TASKS", "Prediction", "model_inputs", "one_caption", "predict"]
