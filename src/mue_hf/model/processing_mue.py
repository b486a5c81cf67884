"""Turns images and texts into what the model reads, and token ids back into text: OFA's preprocessing and prompts."""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import BatchFeature, ProcessorMixin, RobertaTokenizer
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ProcessingKwargs, TextKwargs
from transformers.utils import TensorType

from .images_mue import load_image, to_rgb
from .scoring_mue import answer_trie

CAPTION_PROMPT = " what does the image describe?"
ENTAILMENT_PROMPT = ' does the image describe " {hypothesis} "?'
ENTAILMENT_PROMPT_WITH_PREMISE = ' can image and text1 " {premise} " imply text2 " {hypothesis} "?'
TASKS = ("captioning", "entailment", "vqa")

# A chat becomes its user's words, or the captioning prompt where the user only sent an image.
CHAT_TEMPLATE = (
    "{%- set words = namespace(text='') -%}"
    "{%- for message in messages if message['role'] == 'user' -%}"
    "{%- if message['content'] is string -%}"
    "{%- set words.text = words.text + ' ' + message['content'] | trim -%}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set words.text = words.text + ' ' + part['text'] | trim -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{{- words.text or '" + CAPTION_PROMPT + "' -}}"
)

#: Pixels that a side of what the model reads may have.
MAX_SIDE = 8192
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_text(text: str, max_words: int = 80) -> str:
    """OFA's normalisation of hypotheses, premises and questions (`pre_caption`): lower case, no leading punctuation,
    "-" and "/" as spaces, "<person>" as "person", runs of white space as one, and at most `max_words` words."""
    text = text.lower().lstrip(",.!?*#:;~").replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def _require_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"`{name}` must be a string or a list of strings, got {type(text).__name__}; pass str.")
    if not text.strip():
        raise ValueError(f"`{name}` must not be empty, got {text!r}; pass words, or leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` must be valid Unicode, got a lone surrogate, {text[error.start]!r}, at character "
            f"{error.start}; read the text with its own encoding, or drop the character."
        ) from error
    return text


def _normalized(text: Any, name: str) -> str:
    normalized = normalize_text(_require_text(text, name))
    if not normalized:
        raise ValueError(f"`{name}` must hold words, got {text!r}, of which normalisation leaves nothing.")
    return normalized


def _question(text: Any, name: str) -> str:
    question = _normalized(text, name)
    return f" {question}" if question.endswith("?") else f" {question}?"


def _entailment_prompt(hypothesis: str, premise: str | None) -> str:
    hypothesis = _normalized(hypothesis, "hypothesis")
    if premise is None:
        return ENTAILMENT_PROMPT.format(hypothesis=hypothesis)
    return ENTAILMENT_PROMPT_WITH_PREMISE.format(premise=_normalized(premise, "premise"), hypothesis=hypothesis)


def _same_length(**fields: Any) -> list[list[Any]]:
    """Each field as a list: a single value stands for every sample, lists must agree in length."""
    lengths = {name: len(value) for name, value in fields.items() if isinstance(value, list)}
    for name, length in lengths.items():
        if length == 0:
            raise ValueError(f"`{name}` must hold at least one sample, got an empty list; leave it out or fill it.")
    if len(set(lengths.values())) > 1:
        counts = " and ".join(f"{length} in `{name}`" for name, length in lengths.items())
        raise ValueError(
            f"Lists must have one entry per sample, got {counts}; make them equally long, "
            f"or pass a single value (not a list) that holds for all samples."
        )
    count = next(iter(lengths.values()), 1)
    return [value if isinstance(value, list) else [value] * count for value in fields.values()]


class MuEImageMixin:
    """What both image processors share: OFA's defaults, and reading images of any kind."""

    # OFA: a square, whatever the shape of the image, and no crop; levels to [-1, 1].
    resample = PILImageResampling.BICUBIC
    size = {"height": 480, "width": 480}
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    _auto_class = "AutoImageProcessor"

    def fetch_images(self, images: Any, name: str = "images") -> Any:
        """Loads every image (see `load_image`), nested lists included; errors call it `name`, with its index."""
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return [self.fetch_images(image, f"{name}[{index}]") for index, image in enumerate(images)]
        return load_image(images, name)

    def to_dict(self) -> dict[str, Any]:
        """The settings; where the source file is saved beside them, both classes by backend."""
        output = super().to_dict()
        if "AutoImageProcessor" in output.get("auto_map", {}):
            name = "processing_mue.MuEImageProcessor"
            output["auto_map"] = {"AutoImageProcessor": {"torchvision": name, "pil": f"{name}Pil"}}
        return output

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Pixels of images, see the base class; whatever an option breaks is a ValueError that names the options."""
        try:
            return super().preprocess(images, *args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            options = {name: value for name, value in kwargs.items() if value is not None}
            raise ValueError(
                f"The options of the image processor must be such as `ImagesKwargs` describes, got {options}, which "
                f"failed: {error}; change or leave out the one that is not."
            ) from error

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        for name in ("size", "crop_size", "pad_size"):
            sides = [side for side in dict(kwargs.get(name) or {}).values() if side is not None]
            if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides):
                raise ValueError(f"`{name}` must be of 1 to {MAX_SIDE} pixels a side, got {sides}; change it.")
        resample = kwargs.get("resample")
        if resample is not None and (not isinstance(resample, int) or resample not in list(PILImageResampling)):
            raise ValueError(
                f"`resample` must be one of PIL's filters, {', '.join(PILImageResampling.__members__)}, got "
                f"{resample!r}; leave it out for OFA's."
            )
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs.get("do_normalize") and not kwargs.get("do_rescale"):
            raise ValueError(
                "`do_rescale` must be True with `do_normalize`, got False: images are read as levels in 0..255, "
                "floats in [0, 1] too; leave `do_rescale` on."
            )


class MuEImageProcessor(MuEImageMixin, TorchvisionBackend):
    """OFA's image preprocessing: RGB, bicubic resize to `size` (480x480, aspect ratio not kept), levels to [-1, 1].
    torchvision's bicubic filter differs from Pillow's by at most two grey levels."""


class MuEImageProcessorPil(MuEImageMixin, PilBackend):
    """OFA's image preprocessing with Pillow, equal to the original's in every bit."""

    def rescale(self, image: np.ndarray, scale: float, **kwargs: Any) -> np.ndarray:
        # A product in float32 would differ from OFA's division by 255 in the last bit.
        return (image.astype(np.float64) * scale).astype(np.float32)


class MuETokenizer(RobertaTokenizer):
    """
    OFA's byte-level BPE vocabulary: BART's, then image codes, then location bins.

    Special tokens written in a text are read as plain text, as in OFA: only the tokenizer itself places them.

    Args:
        vocab (`str` or `dict[str, int]`): file or dictionary of token to id: <s>, <pad>, </s>, <unk> are 0 to 3.
        merges (`str` or `list`): file or list of the merges.
        num_codes (`int`, *optional*, defaults to 8192): image codes `<code_0>`... that follow the vocabulary.
        num_bins (`int`, *optional*, defaults to 1000): location bins `<bin_0>`... that follow the codes.
        kwargs: see `RobertaTokenizer`.

    Raises:
        ValueError: if there is no vocabulary, or the counts are negative.
    """

    _auto_class = "AutoTokenizer"

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        merges: str | list[str] | None = None,
        num_codes: int = 8192,
        num_bins: int = 1000,
        **kwargs: Any,
    ) -> None:
        if vocab is None and kwargs.get("tokenizer_file") is None:
            raise ValueError(
                "`vocab` must be given, got None: no vocab.json or tokenizer.json was found; "
                "pass both `vocab` and `merges`, or load from a folder that holds them."
            )
        for name, value in (("num_codes", num_codes), ("num_bins", num_bins)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0, got {value!r}; pass 0 for none.")
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(vocab=vocab, merges=merges, num_codes=num_codes, num_bins=num_bins, **kwargs)
        names = [f"<code_{i}>" for i in range(num_codes)] + [f"<bin_{i}>" for i in range(num_bins)]
        # Not special: grounding answers must survive decoding without special tokens.
        self.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])


class MuEProcessor(ProcessorMixin):
    """
    Images and texts to model inputs, with OFA's prompts.

    Args:
        image_processor (`MuEImageProcessor` or `MuEImageProcessorPil`): makes `pixel_values`.
        tokenizer (`MuETokenizer`): makes `input_ids`.
        chat_template (`str`, *optional*): Jinja template for chats. The default joins the user's texts.

    Example:

    ```python
    >>> inputs = processor(images="photo.jpg")
    >>> inputs = processor(images="photo.jpg", task="entailment", hypothesis="two dogs play")
    ```
    """

    text_kwargs = {"padding": True}
    _auto_class = "AutoProcessor"

    #: Classes of visual entailment and the answers that OFA gives for them.
    entailment_answers = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @property
    def model_input_names(self) -> list[str]:
        """Every key that `__call__` can return."""
        return [
            "input_ids",
            "attention_mask",
            "pixel_values",
            "patch_mask",
            "decoder_input_ids",
            "decoder_attention_mask",
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        task: str = "captioning",
        hypothesis: str | list[str] | None = None,
        premise: str | list[str | None] | None = None,
        return_tensors: str | TensorType | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Inputs for one batch. A single value stands for all samples; lists must have one entry per sample.

        Args:
            images (*optional*): an image (see `load_image`), kept once where texts are several, or a list with one per
                sample, None for a sample without image.
            text (`str` or `list[str]`, *optional*): the prompt, used as it is; it should start with a space, as OFA's
                do. Without it " what does the image describe?". With `task="vqa"` the question.
            task (`str`, *optional*, defaults to `"captioning"`): "captioning"; "entailment", for which `hypothesis` is
                put in OFA's prompt; or "vqa", for which the question is normalised as in OFA and ends with "?".
            hypothesis (`str` or `list[str]`, *optional*): for entailment, the statement to judge.
            premise (`str` or `list[str | None]`, *optional*): for entailment, a caption of the image, judged with it.
                Both are normalised as in OFA, see `normalize_text`.
            return_tensors (`str`, *optional*, defaults to `"pt"`): "pt", "np", or None for lists.
            kwargs: options of the tokenizer (padding to the longest text is the default) and of the image processor,
                or transformers' `text_kwargs`, `images_kwargs` and `common_kwargs` with them.

        Returns:
            [`BatchFeature`]:
            - **input_ids**, **attention_mask** [samples, text tokens], padded on the right.
            - **pixel_values** [images, 3, height, width], in [-1, 1]: one image if a single one was given.
            - **patch_mask** [samples], False for a sample without image; only where some sample lacks one.
            - **decoder_input_ids**, **decoder_attention_mask** [samples, prompt tokens], for entailment: `<s>` and the
                text without `</s>`, which the answer follows, padded on the left.

        Raises:
            ValueError: for unreadable images, empty texts, lists of different lengths, arguments that the task does
                not take, and unknown options.
        """
        self._check_options(kwargs)
        prompts = self._prompts(images, text, task, hypothesis, premise)
        images = _flatten_images(images)
        if isinstance(images, list):
            images, prompts = _same_length(images=images, text=prompts)
        else:
            (prompts,) = _same_length(text=prompts)
        try:
            options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
            return_tensors = options["text_kwargs"].pop("return_tensors", return_tensors)
            data = dict(self.tokenizer(prompts, **options["text_kwargs"]))
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"Options must be such as `TextKwargs` and `ImagesKwargs` describe, got {kwargs}, which failed: "
                f"{error}; change or leave out the one that is not."
            ) from error
        if images is not None:
            data |= self._encode_images(images, options["images_kwargs"])
        if task == "entailment":
            data |= self._decoder_prompts(data["input_ids"])
        return BatchFeature(data, tensor_type=return_tensors)

    def _check_options(self, options: dict[str, Any]) -> None:
        # The base class would only warn, once.
        for name in ("videos", "audio"):
            if options.pop(name, None) is not None:
                raise ValueError(f"`{name}` must be None, got a value: the model reads images and text only.")
        for name in ("common_kwargs", "images_kwargs", "text_kwargs"):
            if not isinstance(options.get(name, {}), dict):
                raise ValueError(f"`{name}` must be a dict of options, got {options[name]!r}; pass such as {{}}.")
        known = {"common_kwargs", *ProcessingKwargs.__annotations__, *TextKwargs.__annotations__}
        known |= set(self.image_processor.valid_kwargs.__annotations__)
        if unknown := sorted(options.keys() - known):
            raise ValueError(
                f"Options must be known to the tokenizer or the image processor, got {unknown}; check the spelling."
            )

    def _prompts(self, images: Any, text: Any, task: str, hypothesis: Any, premise: Any) -> str | list[str]:
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {list(TASKS)}, got {task!r}; choose one of them.")
        if task == "entailment":
            if text is not None:
                raise ValueError('`text` must be None with task="entailment"; pass `hypothesis` and `premise`.')
            if hypothesis is None:
                raise ValueError('`hypothesis` must be given with task="entailment", got None; pass a statement.')
            pairs = zip(*_same_length(hypothesis=hypothesis, premise=premise), strict=True)
            prompts = [_entailment_prompt(*pair) for pair in pairs]
            return prompts if isinstance(hypothesis, list) or isinstance(premise, list) else prompts[0]
        if hypothesis is not None or premise is not None:
            raise ValueError(
                f'`hypothesis` and `premise` belong to task="entailment", got task={task!r}; pass `text`.'
            )
        if task == "vqa" and text is None:
            raise ValueError('`text` must be given with task="vqa", got None; pass a question.')
        if text is None:
            if images is None:
                raise ValueError("`images` or `text` must be given, got neither; pass an image, a text, or both.")
            return CAPTION_PROMPT
        prompt = _question if task == "vqa" else _require_text
        return [prompt(one, "text") for one in text] if isinstance(text, list) else prompt(text, "text")

    def _encode_images(self, images: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
        names = [f"images[{index}]" for index in range(len(images))] if isinstance(images, list) else ["images"]
        images = images if isinstance(images, list) else [images]
        loaded = [load_image(image, name) for image, name in zip(images, names, strict=True) if image is not None]
        if not loaded:
            return {}
        encoded = self.image_processor(loaded, **options | {"return_tensors": "pt"})["pixel_values"]
        if len(loaded) == len(images):
            return {"pixel_values": encoded}
        present = torch.tensor([image is not None for image in images])
        pixel_values = encoded.new_zeros(len(images), *encoded.shape[1:])
        pixel_values[present] = encoded
        return {"pixel_values": pixel_values, "patch_mask": present}

    def _decoder_prompts(self, input_ids: list[list[int]]) -> dict[str, list[list[int]]]:
        # New tokens must follow the prompt at once, so shorter prompts are padded on the left.
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        rows = [[token for token in row if token not in (pad, eos)] for row in input_ids]
        width = max(map(len, rows))
        return {
            "decoder_input_ids": [[pad] * (width - len(row)) + row for row in rows],
            "decoder_attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
        }

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """
        Token ids of a closed set of answers, without `<s>` and `</s>`, each with OFA's leading space.

        Raises:
            ValueError: if there are no answers, one is empty, or two are the same.
        """
        if not isinstance(answers, list | tuple) or not answers:
            raise ValueError(f'`answers` must be a list of answers, got {answers!r}; pass such as ["yes", "no"].')
        texts = [" " + _require_text(answer, "answers").strip() for answer in answers]
        if repeated := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"`answers` must differ from each other, got {repeated} more than once; drop the copies.")
        return self.tokenizer(texts, add_special_tokens=False, padding=False)["input_ids"]

    def answer_trie(self, answers: Sequence[str], prompt_length: int = 1) -> Callable[[int, torch.Tensor], list[int]]:
        """
        Restricts `generate` to a closed set of answers: its `prefix_allowed_tokens_fn`.

        After a text that begins no answer only `</s>` is allowed, as in OFA.

        Args:
            answers (`list[str]`): see [`MuEProcessor.encode_answers`].
            prompt_length (`int`, *optional*, defaults to 1): decoder tokens before the answer: 1 for the start token
                alone, else `inputs["decoder_input_ids"].shape[1]`, padding included.

        Returns:
            `Callable`: (batch index, ids of one row [tokens]) to the allowed next ids.
        """
        if prompt_length < 1:
            raise ValueError(f"`prompt_length` must be at least 1, got {prompt_length}; count the start token.")
        eos = self.tokenizer.eos_token_id
        tree = answer_trie(self.encode_answers(answers), eos)

        def allowed_tokens(batch_id: int, input_ids: torch.Tensor) -> list[int]:
            return tree.get(tuple(input_ids[prompt_length:].tolist()), [eos])

        return allowed_tokens

    def encode_captions(self, captions: Sequence[str], max_words: int = 20) -> list[list[int]]:
        """
        Labels as OFA makes them: lower case, no punctuation, at most `max_words` words, `</s>`; pad them with -100.

        Raises:
            ValueError: if nothing is left of a caption.
        """
        texts = []
        for index, caption in enumerate(captions):
            words = _require_text(caption, f"captions[{index}]").lower().translate(PUNCTUATION).split()
            if not words:
                raise ValueError(f"`captions[{index}]` must hold words, got {caption!r}; leave the sample out.")
            texts.append(" " + " ".join(words[:max_words]))
        encoded = self.tokenizer(texts, add_special_tokens=False, padding=False)["input_ids"]
        return [[*ids, self.tokenizer.eos_token_id] for ids in encoded]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Generated ids [sequences, tokens] to texts without the leading space of OFA's vocabulary."""
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in texts]

    def post_process_captions(self, generated_outputs: Any) -> list[str]:
        """Generated ids [sequences, tokens] to captions as OFA evaluates them: without punctuation."""
        texts = self.post_process_image_text_to_text(generated_outputs)
        return [text.translate(PUNCTUATION).strip() for text in texts]


def _flatten_images(images: Any) -> Any:
    """Batches of arrays become lists; a list of lists, as chats make it, loses its inner level."""
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    if not isinstance(images, list | tuple):
        return images
    flat = list(images)
    for index, sample in enumerate(images):
        if isinstance(sample, list | tuple):
            if len(sample) > 1:
                raise ValueError(
                    f"`images[{index}]` must be one image, got {len(sample)}; the model reads one image per sample."
                )
            flat[index] = sample[0] if sample else None
    return flat


__all__ = [
    "MuEImageProcessor",
    "MuEImageProcessorPil",
    "MuEProcessor",
    "MuETokenizer",
    "load_image",
    "normalize_text",
    "to_rgb",
]
