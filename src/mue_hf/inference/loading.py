"""A model and its processor from a checkpoint, with messages for what can be wrong."""

from pathlib import Path

import torch
from transformers import AutoConfig

from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor

SMALL_CHECKPOINT = Path("checkpoints/mue-flickr8k-small")


def check_device(device: str) -> None:
    """Raises a ValueError unless torch has this device."""
    try:
        torch.zeros(1, device=device)
    # What torch raises for an unknown device depends on the device.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`--device` must be one that torch can use here, got {device!r}: {reason}") from error


def load_checkpoint(
    name: str | None = None, *, device: str = "cpu", dtype: str = "float32", threads: int | None = None
) -> tuple[MuEForConditionalGeneration, MuEProcessor]:
    """Model and processor of a checkpoint, in evaluation mode.

    Args:
        name (`str`, *optional*): a folder or a Hub id; default: the small checkpoint of a clone.
        device, dtype (`str`): where the model is put, and the dtype of its weights.
        threads (`int`, *optional*): CPU threads of this process from now on; default: as they are.

    Raises:
        `ValueError`: no model is named and the small checkpoint is not here, the checkpoint holds another kind of
            model, or the device does not exist.
    """
    if name is None:
        if not SMALL_CHECKPOINT.is_dir():
            raise ValueError(
                f"`--model` is needed: {SMALL_CHECKPOINT} is not in this folder. Pass a checkpoint folder or a Hub "
                "id, or run in a clone of the repository."
            )
        name = str(SMALL_CHECKPOINT)
    check_device(device)
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type != "mue":
        raise ValueError(
            f'`--model` must be a checkpoint with model_type "mue", got {model_type!r} in {name}; `mue-hf convert` '
            "makes one from an OFA checkpoint."
        )
    if threads:
        torch.set_num_threads(threads)
    model = MuEForConditionalGeneration.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(device).eval(), MuEProcessor.from_pretrained(name)


__all__ = ["SMALL_CHECKPOINT", "check_device", "load_checkpoint"]
