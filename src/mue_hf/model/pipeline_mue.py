"""The pipeline "image-text-to-text", "image-to-text" of old: image in, caption out, in transformers' call forms."""

from inspect import signature
from typing import Any

from transformers import AutoModelForImageTextToText, GenerationConfig, ImageTextToTextPipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline
from transformers.utils.chat_template_utils import Chat

from .images_mue import load_image

# What the parent understands. Anything else is an option of `generate`, which refuses what it does not know.
PIPELINE_PARAMETERS = signature(ImageTextToTextPipeline._sanitize_parameters).parameters


class MuEImageTextToTextPipeline(ImageTextToTextPipeline):
    """
    Captions images, or answers texts about them.

    Beside the call forms of [`ImageTextToTextPipeline`] it takes images alone, and returns the new text only, unless
    `return_full_text=True`: an encoder-decoder does not repeat its prompt. For every model other than MuE the class
    makes a plain [`ImageTextToTextPipeline`].

    Args:
        kwargs: see [`ImageTextToTextPipeline`]; options of `generate`, exits included, can be given here and per call.

    Example:

    ```python
    >>> import mue_hf
    >>> from transformers import pipeline

    >>> captioner = pipeline("image-text-to-text", model="checkpoints/mue-photos-small")
    >>> captioner("photo.jpg", num_beams=5, decoder_exit_threshold=0.9)
    [{'generated_text': 'two dogs play in the snow'}]
    ```
    """

    # OFA's captions: 16 tokens and </s>.
    _default_generation_config = GenerationConfig(max_new_tokens=17)

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Pipeline:
        if model is not None and model.config.model_type != "mue":
            return ImageTextToTextPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.model, "loaded_by_pipeline", False):
            self.model.fold_batch_norms()

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        options = {name: value for name, value in kwargs.items() if name not in PIPELINE_PARAMETERS}
        known = {name: value for name, value in kwargs.items() if name in PIPELINE_PARAMETERS}
        preprocess, forward, postprocess = super()._sanitize_parameters(**known)
        # Kept apart, so that an option of a call replaces the same option of the pipeline and leaves the others.
        return preprocess, forward | options, postprocess

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> list[Any]:
        """
        Generates a text for each image.

        Args:
            images (*optional*): an image (see `load_image`); a list, a dataset or a generator of them, or of dicts
                {"images": image, "text": prompt}; or chats.
            text (`str` or `list[str]`, *optional*): the prompt. Without it the image is captioned. A single one holds
                for all images, and a single image for all texts.
            kwargs: `batch_size`, `timeout` (seconds per URL), options of `generate`.

        Returns:
            `list[dict]` for one sample, a list of such lists for a list of samples, a generator for a dataset:
            "generated_text", and "input_text" where a prompt was given.

        Raises:
            ValueError: if there is nothing to do, an image cannot be read, or lists differ in length.
        """
        if images is None and text is None:
            raise ValueError("`images` or `text` must be given, got neither; pass an image.")
        for name, value in (("images", images), ("text", text)):
            if isinstance(value, list | tuple) and not value:
                raise ValueError(f"`{name}` must hold at least one sample, got an empty list; fill it.")
        if _is_chat(text) or _is_chat(images):
            return super().__call__(images=images, text=text, **kwargs)
        if text is not None:
            images = _pairs(images, text)
        return Pipeline.__call__(self, list(images) if isinstance(images, tuple) else images, **kwargs)

    def preprocess(self, inputs: Any = None, timeout: float | None = None, **kwargs: Any) -> Any:
        if isinstance(inputs, Chat):
            return super().preprocess(inputs, **kwargs)
        sample = inputs if isinstance(inputs, dict) else {"images": inputs}
        image, text = sample.get("images", sample.get("image")), sample.get("text")
        if image is not None:
            image = load_image(image, timeout=timeout)
        options = kwargs.get("processor_kwargs") or {}
        model_inputs = self.processor(images=image, text=text, return_tensors="pt", **options).to(dtype=self.dtype)
        model_inputs["text"] = text
        return model_inputs

    def _forward(
        self, model_inputs: Any, generate_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        return super()._forward(model_inputs, generate_kwargs={**(generate_kwargs or {}), **options})

    def postprocess(
        self, model_outputs: dict[str, Any], skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[dict[str, Any]]:
        prompt = model_outputs["prompt_text"]
        if isinstance(prompt, Chat) or "return_type" in kwargs:
            outputs = model_outputs | {"prompt_text": prompt or ""}
            return super().postprocess(outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        sequences = model_outputs["generated_sequence"].reshape(-1, model_outputs["generated_sequence"].shape[-1])
        texts = self.processor.post_process_image_text_to_text(sequences, skip_special_tokens=skip_special_tokens)
        known = {} if prompt is None else {"input_text": prompt}
        return [{**known, "generated_text": text} for text in texts]


class MuEImageToTextPipeline(MuEImageTextToTextPipeline):
    """The same under its old task name "image-to-text", which checkpoints name for `trust_remote_code=True`."""


def _is_chat(value: Any) -> bool:
    if not (isinstance(value, list | tuple) and value):
        return False
    first = value[0][0] if isinstance(value[0], list | tuple) and value[0] else value[0]
    return isinstance(first, dict) and "role" in first


def _pairs(images: Any, text: str | list[str]) -> dict[str, Any] | list[dict[str, Any]]:
    lengths = [len(value) for value in (images, text) if isinstance(value, list | tuple)]
    if not lengths:
        return {"images": images, "text": text}
    if lengths[0] != lengths[-1]:
        raise ValueError(
            f"`text` must have one entry per image, got {len(text)} texts for {len(images)} images; "
            f"pass as many, or one text (not a list) for all."
        )
    images, texts = (value if isinstance(value, list | tuple) else [value] * lengths[0] for value in (images, text))
    return [{"images": image, "text": prompt} for image, prompt in zip(images, texts, strict=True)]


class _Loader(AutoModelForImageTextToText):
    """Loads what `pipeline(model=NAME)` names, as ever; a MuE model that nobody else holds may be folded."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        if model.config.model_type == "mue":
            model.loaded_by_pipeline = True
        return model


# Code of other models in their checkpoints is found by this name.
_Loader.__name__ = AutoModelForImageTextToText.__name__


def register_pipelines() -> None:
    """Makes `pipeline("image-text-to-text")` take images alone for MuE models."""
    # transformers sends the old name "image-to-text" on to it before it looks at its registry.
    task = PIPELINE_REGISTRY.supported_tasks["image-text-to-text"]
    task |= {"impl": MuEImageTextToTextPipeline, "pt": (_Loader,)}


__all__ = ["MuEImageTextToTextPipeline", "MuEImageToTextPipeline", "register_pipelines"]
