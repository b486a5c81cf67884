"""What a checkpoint folder gives through transformers' own loaders: run with the package, or by path without it.

    python tests/doors.py {alone,remote,both} FOLDER PHOTO OUTPUT

"alone" forbids `import mue_hf` and passes trust_remote_code=True for FOLDER, "remote" also for the same folder as a
repository of the Hub, whose cache has been filled. "both" imports the package and passes the same.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = "someone/mue"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
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
    # not one with a fit for answers, which `generate` refuses
    preset = max(model.generation_config.exit_presets)
    seen["preset"] = model.generate(**inputs, exit_preset=preset, return_dict_in_generate=True).decoder_exit_layers
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


def run(door: str, folder: Path, photo: str, place: Path) -> dict[str, Any]:
    """What this file, as a process of its own, sees through a door; `place` is a folder for its files."""
    import torch

    home = place / "home"
    # what a download of the repository leaves behind
    cached = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    paths = {"HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_MODULES_CACHE": home / "modules"}
    environment = os.environ | {name: str(path) for name, path in paths.items()} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, door, str(folder), photo, str(place / "result")]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(place / "result", weights_only=False)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises where two records differ in more than the modules of the classes."""
    import torch

    assert found.keys() == expected.keys()
    for name in expected.keys() - {"modules"}:
        if isinstance(expected[name], torch.Tensor):
            assert torch.equal(found[name], expected[name]), name
        else:
            assert found[name] == expected[name], name


def assert_same_remotely(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same for the record of the code that a checkpoint carries."""
    assert all(name.startswith("transformers_modules.") for name in found["modules"])
    # under its own name the first task has its own class
    classes = ["MuEImageTextToTextPipeline" if "Pipeline" in name else name for name in found["classes"]]
    config = found["config"] | {"_name_or_path": expected["config"]["_name_or_path"]}
    assert_same(found | {"classes": classes, "config": config}, expected)


def main() -> None:
    door, folder, photo, output = sys.argv[1:]
    result: dict[str, Any] = {}
    if door == "both":
        import mue_hf  # noqa: F401
    else:
        # an import of the name fails from here on
        sys.modules["mue_hf"] = None
    if door == "remote":
        result["refusals"] = refusals(folder)
        result["hub"] = record(REPOSITORY, photo, trust_remote_code=True)
        save_again(REPOSITORY, f"{output}-hub-again")
        save_again(folder, f"{output}-again")
    import torch

    result["seen"] = record(folder, photo, trust_remote_code=True)
    torch.save(result, output)


if __name__ == "__main__":
    main()
