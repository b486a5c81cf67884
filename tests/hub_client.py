"""What machines do with the Hub, as processes of their own; HF_ENDPOINT says where it is.

    python tests/hub_client.py {with,without} STEPS.json OUTPUT.json

Each step is the name of a function here and its arguments, and its result goes into OUTPUT. "without" forbids `import
mue_hf`, and loads with trust_remote_code=True.
"""

import contextlib
import io
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

TRUST: dict[str, bool] = {}


def command(token: str, *arguments: str) -> dict[str, Any]:
    """Exit code and streams of the command, called with HF_TOKEN or without."""
    from mue_hf import cli

    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def push(checkpoint: str, output_dir: str) -> None:
    """`push_to_hub` of a model and a processor to org/pushed, of a trainer to org/trained."""
    from mue_hf import MuEForConditionalGeneration, MuEProcessor
    from mue_hf.training.arguments import MuETrainingArguments
    from mue_hf.training.trainer import MuETrainer

    model = MuEForConditionalGeneration.from_pretrained(checkpoint)
    processor = MuEProcessor.from_pretrained(checkpoint)
    model.push_to_hub("org/pushed", private=True, token="owner")
    processor.push_to_hub("org/pushed", token="owner")
    processor.push_to_hub("org/processor", token="owner")
    args = MuETrainingArguments(
        output_dir,
        use_cpu=True,
        hub_model_id="org/trained",
        hub_token="owner",
        label_names=["labels"],
        report_to="none",
    )
    trainer = MuETrainer(model, args, processing_class=processor)
    trainer.push_to_hub(license="apache-2.0", dataset_tags="org/data")


def load(name: str, photo: str, token: str | None = None) -> dict[str, Any]:
    """What the Auto classes give for a repository, and captions of `pipeline`."""
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    options = TRUST | {"token": token}
    pipe = pipeline("image-to-text", model=name, device="cpu", **options)
    autos = (AutoModel, AutoModelForImageTextToText, AutoProcessor)
    loaded = [*(auto.from_pretrained(name, **options) for auto in autos), pipe]
    return {
        "classes": [type(one).__name__ for one in loaded],
        "packages": sorted({type(one).__module__.split(".")[0] for one in loaded}),
        "caption": pipe(photo),
        "preset": pipe(photo, exit_preset="first"),
    }


def inferred_task(name: str) -> str:
    """The task of `pipeline(model=name)`."""
    from transformers import pipeline

    return pipeline(model=name, device="cpu").task


def main() -> None:
    door, steps, output = sys.argv[1:]
    if door == "without":
        # an import of the name fails from here on
        sys.modules["mue_hf"] = None
        TRUST["trust_remote_code"] = True
    else:
        import_module("mue_hf")
    results = [globals()[name](*arguments) for name, *arguments in json.loads(Path(steps).read_text())]
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
