"""The checkpoint in the repository: small, whole, in step with the code, and able to caption."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import mue_hf
from mue_hf import MuEForConditionalGeneration, MuEProcessor

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "mue-flickr8k-small"


@pytest.fixture(scope="module")
def model() -> MuEForConditionalGeneration:
    return MuEForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


def test_size_and_dtype(model):
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 40e6
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}
    assert torch.float16 in dtypes and torch.float32 not in dtypes
    # half precision on disk, single precision at work
    assert model.dtype == torch.float32
    assert (model.config.encoder_layers, model.config.decoder_layers) == (6, 6)


def test_code_beside_the_weights_is_the_packages():
    sources = sorted(Path(mue_hf.__file__).parent.glob("*_mue.py"))
    copies = {path.name for path in CHECKPOINT.glob("*.py")}
    assert copies == {path.name for path in sources}
    for path in sources:
        assert (CHECKPOINT / path.name).read_text() == path.read_text(), f"{path.name} differs: run `make style`"


def test_captions_with_and_without_exits(model):
    processor = MuEProcessor.from_pretrained(CHECKPOINT)
    with Image.open(ROOT / "examples" / "photos" / "cat.jpg") as image:
        inputs = processor(images=image)
    plain = model.generate(**inputs, return_dict_in_generate=True)
    assert plain.image_exit_layers.tolist() == [6]
    words = processor.decode(plain.sequences[0], skip_special_tokens=True).split()
    assert 4 <= len(words) <= 20
    for preset in ("quality", "balanced", "fast"):
        output = model.generate(**inputs, exit_preset=preset, return_dict_in_generate=True)
        assert output.executed_layers["decoder"] < plain.executed_layers["decoder"] or output.image_exit_layers < 6
