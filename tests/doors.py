"""What a checkpoint folder gives through transformers' own loaders: run with the package, or by path without it.

    python tests/doors.py {remote,both} FOLDER PHOTO OUTPUT

"remote" forbids `import mue_hf` and passes trust_remote_code=True, for FOLDER and for the same as a repository of the
Hub, whose cache has been filled. "both" imports the package and passes the same.
"""

import logging
import sys
from typing import Any

REPOSITORY = "someone/mue"
ANSWERS = ["yes", "no", "maybe"]
BACKENDS = ("torchvision", "pil")
TASKS = ("image-to-text", "image-text-to-text")


def record(folder: str, photo: str, **trust: bool) -> dict[str, Any]:
    """Everything a user of FOLDER can see, by name, as tensors and plain values."""
    import torch
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoProcessor,
        AutoTokenizer,
        pipeline,
    )

    seen: dict[str, Any] = {"config": AutoConfig.from_pretrained(folder, **trust).to_dict()}
    processor = AutoProcessor.from_pretrained(folder, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
    text_model = AutoModelForSeq2SeqLM.from_pretrained(folder, **trust)
    base = AutoModel.from_pretrained(folder, **trust)
    loaded = [processor, processor.image_processor, processor.tokenizer, tokenizer, model, text_model, base]
    images = {name: AutoImageProcessor.from_pretrained(folder, backend=name, **trust) for name in BACKENDS}

    inputs = processor(images=[photo, None], text=[" what is it?", " and this?"])
    seen |= {f"input {name}": value for name, value in inputs.items()}
    for name, image_processor in images.items():
        seen[f"pixels {name}"] = image_processor(photo, return_tensors="pt")["pixel_values"]
    seen["text"] = tokenizer(" what is it?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        seen["logits"] = model(**inputs).logits
        seen["text logits"] = text_model(**inputs).logits
        seen["states"] = base(**inputs).last_hidden_state
    seen["generation config"] = model.generation_config.to_dict()
    for beams in (1, 3):
        output = model.generate(**inputs, num_beams=beams, return_dict_in_generate=True)
        for name in ("sequences", "image_exit_layers", "text_exit_layers", "decoder_exit_layers", "executed_layers"):
            seen[f"beams {beams} {name}"] = output[name]
    seen["preset"] = model.generate(**inputs, exit_preset="first", return_dict_in_generate=True).decoder_exit_layers
    seen["scores"] = model.score_answers(processor.encode_answers(ANSWERS), **inputs)
    for task in TASKS:
        # transformers 5.24 announces the redirect of the first one in a record that logging cannot format
        logging.getLogger("transformers.pipelines").disabled = task == "image-to-text"
        pipe = pipeline(task, model=folder, device="cpu", **trust)
        loaded += [pipe, pipe.model, pipe.processor]
        seen[task] = pipe([photo, photo], batch_size=2, max_new_tokens=6)
        seen[f"{task} text"] = pipe(photo, text=" what is it?", max_new_tokens=6)
    loaded += images.values()
    seen["classes"] = [type(one).__name__ for one in loaded]
    seen["modules"] = [type(one).__module__ for one in loaded]
    return seen


def refusals(folder: str) -> list[str]:
    """How transformers answers who has neither the package nor trust."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    calls = [
        lambda: AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False),
        lambda: AutoProcessor.from_pretrained(folder, trust_remote_code=False),
        lambda: pipeline("image-to-text", model=folder, trust_remote_code=False),
    ]
    answers = []
    for call in calls:
        try:
            answers.append(f"loaded {type(call()).__name__}")
        except ValueError as error:
            answers.append(str(error))
    return answers


def save_again(folder: str, target: str) -> None:
    """Model and processor, loaded as remote code and saved."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).save_pretrained(target)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(target)


def main() -> None:
    door, folder, photo, output = sys.argv[1:]
    result: dict[str, Any] = {}
    if door == "remote":
        # an import of the name fails from here on
        sys.modules["mue_hf"] = None
        result["refusals"] = refusals(folder)
        result["hub"] = record(REPOSITORY, photo, trust_remote_code=True)
        save_again(REPOSITORY, f"{output}-hub-again")
        save_again(folder, f"{output}-again")
    else:
        import mue_hf  # noqa: F401
    import torch

    result["seen"] = record(folder, photo, trust_remote_code=True)
    torch.save(result, output)


if __name__ == "__main__":
    main()
