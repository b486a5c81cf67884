"""A model and its processor from a checkpoint, with messages for what can be wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor

SMALL_CHECKPOINT = Path("checkpoints/mue-photos-small")
# What commands and the page choose where a checkpoint has it.
DEFAULT_PRESET = "balanced"
# Checkpoints of earlier versions, and what took their place.
REPLACED = {"mue-flickr8k-small": "mue-photos-small"}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside, and in the mode it was in afterwards."""
    training = model.training
    # every switch makes a model check its presets against its weights anew
    if any(module.training for module in model.modules()):
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def check_device(device: str) -> None:
    """Raises a ValueError unless torch has this device."""
    try:
        torch.zeros(1, device=device)
    # What torch raises for an unknown device depends on the device.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`--device` must be one that torch can use here, got {device!r}: {reason}") from error


def check_not_replaced(name: str | Path) -> None:
    """ValueError for a checkpoint of an earlier version that is not here any more, with what took its place."""
    path = Path(name)
    # ORG/NAME of that name may be on the Hub
    ours = path.parent.name in ("", "checkpoints")
    if path.name in REPLACED and ours and not path.is_dir():
        raise ValueError(
            f"the checkpoint {str(name)!r} left with version 0.3.0; use {str(path.with_name(REPLACED[path.name]))!r}, "
            "or take the old one from version 0.2.0."
        )


def load_checkpoint(
    name: str | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    engine: str | None = None,
) -> tuple[MuEForConditionalGeneration, MuEProcessor]:
    """Model and processor of a checkpoint, in evaluation mode and with batch norms folded.

    Args:
        name (`str`, *optional*): a folder or a Hub id; default: the small checkpoint of a clone.
        device, dtype (`str`): where the model is put, and the dtype of its weights.
        threads (`int`, *optional*): CPU threads of this process from now on; default: as they are.
        engine (`str`, *optional*): "onnxruntime" for a folder of `mue-hf export`; default: torch.

    Raises:
        ValueError: for what the engine refuses; if no model is named and the small checkpoint is not here, the folder
            or the device does not exist, the checkpoint was replaced, or it holds another kind of model.
    """
    if name is None and not SMALL_CHECKPOINT.is_dir():
        raise ValueError(
            f"`--model` is needed: {SMALL_CHECKPOINT} is not in this folder. Pass a checkpoint folder or a Hub id, or "
            "run in a clone of the repository."
        )
    name = str(SMALL_CHECKPOINT) if name is None else name
    check_not_replaced(name)
    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"`--model` must be a checkpoint folder that exists, or a Hub id such as ORG/NAME, got {name!r}; "
                "check the path."
            ) from error
    check_device(device)
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type != "mue":
        raise ValueError(
            f'`--model` must be a checkpoint with model_type "mue", got {model_type!r} in {name}; `mue-hf convert` '
            "makes one from an OFA checkpoint."
        )
    if threads:
        torch.set_num_threads(threads)
    options = {} if engine in (None, "torch") else {"engine": engine}
    try:
        model = MuEForConditionalGeneration.from_pretrained(name, dtype=getattr(torch, dtype), **options)
    except SafetensorError as error:
        raise ValueError(
            f"`--model` must be a whole checkpoint, got {name}: {error}; save or load it anew."
        ) from error
    model = model.to(device).eval()
    model.fold_batch_norms()
    return model, MuEProcessor.from_pretrained(name)


__all__ = ["DEFAULT_PRESET", "SMALL_CHECKPOINT", "check_device", "check_not_replaced", "evaluating", "load_checkpoint"]
