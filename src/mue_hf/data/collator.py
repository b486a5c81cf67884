"""Training batches out of rows of captioning, of entailment, or of both at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model.processing_mue import CAPTION_PROMPT, MuEProcessor


class _Text(NamedTuple):
    """One encoder row: its tokens, what the decoder reads before its targets, and the targets with </s>."""

    source: list[int]
    prompt: list[int]
    targets: list[list[int]]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@dataclass
class MuEDataCollator:
    """Makes training batches of rows of captioning, of entailment, or of both at once.

    A row has "image" (anything that the processor reads; None in all rows of a batch that trains on text alone) or
    "image_features" [channels, rows, columns] (see [`cache_trunk_features`]), and "references", or "hypothesis",
    "label" and optionally "premise", which may be lists (several statements on one image), or all of these. The image
    is encoded once. Captions alone are `captions_per_image` decoder rows per image, which share its prompt too;
    statements, and captions beside them, are one row each in encoder and decoder.

    Texts become what OFA trains on: captions in lower case, without punctuation; hypothesis and premise normalised and
    put in the prompt; the answer "yes", "maybe" or "no".

    Args:
        processor ([`MuEProcessor`]): makes tokens and pixels.
        captions_per_image (`int`, *optional*, defaults to 1): captions of each image in a batch; an image with fewer
            references repeats some.
        random_captions (`bool`, *optional*, defaults to `True`): whether they are drawn at random; else the first.
        max_words (`int`, *optional*, defaults to 20): words of a caption at most.
        use_premise (`bool`, *optional*, defaults to `True`): whether the prompt holds the premise where a row has one.
        prompt_type (`str`, *optional*, defaults to `"prev_output"`): OFA's name for what the decoder reads before the
            answer: "prev_output", the prompt of the encoder, or "none", `<s>` alone. Only the answer and `</s>` are
            trained.

    A call with a list of rows, one per image, returns tensors by name:
        - **input_ids**, **attention_mask** [texts, text tokens], padded on the right; text t belongs to image
          t // (texts // images).
        - **pixel_values** [images, 3, height, width] or **image_features** [images, channels, rows, columns], or
          neither in a batch of texts alone.
        - **decoder_input_ids** [targets, tokens], padded on the right with pad tokens, and **labels** of the same
          shape, -100 where nothing is to be learnt; target t belongs to text t // (targets // texts).

    Raises:
        ValueError: if an argument is out of range, or on a call a row has no texts or no image, texts have no words, a
            label is unknown, or rows differ in their number of texts.
    """

    processor: MuEProcessor
    captions_per_image: int = 1
    random_captions: bool = True
    max_words: int = 20
    use_premise: bool = True
    prompt_type: str = "prev_output"

    def __post_init__(self) -> None:
        for name in ("captions_per_image", "max_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}; pass more.")
        if self.prompt_type not in ("prev_output", "none"):
            raise ValueError(f'`prompt_type` must be "prev_output" or "none", got {self.prompt_type!r}; pass either.')

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("`rows` must hold at least one row, got none; leave empty batches out.")
        answers = self.processor.encode_answers(list(self.processor.entailment_answers.values()))
        answer_ids = dict(zip(self.processor.entailment_answers, answers, strict=True))
        texts = [self._texts(row, f"rows[{index}]", answer_ids) for index, row in enumerate(rows)]
        # For each row the number of targets of each of its texts.
        shapes = {tuple(len(text.targets) for text in row) for row in texts}
        if len(shapes) > 1:
            raise ValueError(
                f"`rows` must be alike in their texts, got {sorted(shapes)} targets of each; batch rows with equally "
                "many statements, and with captions either all or none."
            )
        flat = [text for row in texts for text in row]
        sources = [torch.tensor(text.source) for text in flat]
        pairs = [(text.prompt, target) for text in flat for target in text.targets]
        inputs = [torch.tensor([*prompt, *target[:-1]]) for prompt, target in pairs]
        labels = [torch.tensor([-100] * (len(prompt) - 1) + target) for prompt, target in pairs]
        pad = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": pad_sequence(sources, True, pad),
            "attention_mask": pad_sequence([torch.ones_like(source) for source in sources], True),
            "decoder_input_ids": pad_sequence(inputs, True, pad),
            "labels": pad_sequence(labels, True, -100),
            **self._images(rows),
        }

    def _texts(self, row: dict[str, Any], name: str, answer_ids: dict[str, list[int]]) -> list[_Text]:
        """What the row trains; with statements beside them captions are texts of one target each."""
        start = self.processor.tokenizer.bos_token_id
        texts = []
        if references := row.get("references"):
            source = self.processor(text=CAPTION_PROMPT, return_tensors=None)["input_ids"][0]
            order = torch.randperm(len(references)).tolist() if self.random_captions else range(len(references))
            chosen = [references[order[count % len(order)]] for count in range(self.captions_per_image)]
            texts = [_Text(source, [start], self.processor.encode_captions(chosen, self.max_words))]
        if "hypothesis" in row:
            texts = [_Text(text.source, text.prompt, [target]) for text in texts for target in text.targets]
            hypotheses, labels = _as_list(row["hypothesis"]), _as_list(row["label"])
            premises = _as_list(row.get("premise")) if self.use_premise else [None]
            premises = premises * len(hypotheses) if len(premises) == 1 else premises
            if not len(hypotheses) == len(labels) == len(premises):
                raise ValueError(
                    f"`{name}` must have a label, and a premise if any, for each hypothesis, got {len(hypotheses)} "
                    f"hypotheses, {len(labels)} labels, {len(premises)} premises; make the lists equally long."
                )
            options = {"task": "entailment", "padding": False, "return_tensors": None}
            encoded = self.processor(hypothesis=hypotheses, premise=premises, **options)
            for source, label in zip(encoded["input_ids"], labels, strict=True):
                if label not in answer_ids:
                    raise ValueError(f"`{name}` must have a label of {list(answer_ids)}, got {label!r}; rename it.")
                # The prompt ends where the answer begins: without </s>.
                prompt = source[:-1] if self.prompt_type == "prev_output" else [start]
                texts.append(_Text(source, prompt, [[*answer_ids[label], self.processor.tokenizer.eos_token_id]]))
        if not texts:
            raise ValueError(
                f"`{name}` must have references or a hypothesis, got {sorted(row)}; load it with `load_captioning` or "
                "`load_entailment`, and pass `remove_unused_columns=False` to the trainer."
            )
        return texts

    def _images(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if all("image" in row and row["image"] is None and "image_features" not in row for row in rows):
            return {}
        kinds = {tuple(key for key in ("image", "image_features") if row.get(key) is not None) for row in rows}
        if kinds == {("image_features",)}:
            return {"image_features": torch.stack([torch.as_tensor(row["image_features"]) for row in rows])}
        if kinds != {("image",)}:
            raise ValueError(
                f"`rows` must all have an `image` or all have `image_features`, got {sorted(kinds)}; leave out those "
                "without."
            )
        pixels = self.processor.image_processor([row["image"] for row in rows], return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"]}


__all__ = ["MuEDataCollator"]
