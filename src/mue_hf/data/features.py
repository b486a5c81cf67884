"""The frozen trunk's features of a data set on disk: computed once, in shards that are written whole, then mapped."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HubDataset
from datasets import Image
from PIL import Image as PilImage
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files import whole_file
from ..model.modeling_mue import MuEForConditionalGeneration, MuEModel
from ..model.processing_mue import MuEProcessor

SHARD = 256


@contextmanager
def unfolded(model: MuEForConditionalGeneration | MuEModel) -> Iterator[None]:
    """Inside the block the model's batch norms are unfolded; folded ones are folded again at its end."""
    encoder = model.get_encoder()
    folded = encoder.folding is not None
    encoder.unfold_batch_norms()
    try:
        yield
    finally:
        if folded:
            encoder.fold_batch_norms()


def trunk_fingerprint(trunk: PreTrainedModel) -> str:
    """SHA-256 of settings, weights and buffers of a trunk or a whole model, [`unfolded`]: folded ones have others."""
    settings = trunk.config.to_dict()
    # They say where the trunk came from, not what it computes.
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    digest = sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(trunk.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def image_digest(image: Any) -> str:
    """SHA-256 of an image: of the bytes of its file where there is one, else of its pixels.

    Args:
        image (`PIL.Image.Image`, `str`, `os.PathLike` or `dict`): an image, a path, or what `datasets` stores,
            `{"bytes": ..., "path": ...}`; ValueError for others.
    """
    if isinstance(image, PilImage.Image):
        return sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
    if isinstance(image, dict):
        if image["bytes"] is not None:
            return sha256(image["bytes"]).hexdigest()
        image = image["path"]
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"`image` must be an image or a path, got {type(image).__name__}; load it first.")
    return sha256(Path(image).read_bytes()).hexdigest()


class TrunkFeatureDataset(Dataset):
    """Rows with "image_features" [channels, rows, columns] (float32) for "image", made by [`cache_trunk_features`].

    Features are memory-mapped; each worker process opens them for itself. Of an image and its mirror image one is
    drawn at each access.

    Args:
        rows (sequence of `dict`): the data set without images.
        places (list of lists of (shard file, row)): for each row its features, and those of its mirror image if any.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], places: Sequence[Sequence[tuple[Path, int]]]) -> None:
        self.rows, self.places = rows, places
        self._shards: dict[Path, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        options = self.places[index]
        path, place = options[int(torch.randint(len(options), ()))] if len(options) > 1 else options[0]
        if path not in self._shards:
            with safe_open(path, "pt") as shard:
                self._shards[path] = shard.get_tensor("features")
        row = {name: value for name, value in self.rows[index].items() if name != "image"}
        return row | {"image_features": self._shards[path][place].float()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}


def _read_index(folder: Path) -> dict[str, tuple[Path, int]]:
    """What the shards of a folder hold: key to (file, row)."""
    index: dict[str, tuple[Path, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                keys = json.loads(shard.metadata()["keys"])
        except (SafetensorError, TypeError, KeyError) as error:
            message = f"`folder` must hold whole shards, got a damaged one, {path}: {error}; delete it."
            raise ValueError(message) from error
        index |= {key: (path, row) for row, key in enumerate(keys)}
    return index


@torch.inference_mode()
def _compute(model: Any, processor: MuEProcessor, images: list[Any], mirror: bool, dtype: torch.dtype) -> Tensor:
    """Features [images * (1 + mirror), channels, rows, columns], each image followed by its mirror image."""
    weight = next(model.parameters())
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(weight.device, weight.dtype)
    if mirror:
        pixels = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1)
    features = model.trunk_features(pixels).to("cpu", dtype).contiguous()
    if not features.isfinite().all():
        raise ValueError(f"`dtype` must hold the features, got infinite ones in {dtype}; pass torch.float32.")
    return features


def cache_trunk_features(
    model: MuEForConditionalGeneration | MuEModel,
    processor: MuEProcessor,
    dataset: HubDataset | Dataset,
    folder: str | os.PathLike,
    *,
    mirror: bool = False,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 16,
) -> TrunkFeatureDataset:
    """A data set with the trunk's features in place of its images, computed where `folder` does not hold them yet.

    Features are found again by the image's content, the trunk's weights and the image processor's settings, so that a
    folder may serve several data sets and models. They are written in shards of 256 images, each whole: an interrupted
    run goes on from the last one. The trunk runs in evaluation mode, as a frozen one should in training.

    Args:
        model, processor: what computes, on the model's device, and whose image processor makes the pixels.
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): rows with an "image", such as those of
            [`load_captioning`]; not streamed.
        folder (`str` or `os.PathLike`): where the features lie; made if it does not exist.
        mirror (`bool`, *optional*, defaults to `False`): whether each access draws the image or its mirror image.
            Texts that say left or right are then wrong half of the time.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): of features on disk; rows have float32.
        batch_size (`int`, *optional*, defaults to 16): images per call of the trunk.

    Returns:
        [`TrunkFeatureDataset`], for [`MuEDataCollator`].

    Raises:
        ValueError: if the data set has no length or no images, an image cannot be read, a shard is damaged, or `dtype`
            cannot hold the features.
    """
    if not hasattr(dataset, "__len__") or len(dataset) == 0 or "image" not in dataset[0]:
        raise ValueError(
            f"`dataset` must be a data set of known length whose rows have an `image`, got {type(dataset).__name__}; "
            "load it without streaming."
        )
    trunk = model.get_encoder().embed_images
    with unfolded(model):
        fingerprint = trunk_fingerprint(trunk)
    key = [fingerprint, processor.image_processor.to_dict(), str(dtype)]
    folder = Path(folder) / _short_hash(json.dumps(key, sort_keys=True, default=str))
    folder.mkdir(parents=True, exist_ok=True)

    images: Any = dataset
    rows: Any = dataset
    if isinstance(dataset, HubDataset):
        images = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
        rows = dataset.remove_columns("image")
    numbers = range(len(dataset))
    digests = [image_digest(images[i]["image"]) for i in tqdm(numbers, desc="known images", unit="image", delay=2)]
    variants = [[digest, f"{digest} mirror"] if mirror else [digest] for digest in digests]
    index = _read_index(folder)
    # A picture that occurs twice is computed once.
    missing = list({digests[i]: i for i in numbers if not index.keys() >= set(variants[i])}.values())

    training = trunk.training
    trunk.eval()
    try:
        with tqdm(total=len(missing), desc="trunk features", unit="image", disable=not missing) as progress:
            for start in range(0, len(missing), SHARD):
                shard, parts = missing[start : start + SHARD], []
                for first in range(0, len(shard), batch_size):
                    batch = shard[first : first + batch_size]
                    parts.append(_compute(model, processor, [dataset[i]["image"] for i in batch], mirror, dtype))
                    progress.update(len(batch))
                keys = json.dumps([key for i in shard for key in variants[i]])
                with whole_file(folder / f"{_short_hash(keys)}.safetensors") as part:
                    save_file({"features": torch.cat(parts)}, part, metadata={"keys": keys})
    finally:
        trunk.train(training)
    index = _read_index(folder)
    return TrunkFeatureDataset(rows, [[index[key] for key in keys] for keys in variants])


def _short_hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


__all__ = ["TrunkFeatureDataset", "cache_trunk_features", "image_digest", "trunk_fingerprint", "unfolded"]
