"""What 8 bits cost, measured on a user's images: of an export as it is, and of each of its parts alone."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..inference.predict import Prediction, encode_texts, predict
from ..model.engine_mue import use_engine
from ..model.graph_files_mue import FOLDER, graph_names, read_manifest
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from ..publishing.checkpoint import load_complete_model
from .checkpoint import export_checkpoint
from .images import CalibrationImages
from .int8 import IMAGES_AT_ONCE, dynamic_int8, static_int8

#: All graphs of one kind; their names follow one by one.
KINDS = ("trunk", "pos_*", "encoder_*", "cross_*", "decoder_*", "head")
GREEDY = {"num_beams": 1, "exit_criterion": "never"}
BATCH_SIZE = 8


@dataclass(frozen=True)
class Sensitivity:
    """
    What some graphs cost in int8 while the others are in float32.

    Args:
        name (`str`): these graphs, as `keep_float` takes them; "all" for those of an export.
        same (`float`): share of the images whose greedy caption, at full depth, is that of torch in float32.
        error (`float`): the largest difference of a logit over the captions of the first images, as a share of the
            largest logit.
    """

    name: str
    same: float
    error: float


def sensitivities(
    source: str | os.PathLike, exported: Path, images: CalibrationImages, each_part: bool = False
) -> Iterator[Sensitivity]:
    """Compares an export with torch on images.

    Args:
        source (path): the checkpoint folder.
        exported (`Path`): what [`export_checkpoint`] made of it.
        images ([`CalibrationImages`]): at the size of the export.
        each_part (`bool`, *optional*, defaults to `False`): whether, after the export as it is, each kind of graph
            runs in int8 alone, and each graph of the layers; takes an export in float32, in a folder beside
            `exported` that goes afterwards.
    """
    processor = MuEProcessor.from_pretrained(source)
    reference = _Reference(load_complete_model(Path(source)), processor, images)
    manifest = read_manifest(exported)
    model = MuEForConditionalGeneration.from_pretrained(exported, engine="onnxruntime")
    yield reference.compared("all", model, "trunk" in manifest["int8"])
    if not each_part:
        return
    names = graph_names(model.config)
    with TemporaryDirectory(dir=exported.parent, prefix=".scan-") as work:
        plain = Path(work, "float32")
        size = manifest["image_size"]
        graphs = export_checkpoint(source, plain, image_size=size, trunk=size is not None)["graphs"]
        int8 = {name: _int8_graph(name, plain, exported, manifest, images) for name in graphs}
        model = load_complete_model(plain)
        if manifest["attention"] != "float32":
            use_engine(model, plain / FOLDER, manifest | {"graphs": graphs})
            yield reference.compared("attention", model, False)
        for pattern in (*KINDS, *names[:-1]):
            changed = {name: int8[name] for name in graphs if fnmatchcase(name, pattern)}
            if changed:
                use_engine(model, plain / FOLDER, manifest | {"attention": "float32", "graphs": graphs | changed})
                yield reference.compared(pattern, model, "trunk" in changed)


def _int8_graph(
    name: str, plain: Path, exported: Path, manifest: dict[str, Any], images: CalibrationImages
) -> dict[str, Any]:
    """The entry of a graph in int8 that is put beside that in float32: the one that was exported, or a new one."""
    import onnx

    file, graph = plain / FOLDER / f"{name}.int8.onnx", manifest["graphs"][name]
    if graph["precision"] == "int8":
        # with its weights, which are in a file of another name
        made = onnx.load(exported / FOLDER / graph["file"])
    else:
        float32 = onnx.load(plain / FOLDER / f"{name}.onnx")
        made = static_int8(float32, images.batches(IMAGES_AT_ONCE)) if name == "trunk" else dynamic_int8(float32)
    file.write_bytes(made.SerializeToString())
    return graph | {"file": file.name, "precision": "int8"}


class _Reference:
    """Captions of torch in float32, and how others differ from them."""

    def __init__(self, model: MuEForConditionalGeneration, processor: MuEProcessor, images: CalibrationImages):
        model.fold_batch_norms()
        self.processor, self.images = processor, images
        self.features = self._features(model)
        self.captions = self._captions(model, self.features)
        self.logits = self._logits(model, self.features)

    def compared(self, name: str, model: MuEForConditionalGeneration, other_trunk: bool) -> Sensitivity:
        """What a model changes; features are those of torch unless it has another trunk."""
        features = self._features(model) if other_trunk else self.features
        captions, logits = self._captions(model, features), self._logits(model, features)
        same = [one.output == other.output for one, other in zip(captions, self.captions, strict=True)]
        error = float((logits - self.logits).abs().max() / self.logits.abs().max())
        return Sensitivity(name, sum(same) / len(same), error)

    @torch.no_grad()
    def _features(self, model: MuEForConditionalGeneration) -> list[Tensor]:
        return [one for pixels in self.images.batches(BATCH_SIZE) for one in model.trunk_features(pixels)]

    def _rows(self, features: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [{"image_id": str(number), "image_features": one} for number, one in enumerate(features)]

    def _captions(self, model: MuEForConditionalGeneration, features: Sequence[Tensor]) -> list[Prediction]:
        rows = self._rows(features)
        return predict(model, self.processor, rows, "captioning", GREEDY, batch_size=BATCH_SIZE, progress=False)

    @torch.no_grad()
    def _logits(self, model: MuEForConditionalGeneration, features: Sequence[Tensor]) -> Tensor:
        """[tokens, text tokens] over the captions of the reference."""
        first = self.captions[:BATCH_SIZE]
        start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
        ids = [torch.tensor([start, *caption.token_ids[:-1]]) for caption in first]
        inputs = encode_texts(self.processor, "captioning", self._rows(features[:BATCH_SIZE]))
        inputs |= {
            "image_features": torch.stack(list(features[:BATCH_SIZE])),
            "decoder_input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        }
        logits = model(**inputs).logits[..., : model.config.num_text_tokens]
        return torch.cat([rows[: len(own)] for rows, own in zip(logits, ids, strict=True)])


__all__ = ["Sensitivity", "sensitivities"]
