"""One benchmark: a model that is timed, its variants and peers, and the record of its cells."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel

from ..evaluation.measure import environment
from ..inference.loading import check_device, load_checkpoint
from ..model.configuration_mue import MuEConfig
from ..model.exit_options_mue import resolve_options
from ..model.generation_mue import weights_fingerprint
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import load_image
from .cells import measure_cell
from .peers import Peer
from .record import Record
from .variants import DEFAULT_VARIANTS, make_variants, variant_names


@dataclass(frozen=True)
class TimedModel:
    """A model that is timed, and what on.

    Args:
        name (`str`): what it is called in the record.
        model (`MuEForConditionalGeneration`): in evaluation mode, batch norms folded, no parameter with a gradient.
        make_inputs (`Callable`): batch size -> inputs of `generate`, on the CPU and in float32.
        reference (`MuEForConditionalGeneration`, *optional*): that model in torch, where an engine runs `model`.
    """

    name: str
    model: PreTrainedModel
    make_inputs: Callable[[int], BatchFeature]
    reference: PreTrainedModel | None = None

    def inputs(self, batch: int) -> BatchFeature:
        """Inputs of `generate` for a batch, where the model is and in its dtype."""
        return self.make_inputs(batch).to(self.model.device, self.model.dtype)


def random_model(
    size: str, image_size: int = 480, *, device: str = "cpu", dtype: str = "float32", threads: int | None = None
) -> TimedModel:
    """A model of OFA's shapes with random weights.

    Args:
        size (`str`): one of `SIZES`.
        image_size (`int`): pixels of both sides of an image.
        device, dtype, threads: see [`load_checkpoint`].

    Raises:
        ValueError: for an image size or a device that cannot be.
    """
    config = MuEConfig.from_size(size)
    most = 16 * config.image_bucket_size
    if image_size % 16 or image_size > most:
        raise ValueError(f"`image_size` must be a multiple of 16 up to {most}, got {image_size}.")
    check_device(device)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MuEForConditionalGeneration(config)
    # Trained weights give no image code as text, random ones would where nobody forbids it.
    model.get_input_embeddings().weight.data[config.num_text_tokens :] = 0
    model = model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)
    model.fold_batch_norms()
    # As long as the captioning prompt.
    prompt = torch.tensor([[0, *range(10, 16), 2]])

    def inputs(batch: int) -> BatchFeature:
        images = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))
        ids = prompt.repeat(batch, 1)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images})

    return TimedModel(f"OFA-{size} shapes at {image_size} px, random weights", model, inputs)


def checkpoint_model(name: str, images: Sequence[str] = (), engine: str = "torch", **where: Any) -> TimedModel:
    """A checkpoint on photos, in turns, or on noise.

    Args:
        name (`str`): a folder or a Hub id.
        images (sequence of `str`): files.
        engine: of all variants but "stock" and "plain", which torch runs.
        where: device, dtype and threads, see [`load_checkpoint`].
    """
    model, processor = load_checkpoint(name, engine=engine, **where)
    reference = None if engine == "torch" else load_checkpoint(name, **where)[0].requires_grad_(False)
    photos = [load_image(path) for path in images]
    size = processor.image_processor.size

    def inputs(batch: int) -> BatchFeature:
        shape, noise = (batch, size["height"], size["width"], 3), torch.Generator().manual_seed(batch)
        pixels = torch.randint(256, shape, generator=noise, dtype=torch.uint8).numpy()
        return processor(images=list(islice(cycle(photos), batch)) or list(pixels))

    return TimedModel(f"{name} on {len(photos) or 'no'} photos", model.requires_grad_(False), inputs, reference)


class Bench:
    """Variants of a model and peers beside them, timed in cells: a batch size and a number of beams each.

    Args:
        timed (`TimedModel`): the model.
        output (`Path`): file of the record. What it holds already is kept, if it was made under the same settings.
        variants (sequence of `str`): among [`variant_names`].
        exits (`dict`): name -> exit options, for one more variant each.
        peers (sequence of `str`): see [`Peer`].
        tokens (`int`): new tokens of each caption.

    Raises:
        ValueError: for names that do not exist or stand for two, exit options that contradict each other, and a record
            of other settings.
    """

    def __init__(
        self,
        timed: TimedModel,
        output: Path,
        *,
        variants: Sequence[str] = DEFAULT_VARIANTS,
        exits: Mapping[str, Mapping[str, Any]] | None = None,
        peers: Sequence[str] = (),
        tokens: int = 16,
    ):
        self.timed, self.variants, self.exits, self.tokens = timed, list(variants), dict(exits or {}), tokens
        model, image = timed.model, timed.inputs(1)["pixel_values"]
        if unknown := [name for name in variants if name not in variant_names()]:
            raise ValueError(f"`variants` must be some of {variant_names()}, got {unknown}; check the spelling.")
        if taken := [name for name in self.exits if name in variant_names()]:
            raise ValueError(f"`exits` must have names that no other variant has, got {taken}; rename them.")
        saved = {name: value for name, value in vars(model.generation_config).items() if "exit" in name}
        for options in self.exits.values():
            resolve_options(options, {}, saved, model.config)
        with torch.no_grad():
            rows, columns = model.trunk_features(image).shape[2:]
        self.peers = [Peer(spec, rows * columns, image) for spec in peers]
        settings = {
            "name": timed.name,
            "weights": weights_fingerprint(model),
            "image_tokens": rows * columns,
            "new_tokens": tokens,
            "variants": self.variants,
            "exits": self.exits,
            "peers": {peer.name: peer.facts() for peer in self.peers},
        }
        machine = environment(model, 1) | {"cores": os.cpu_count()}
        del machine["batch_size"]
        self.record = Record(output, {"settings": settings, "environment": machine})

    def measure(
        self, batch_sizes: Sequence[int], beams: Sequence[int], *, repeats: int = 10, max_seconds: float | None = None
    ) -> dict[str, Any]:
        """Measures the cells of these batch sizes and beams that the record lacks, each in `repeats` rounds, of which
        none but the first three begins after `max_seconds`; returns the record."""
        wanted = {f"batch {batch}, beam {count}": (batch, count) for batch, count in product(batch_sizes, beams)}
        missing = {name: sizes for name, sizes in wanted.items() if name not in self.record}
        runs = (len(self.variants) + len(self.exits) + len(self.peers)) * (repeats + 3)
        with tqdm(total=len(missing) * runs, unit="run") as progress:
            for number, (name, (batch, count)) in enumerate(missing.items(), 1):
                progress.set_description(name)
                limits = {"repeats": repeats, "max_seconds": max_seconds, "advance": progress.update}
                self.record.add(name, self._cell(batch, count, limits))
                # Rounds that were cut short.
                progress.n = number * runs
                progress.refresh()
        return self.record.content

    def _cell(self, batch: int, beams: int, limits: Mapping[str, Any]) -> dict[str, Any]:
        inputs, sizes = self.timed.inputs(batch), {"beams": beams, "steps": self.tokens}
        model, reference = self.timed.model, self.timed.reference
        variants = make_variants(self.variants, model, inputs, self.exits, reference=reference, **sizes)
        variants += [peer.variant(inputs["pixel_values"]) for peer in self.peers]
        decoding = {
            "num_beams": beams,
            "max_new_tokens": self.tokens,
            "min_new_tokens": self.tokens,
            "do_sample": False,
            "return_dict_in_generate": True,
        }
        return {"batch_size": batch, "beams": beams} | measure_cell(variants, decoding, **limits)


__all__ = ["Bench", "TimedModel", "checkpoint_model", "random_model"]
