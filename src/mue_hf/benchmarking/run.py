"""One benchmark: a model that is timed, its variants and peers, and the record of its cells."""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..evaluation.measure import environment
from ..model.exit_options_mue import resolve_options
from ..model.generation_mue import weights_fingerprint
from ..model.graph_files_mue import MANIFEST, sha256_of
from .cells import measure_cell
from .models import TimedModel
from .peers import Peer
from .record import Record
from .variants import DEFAULT_VARIANTS, TORCH_ONLY, make_variants, variant_names


class Bench:
    """Variants of a model and peers beside them, timed in cells: a batch size and a number of beams each.

    Args:
        timed (`TimedModel`): the model. On its exports run all variants but peers and those of `TORCH_ONLY`.
        output (`Path`): file of the record. What it holds already is kept, if it was made under the same settings.
        variants (sequence of `str`): among [`variant_names`].
        exits (`dict`): name -> exit options, for one more variant each.
        peers (sequence of `str`): see [`Peer`].
        tokens (`int`): new tokens of each caption.

    Raises:
        ValueError: for names that do not exist or stand for two, exit options that contradict each other, exports that
            no variant runs on, and a record of other settings.
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
        self.on_exports = [name for name in (*self.variants, *self.exits) if name not in TORCH_ONLY]
        if timed.exports and not self.on_exports:
            raise ValueError(f"`exports` run none of the variants {self.variants}; add lossless, half or a preset.")
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
            "exports": {name: _export_facts(export) for name, export in timed.exports.items()},
        }
        machine = environment(model, 1) | {"cores": os.cpu_count()}
        del machine["batch_size"]
        if timed.exports:
            machine["versions"]["onnxruntime"] = version("onnxruntime")
        self.record = Record(output, {"settings": settings, "environment": machine})

    def measure(
        self, batch_sizes: Sequence[int], beams: Sequence[int], *, repeats: int = 10, max_seconds: float | None = None
    ) -> dict[str, Any]:
        """Measures the cells of these batch sizes and beams that the record lacks, each in `repeats` rounds, of which
        none but the first three begins after `max_seconds`; returns the record."""
        wanted = {f"batch {batch}, beam {count}": (batch, count) for batch, count in product(batch_sizes, beams)}
        missing = {name: sizes for name, sizes in wanted.items() if name not in self.record}
        rows = len(self.variants) + len(self.exits) + len(self.peers) + len(self.timed.exports) * len(self.on_exports)
        runs = rows * (repeats + 3)
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
        variants = make_variants(self.variants, self.timed.model, inputs, self.exits, **sizes)
        for name, export in self.timed.exports.items():
            variants += make_variants(self.variants, export, inputs, self.exits, export=name, **sizes)
        variants += [peer.variant(inputs["pixel_values"]) for peer in self.peers]
        decoding = {
            "num_beams": beams,
            "max_new_tokens": self.tokens,
            "min_new_tokens": self.tokens,
            "do_sample": False,
            "return_dict_in_generate": True,
        }
        return {"batch_size": batch, "beams": beams} | measure_cell(variants, decoding, **limits)


def _export_facts(export: PreTrainedModel) -> dict[str, str]:
    """What the record says about an export: another manifest is another export."""
    manifest = export.engine.folder / MANIFEST
    return {"precision": export.engine.precision, "manifest": sha256_of(manifest)}


__all__ = ["Bench"]
