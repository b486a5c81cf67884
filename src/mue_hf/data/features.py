"""The frozen trunk's features of a data set on disk: computed once, in shards that are written whole, then mapped."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HubDataset
from datasets import Image
from PIL import Image as PilImage
from PIL import ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files import whole_file
from ..model.images_mue import load_image
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


def trunk_fingerprint(trunk: PreTrainedModel, module: str | None = None) -> str:
    """SHA-256 of settings, weights and buffers of a trunk or a whole model, [`unfolded`]: folded ones have others.

    Args:
        trunk (`PreTrainedModel`): the trunk or the model.
        module (`str`, *optional*): name of a module of it: what was registered after that does not count; ValueError
            if it has no weights.

    Under an engine it is that of the graphs.
    """
    engine: Any = getattr(trunk, "engine", None)
    if engine is not None:
        return engine.digest
    settings = trunk.config.to_dict()
    # They say where the trunk came from, not what it computes; the dtype is that of the weights.
    for name in ("_name_or_path", "transformers_version", "dtype"):
        settings.pop(name, None)
    digest = sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    state = list(trunk.state_dict().items())
    if module is not None:
        places = [place for place, (name, _) in enumerate(state) if name.startswith(f"{module}.")]
        if not places:
            raise ValueError(f"`module` must name a module with weights, got {module!r}; name the one before it.")
        state = state[: places[-1] + 1]
    for name, tensor in sorted(state):
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

    Features are memory-mapped; each worker process opens them for itself. Of the views of an image (itself, its mirror
    image, crops) one is drawn at each access.

    Args:
        rows (sequence of `dict`): the data set without images.
        places (list of lists of (shard file, row)): for each row the features of its views.
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


def _views(digest: str, mirror: bool, crops: int, crop_side: float) -> list[str]:
    """The views of an image by name: itself, its mirror image, crops."""
    names = [digest, f"{digest} mirror"] if mirror else [digest]
    kind = "mirrored by chance" if mirror else "upright"
    return names + [f"{digest} crop {number} of {crop_side} {kind}" for number in range(crops)]


def _draw_view(image: PilImage.Image, name: str, crop_side: float) -> PilImage.Image:
    """The view of that name; where a crop lies follows from its name, so that it is the same in every run."""
    if name.endswith(" mirror"):
        return ImageOps.mirror(image)
    if " crop " not in name:
        return image
    rng = random.Random(name)
    width, height = (max(1, round(side * rng.uniform(crop_side, 1))) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(crop) if name.endswith("by chance") and rng.random() < 0.5 else crop


@torch.inference_mode()
def _compute(
    model: Any, processor: MuEProcessor, images: list[PilImage.Image], dtype: torch.dtype, module: nn.Module | None
) -> Tensor:
    """Features [images, channels, rows, columns]: the trunk's, or the output of a module of it."""
    weight = next(model.parameters())
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(weight.device, weight.dtype)
    inner: list[Tensor] = []
    hook = (
        None if module is None else module.register_forward_hook(lambda module, inputs, output: inner.append(output))
    )
    try:
        # depthwise convolutions of a batch take half as long in this layout on CPUs
        features = model.trunk_features(pixels.contiguous(memory_format=torch.channels_last))
    finally:
        if hook is not None:
            hook.remove()
    if module is not None:
        # large images run through the trunk a few at a time
        features = torch.cat(inner)
    features = features.to("cpu", dtype).contiguous()
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
    crops: int = 0,
    crop_side: float = 0.75,
    module: str | None = None,
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
        mirror (`bool`, *optional*, defaults to `False`): whether the mirror image is a view too, and every other crop
            a mirrored one. Texts that say left or right are then wrong half of the time.
        crops (`int`, *optional*, defaults to 0): further views of each image: random parts of it.
        crop_side (`float` in (0, 1), *optional*, defaults to 0.75): the least share of width and of height in a crop.
        module (`str`, *optional*): name of a module of the trunk, such as "_backbone.blocks.4", whose output is cached
            in place of the trunk's, for training what comes after it; the modules before it are registered before it.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): of features on disk; rows have float32.
        batch_size (`int`, *optional*, defaults to 16): images, with all of their views, per call of the trunk.

    Returns:
        [`TrunkFeatureDataset`], for [`MuEDataCollator`].

    Raises:
        ValueError: if the data set has no length or no images, an image cannot be read, a shard is damaged, an
            option is out of range, or `dtype` cannot hold the features.
    """
    if crops < 0 or not 0 < crop_side < 1:
        raise ValueError(
            f"`crops` must be at least 0 and `crop_side` a share in (0, 1), got {crops} and {crop_side}; pass "
            "`crops=0` for none."
        )
    if not hasattr(dataset, "__len__") or len(dataset) == 0 or "image" not in dataset[0]:
        raise ValueError(
            f"`dataset` must be a data set of known length whose rows have an `image`, got {type(dataset).__name__}; "
            "load it without streaming."
        )
    trunk = model.get_encoder().embed_images
    inner = None if module is None else _inner(trunk, module)
    folder = Path(folder) / _cache_key(model, processor, module, dtype)
    folder.mkdir(parents=True, exist_ok=True)

    sources: Any = dataset
    rows: Any = dataset
    if isinstance(dataset, HubDataset):
        sources = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
        rows = dataset.remove_columns("image")
    numbers = range(len(dataset))
    digests = [image_digest(sources[i]["image"]) for i in tqdm(numbers, desc="known images", unit="image", delay=2)]
    views = [_views(digest, mirror, crops, crop_side) for digest in digests]
    index = _read_index(folder)
    # A picture that occurs twice is computed once; views that are known stay.
    missing = list({digests[i]: i for i in numbers if not index.keys() >= set(views[i])}.values())

    def new_views(number: int) -> dict[str, PilImage.Image]:
        # upright, so that mirrored means left to right
        image = load_image(dataset[number]["image"])
        return {name: _draw_view(image, name, crop_side) for name in views[number] if name not in index}

    training = trunk.training
    trunk.eval()
    try:
        with tqdm(total=len(missing), desc="trunk features", unit="image", disable=not missing) as progress:
            for start in range(0, len(missing), SHARD):
                shard = missing[start : start + SHARD]
                names: list[str] = []
                parts: list[Tensor] = []
                for first in range(0, len(shard), batch_size):
                    batch: dict[str, PilImage.Image] = {}
                    for number in shard[first : first + batch_size]:
                        batch |= new_views(number)
                    names += batch
                    parts.append(_compute(model, processor, list(batch.values()), dtype, inner))
                    progress.update(len(shard[first : first + batch_size]))
                _write_shard(folder, names, torch.cat(parts))
    finally:
        trunk.train(training)
    index = _read_index(folder)
    return TrunkFeatureDataset(rows, [[index[name] for name in names] for names in views])


def _inner(trunk: nn.Module, name: str) -> nn.Module:
    """The module of the trunk of that name; a ValueError if there is none."""
    modules = dict(trunk.named_modules())
    if name not in modules:
        some = [other for other in modules if other.count(".") < 3][1:]
        raise ValueError(f"`module` must name a module of the trunk, got {name!r}; there are {some}.")
    return modules[name]


def _cache_key(
    model: MuEForConditionalGeneration | MuEModel, processor: MuEProcessor, module: str | None, dtype: torch.dtype
) -> str:
    """What tells the features of one trunk, image size and dtype from those of others."""
    with unfolded(model):
        fingerprint = trunk_fingerprint(model.get_encoder().embed_images, module)
    # the map says where a published processor's code is
    pixels = {name: value for name, value in processor.image_processor.to_dict().items() if name != "auto_map"}
    key = [fingerprint, pixels, str(dtype), *([] if module is None else [module])]
    return _short_hash(json.dumps(key, sort_keys=True, default=str))


def _write_shard(folder: Path, names: list[str], features: Tensor) -> None:
    """One file with the features [views, channels, rows, columns] of the views of these names."""
    keys = json.dumps(names)
    with whole_file(folder / f"{_short_hash(keys)}.safetensors") as part:
        save_file({"features": features}, part, metadata={"keys": keys})


def _short_hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


__all__ = ["TrunkFeatureDataset", "cache_trunk_features", "image_digest", "trunk_fingerprint", "unfolded"]
