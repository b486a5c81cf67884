"""Batch norms folded on request: the same features and tokens, and never stale weights."""

import copy
import pickle

import pytest
import torch
from conftest import tiny_inputs, tiny_model
from stack import EXITS, generate
from torch import nn
from transformers import pipeline

from mue_hf import MuEForConditionalGeneration
from mue_hf.inference.loading import load_checkpoint
from mue_hf.model.presets_mue import weights_fingerprint


@pytest.fixture
def model():
    return tiny_model(std=0.3)


@pytest.fixture
def pixels():
    return tiny_inputs(5)["pixel_values"]


def norms(model) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def state(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(one, other) -> None:
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_features_tokens_and_fingerprint_stay(model, pixels, monkeypatch):
    inputs = tiny_inputs()
    with torch.no_grad():
        features, fingerprint = model.trunk_features(pixels), weights_fingerprint(model)
        expected = generate(model, inputs, **EXITS)
        count = norms(model)
        assert count == model.fold_batch_norms() == model.fold_batch_norms() > 0
        assert norms(model) == 0 and weights_fingerprint(model) == fingerprint
        torch.testing.assert_close(model.trunk_features(pixels), features, rtol=1e-10, atol=1e-10)
        # as many images at once as memory likes
        monkeypatch.setattr("mue_hf.model.vision_mue.PIXELS_AT_ONCE", 2 * 64 * 64)
        torch.testing.assert_close(model.trunk_features(pixels), features, rtol=1e-10, atol=1e-10)
    output = generate(model, inputs, **EXITS)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.image_exit_layers, expected.image_exit_layers)


@pytest.mark.parametrize("how", ["unfold", "train", "state dict", "save", "load"])
def test_ways_back(model, tmp_path, how):
    before = state(model)
    weights = [id(weight) for weight in model.parameters()]
    model.fold_batch_norms()
    if how == "unfold":
        model.unfold_batch_norms()
    elif how == "train":
        model.train()
    elif how == "state dict":
        assert_same_state(model.state_dict(), before)
    elif how == "save":
        model.save_pretrained(tmp_path)
        loaded = MuEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
        assert_same_state(state(loaded), before)
    else:
        other = tiny_model(std=0.3, seed=5)
        model.load_state_dict(other.state_dict())
        before = state(other)
    assert model.get_encoder().folding is None
    assert_same_state(state(model), before)
    assert [id(weight) for weight in model.parameters()] == weights


def test_moved_and_cast_models_unfold_where_they_are(model):
    expected = state(copy.deepcopy(model).float())
    model.fold_batch_norms()
    assert_same_state(model.float().state_dict(), expected)


def test_a_write_to_folded_weights_acts_and_is_not_lost_in_silence(model, pixels):
    model.fold_batch_norms()
    trunk = model.get_encoder().embed_images
    with torch.no_grad():
        next(m for m in trunk.modules() if isinstance(m, nn.Conv2d)).weight.data[0] += 1
        written = model.trunk_features(pixels)
        assert torch.equal(copy.deepcopy(model).trunk_features(pixels), written)
    for lose in (model.train, model.state_dict, model.unfold_batch_norms):
        with pytest.raises(ValueError, match="must be unfolded before its weights are changed"):
            lose()
    with torch.no_grad():
        assert torch.equal(model.trunk_features(pixels), written)


def test_needs_evaluation_mode(model):
    with pytest.raises(ValueError, match=r"needs a model in evaluation mode; call `model.eval\(\)`"):
        model.train().fold_batch_norms()


def test_half_precision_is_not_rounded_once_more(model):
    assert model.bfloat16().fold_batch_norms() == 0
    assert norms(model) > 0


def test_copies_and_pickles(model, pixels):
    model.fold_batch_norms()
    with torch.no_grad():
        expected = model.trunk_features(pixels)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin.trunk_features(pixels), expected)
            twin.unfold_batch_norms()
            assert norms(twin) > 0
    assert norms(model) == 0


def test_norms_that_bring_their_activation():
    config = {
        "model_type": "timm_backbone",
        "backbone": "tf_efficientnet_lite0",
        "use_pretrained_backbone": False,
        "out_indices": [2],
    }
    model = tiny_model(backbone_config=config, image_bucket_size=8)
    pixels = tiny_inputs(2)["pixel_values"]
    with torch.no_grad():
        expected = model.trunk_features(pixels)
        assert model.fold_batch_norms() > 0
        torch.testing.assert_close(model.trunk_features(pixels), expected, rtol=1e-10, atol=1e-10)


def test_what_would_compute_something_else_is_not_folded(pixels):
    backbone = tiny_model().config.backbone_config.to_dict() | {"depths": [1, 1, 2]}
    model = tiny_model(backbone_config=backbone)
    # one convolution before two norms cannot hold both
    pairs = [m for m in model.modules() if hasattr(m, "convolution") and hasattr(m, "normalization")]
    first = next(m for m in pairs if m.convolution.weight.shape == pairs[-1].convolution.weight.shape)
    first.convolution = pairs[-1].convolution
    with torch.no_grad():
        expected, before = model.trunk_features(pixels), state(model)
        assert first is not pairs[-1] and model.fold_batch_norms() == 0
        assert torch.equal(model.trunk_features(pixels), expected)
        assert_same_state(state(model), before)


def test_a_trunk_without_batch_norms():
    config = {
        "model_type": "swin",
        "image_size": 64,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 2,
        "out_features": ["stage2"],
    }
    model = tiny_model(backbone_config=config, image_bucket_size=16)
    assert model.fold_batch_norms() == 0


def test_commands_and_pipelines_fold_what_they_loaded(checkpoint):
    assert norms(load_checkpoint(str(checkpoint))[0]) == 0
    assert norms(pipeline("image-text-to-text", model=str(checkpoint), device="cpu").model) == 0
    own = MuEForConditionalGeneration.from_pretrained(checkpoint)
    made = pipeline("image-text-to-text", model=own, processor=load_checkpoint(str(checkpoint))[1], device="cpu")
    assert made.model is own and norms(own) > 0
