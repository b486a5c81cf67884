"""The models that are timed, and what on: a checkpoint with its exports, or OFA's shapes with random weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel

from ..inference.loading import check_device, load_checkpoint
from ..model.configuration_mue import MuEConfig
from ..model.engine_mue import ENGINES
from ..model.generation_mue import weights_fingerprint
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import load_image

# What the configurations of a checkpoint and of its export may differ in: where and by which version they were saved.
NOT_COMPARED = {"_name_or_path", "transformers_version"}


@dataclass(frozen=True)
class TimedModel:
    """A model that is timed, and what on.

    Args:
        name (`str`): what it is called in the record.
        model (`MuEForConditionalGeneration`): in torch, in evaluation mode, batch norms folded, no parameter with a
            gradient.
        make_inputs (`Callable`): batch size -> inputs of `generate`, on the CPU and in float32.
        exports (`dict`): name -> the same model on the graphs of an export, see [`load_exports`].
    """

    name: str
    model: PreTrainedModel
    make_inputs: Callable[[int], BatchFeature]
    exports: Mapping[str, PreTrainedModel] = field(default_factory=dict)

    def inputs(self, batch: int) -> BatchFeature:
        """Inputs of `generate` for a batch, where the model is and in its dtype."""
        return self.make_inputs(batch).to(self.model.device, self.model.dtype)


def with_random_weights(size: str, image_size: int) -> MuEForConditionalGeneration:
    """A model of OFA's shapes with the random weights of seed 0, in evaluation mode.

    Args:
        size (`str`): one of `SIZES`.
        image_size (`int`): pixels of both sides of the images that it is for.

    Raises:
        ValueError: for an image size that cannot be.
    """
    config = MuEConfig.from_size(size)
    most = 16 * config.image_bucket_size
    if image_size % 16 or image_size > most:
        raise ValueError(f"`image_size` must be a multiple of 16 up to {most}, got {image_size}.")
    torch.manual_seed(0)
    model: Any = MuEForConditionalGeneration(config)
    # Trained weights give no image code as text, random ones would where nobody forbids it.
    model.get_input_embeddings().weight.data[config.num_text_tokens :] = 0
    return model.eval()


def random_model(
    size: str, image_size: int = 480, *, device: str = "cpu", dtype: str = "float32", threads: int | None = None
) -> TimedModel:
    """A model of OFA's shapes with random weights.

    Args:
        size, image_size: see [`with_random_weights`].
        device, dtype, threads: see [`load_checkpoint`].

    Raises:
        ValueError: for an image size or a device that cannot be.
    """
    check_device(device)
    if threads:
        torch.set_num_threads(threads)
    model: Any = with_random_weights(size, image_size)
    model = model.to(device, getattr(torch, dtype)).requires_grad_(False)
    model.fold_batch_norms()
    # As long as the captioning prompt.
    prompt = torch.tensor([[0, *range(10, 16), 2]])

    def inputs(batch: int) -> BatchFeature:
        images = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))
        ids = prompt.repeat(batch, 1)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images})

    return TimedModel(f"OFA-{size} shapes at {image_size} px, random weights", model, inputs)


def load_exports(folders: Sequence[str], model: PreTrainedModel, **where: Any) -> dict[str, PreTrainedModel]:
    """What `mue-hf export` made of the weights of a model, by the name of its folder, each ready to run. Presets and
    all else that decides how `generate` decodes are those of the model.

    Args:
        folders (sequence of `str`): folders or Hub ids.
        model (`MuEForConditionalGeneration`): in torch, in float32.
        where: see [`load_checkpoint`].

    Raises:
        ValueError: for two of one name, other weights or another configuration than the model's, and what the engine
            refuses.
    """
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"`exports` must be folders of different names, got {list(folders)}; rename some.")
    weights, config = weights_fingerprint(model), model.config.to_dict()
    exports: dict[str, PreTrainedModel] = {}
    for name, folder in zip(names, folders, strict=True):
        export: Any = load_checkpoint(folder, engine=ENGINES[0], **where)[0]
        theirs = export.config.to_dict()
        others = [key for key in config | theirs if config.get(key) != theirs.get(key) and key not in NOT_COMPARED]
        if others or export.engine.weights != weights:
            what = f"another configuration ({', '.join(others)})" if others else "other weights"
            raise ValueError(
                f"`exports` must be made of the checkpoint that is timed, but {folder} has {what}; run "
                "`mue-hf export` on that checkpoint, or time the export as the checkpoint that it is."
            )
        export.generation_config = model.generation_config
        exports[name] = export
    return exports


def checkpoint_model(name: str, images: Sequence[str] = (), exports: Sequence[str] = (), **where: Any) -> TimedModel:
    """A checkpoint on photos, in turns, or on noise.

    Args:
        name (`str`): a folder or a Hub id.
        images (sequence of `str`): files.
        exports (sequence of `str`): see [`load_exports`].
        where: device, dtype and threads, see [`load_checkpoint`].
    """
    model, processor = load_checkpoint(name, **where)
    loaded = load_exports(exports, model, **where)
    photos = [load_image(path) for path in images]
    size = processor.image_processor.size

    def inputs(batch: int) -> BatchFeature:
        shape, noise = (batch, size["height"], size["width"], 3), torch.Generator().manual_seed(batch)
        pixels = torch.randint(256, shape, generator=noise, dtype=torch.uint8).numpy()
        return processor(images=list(islice(cycle(photos), batch)) or list(pixels))

    return TimedModel(f"{name} on {len(photos) or 'no'} photos", model.requires_grad_(False), inputs, loaded)


__all__ = ["TimedModel", "checkpoint_model", "load_exports", "random_model", "with_random_weights"]
