"""What the tests share: tiny random models with asymmetric weights, inputs for them, and the optional shared data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bulk_fixtures import PHOTO_SIZE, SPECIAL_IDS, byte_tokenizer, make_checkpoint
from PIL import Image
from transformers import GenerationConfig

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEImageProcessor, MuEProcessor, MuETokenizer
from mue_hf.data.scenes import SceneDataset

# Of generation, for `byte_parts`: texts of letters, and a preset.
FIRST_PRESET = {
    "suppress_tokens": [0, 1, 2, 3],
    "exit_presets": {"first": {"image_exit_threshold": -2.0, "decoder_exit_threshold": -2.0}},
}
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Golden fixtures and real pictures that developers have beside the repository; users do not."""
    if not SHARED.is_dir():
        pytest.skip(f"golden fixtures and data are not part of the repository ({SHARED.name}/ is absent)")
    return SHARED


def tiny_config(**overrides) -> MuEConfig:
    """Every size differs from every other where it can, so that no mix-up goes unseen."""
    fields = {
        "vocab_size": 99,
        "d_model": 32,
        "encoder_layers": 3,
        "decoder_layers": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "token_bucket_size": 8,
        "image_bucket_size": 6,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 12, 16],
            "depths": [1, 1, 1],
            "layer_type": "bottleneck",
            "out_features": ["stage3"],
        },
    }
    return MuEConfig(**fields | overrides)


def randomize(model: torch.nn.Module, std: float = 0.15, seed: int = 0) -> torch.nn.Module:
    """Weights and buffers far from their symmetric initial values; zero biases and unit scales hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std
        if "running_var" in name:
            value = 1.0 + value.abs()
        elif name.endswith("c_attn") or (name.endswith("weight") and tensor.dim() == 1):
            value = 1.0 + value
        tensor.data.copy_(value)
    return model


def tiny_model(std: float = 0.15, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides):
    """A random model in float64, where the laws are exact."""
    return randomize(MuEForConditionalGeneration(tiny_config(**overrides)), std, seed).to(dtype).eval()


def tiny_inputs(batch: int = 3, length: int = 7, dtype: torch.dtype = torch.float64, seed: int = 1) -> dict:
    """Pictures of 64 px (4 x 4 patches) and texts of mixed lengths, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 99, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - row % length :] = 0
    return {
        "input_ids": ids.masked_fill(mask == 0, 1),
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, 3, 64, 64, generator=generator, dtype=torch.float64).to(dtype),
    }


def character_tokenizer() -> MuETokenizer:
    """One token per byte of printable ASCII, no merges, no codes: enough for every law that is not about OFA's ids."""
    letters = ["Ġ", *(chr(code) for code in range(33, 127))]
    vocab = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"])}
    return MuETokenizer(vocab=vocab, merges=[], num_codes=0, num_bins=0)


def byte_parts(
    image_size: int = 64, generation: dict | None = None, **overrides
) -> tuple[MuEForConditionalGeneration, MuEProcessor]:
    """A tiny model whose tokens are bytes, with options of generation, and its processor."""
    tokenizer = byte_tokenizer()
    model = tiny_model(**{"vocab_size": len(tokenizer), "max_position_embeddings": 128} | overrides)
    model.generation_config = GenerationConfig(**SPECIAL_IDS, **{"max_new_tokens": 4} | (generation or {}))
    return model, MuEProcessor(MuEImageProcessor(size={"height": image_size, "width": image_size}), tokenizer)


def byte_checkpoint(folder: Path, max_shard_size: str = "5GB", **options) -> Path:
    """Saves `byte_parts` in single precision."""
    model, processor = byte_parts(dtype=torch.float32, **options)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def model() -> MuEForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def inputs() -> dict:
    return tiny_inputs()


@pytest.fixture(scope="module")
def scenes(request) -> list[dict]:
    """Captions and two statements on each of a few scenes, as many as `IMAGES` of the test's module."""
    return list(SceneDataset(request.module.IMAGES, seed=3, statements=2))


@pytest.fixture(scope="module")
def statements(scenes) -> list[dict]:
    """The statements of `scenes`, a row each."""
    return [
        {"image": scene["image"], "image_id": scene["image_id"], "hypothesis": hypothesis, "label": label}
        for scene in scenes
        for hypothesis, label in zip(scene["hypothesis"], scene["label"], strict=True)
    ]


@pytest.fixture
def tiny_sizes(monkeypatch):
    """The sizes of OFA are those of a tiny model."""
    monkeypatch.setattr(MuEConfig, "from_size", classmethod(lambda cls, size, **fields: tiny_config(**fields)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    """A picture without symmetry."""
    rows, columns = np.mgrid[0:40, 0:50]
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.stack([rows * 6, columns * 5, rows * columns % 256], -1).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """Three images, two of one name, and a file that is none."""
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "other/a.png")]
    for shade, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        image = Image.linear_gradient("L").resize(PHOTO_SIZE).rotate(60 * shade)
        image.save(path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    return [str(path) for path in paths]


@pytest.fixture(scope="session")
def engine_folders(tmp_path_factory):
    """A tiny checkpoint of `tiny_model`, and what export makes of it by precision; torch traces each part once."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    if torch.__version__ < "2.7":
        pytest.skip("torch 2.6 exports no batch norm to ONNX")
    from mue_hf.export import checkpoint

    folder, traced, trace = tmp_path_factory.mktemp("engine"), {}, checkpoint.graph_of
    plain = folder / "torch"
    model = tiny_model(vocab_size=100, dtype=torch.float32)
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(plain)
    MuEProcessor(MuEImageProcessor(size={"height": 64, "width": 64}), character_tokenizer()).save_pretrained(plain)

    def once(part):
        key = type(part.module).__name__, part.outputs
        if key not in traced:
            traced[key] = trace(part)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "graph_of", once)
        patch.setattr("mue_hf.export.graphs.graph_of", once)
        for precision in ("float32", "int8"):
            checkpoint.export_checkpoint(plain, folder / precision, precision=precision)
    return {path.name: path for path in folder.iterdir() if path.is_dir()}
