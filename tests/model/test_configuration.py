"""MuEConfig: OFA's sizes to the last parameter, every size expressible, trunks of any kind, and clear refusals."""

import pytest
import torch
from conftest import randomize, tiny_config, tiny_inputs, tiny_model
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassError,
    StrictDataclassFieldValidationError,
)
from transformers import AutoConfig, GenerationConfig

from mue_hf import MuEConfig, MuEForConditionalGeneration
from mue_hf.model.configuration_mue import resnet_backbone_kwargs

# All parameters, those of the trunk and of the tied embedding, as counted on OFA's own code.
PARAMETERS = {
    "tiny": (33_488_336, 8_543_296, 15_220_992),
    "medium": (92_892_000, 27_535_424, 30_441_984),
    "base": (182_238_536, 27_535_424, 45_662_976),
    "large": (472_977_152, 43_179_072, 60_883_968),
    "huge": (929_486_848, 43_179_072, 76_104_960),
}

SWIN = {
    "model_type": "swin",
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 2],
    "window_size": 4,
    "out_features": ["stage3"],
}
TIMM = {"model_type": "timm_backbone", "use_pretrained_backbone": False}
TRUNKS = [
    pytest.param(SWIN, 64, [32, 4, 4], id="swin"),
    # its position table fixes the size of the picture
    pytest.param(TIMM | {"backbone": "pit_ti_224", "out_indices": [-1]}, 224, [256, 7, 7], id="pit"),
    pytest.param(TIMM | {"backbone": "tf_efficientnet_lite0", "out_indices": [3]}, 64, [112, 4, 4], id="lite0"),
]


class TestSizes:
    @pytest.mark.parametrize("size", PARAMETERS)
    def test_parameters_of_the_presets(self, size):
        with torch.device("meta"):
            model = MuEForConditionalGeneration(MuEConfig.from_size(size))
        trunk = sum(parameter.numel() for parameter in model.model.encoder.embed_images.parameters())
        counts = (sum(parameter.numel() for parameter in model.parameters()), trunk, model.lm_head.weight.numel())
        assert counts == PARAMETERS[size]

    def test_default_is_base(self):
        assert MuEConfig().to_dict() == MuEConfig.from_size("base").to_dict()

    def test_override(self):
        config = MuEConfig.from_size("tiny", modality_decomposition=False, encoder_layers=2, vocab_size=100)
        assert (config.modality_decomposition, config.encoder_layers, config.vocab_size) == (False, 2, 100)
        assert config.d_model == 256

    @pytest.mark.parametrize(
        ("name", "depths"),
        [("resnet18", [2, 2, 2]), ("resnet50", [3, 4, 6]), ("resnet101", [3, 4, 23]), ("resnet152", [3, 8, 36])],
    )
    def test_trunks_of_ofa(self, name, depths):
        config = MuEConfig(backbone_config=resnet_backbone_kwargs(name))
        assert config.backbone_config.depths == depths and config.backbone_config.out_features == ["stage3"]

    def test_standard_names(self):
        config = tiny_config()
        assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 4, 3)

    def test_unknown_size(self):
        with pytest.raises(ValueError, match=r"`size` must be one of .*'tiny'.*, got 'giant'"):
            MuEConfig.from_size("giant")
        with pytest.raises(ValueError, match=r"`name` must be one of .*'resnet101'.*, got 'resnet34'"):
            resnet_backbone_kwargs("resnet34")


@pytest.mark.parametrize(("backbone", "pixels", "features"), TRUNKS)
def test_trunk(backbone, pixels, features, tmp_path):
    model = MuEForConditionalGeneration(tiny_config(backbone_config=backbone, image_bucket_size=8))
    model = randomize(model, std=0.05).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, pixels, pixels, generator=generator)
    with torch.no_grad():
        assert list(model.model.encoder.embed_images(images).feature_maps[-1].shape[1:]) == features
        logits = model(pixel_values=images, input_ids=torch.tensor([[5, 6]])).logits
        assert logits.shape == (1, 1, 99) and logits.isfinite().all()
        assert not torch.equal(logits, model(pixel_values=-images, input_ids=torch.tensor([[5, 6]])).logits)
        model.save_pretrained(tmp_path)
        loaded = MuEForConditionalGeneration.from_pretrained(tmp_path)
        again = loaded(pixel_values=images, input_ids=torch.tensor([[5, 6]])).logits
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    # products of tensors that lie elsewhere in memory may differ in the last bit
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)


class TestRules:
    @pytest.mark.parametrize(
        ("field", "value", "rule"),
        [
            ("vocab_size", 0, "at least 1, got 0"),
            ("d_model", -8, "at least 1, got -8"),
            ("encoder_layers", 0, "at least 1, got 0"),
            ("decoder_layers", 0, "at least 1, got 0"),
            ("decoder_ffn_dim", 0, "at least 1, got 0"),
            ("image_bucket_size", 0, "at least 1, got 0"),
            ("token_bucket_size", 2, "at least 4, got 2"),
            ("pad_token_id", -1, "at least 0, got -1"),
            ("dropout", 1.0, r"share in \[0, 1\), got 1.0"),
            ("decoder_drop_path_rate", -0.1, r"share in \[0, 1\), got -0.1"),
            ("dropout", float("nan"), r"share in \[0, 1\), got nan"),
            ("attn_scale_factor", 0, "finite number above 0, got 0"),
            ("init_std", float("inf"), "finite number above 0, got inf"),
            ("d_model", 32.0, "expected int, got float"),
            ("modality_decomposition", "yes", "expected bool, got str"),
        ],
    )
    def test_one_field(self, field, value, rule):
        with pytest.raises(StrictDataclassFieldValidationError, match=rf"(?s)'{field}'.*{rule}"):
            tiny_config(**{field: value})
        config = tiny_config()
        with pytest.raises(StrictDataclassFieldValidationError, match=rf"(?s)'{field}'.*{rule}"):
            setattr(config, field, value)

    @pytest.mark.parametrize(
        ("fields", "rule"),
        [
            ({"encoder_attention_heads": 5}, "`encoder_attention_heads` must divide `d_model`, got 5 heads"),
            ({"decoder_attention_heads": 3}, "`decoder_attention_heads` must divide `d_model`, got 3 heads"),
            ({"token_bucket_size": 9}, "`token_bucket_size` must be even, got 9"),
            ({"max_position_embeddings": 5}, "`max_position_embeddings` must be at least half .* got 5 and 8"),
            ({"image_layers": 0}, r"`image_layers` must lie in \[1, 3\].* got 0"),
            ({"text_layers": 4}, r"`text_layers` must lie in \[1, 3\].* got 4"),
            ({"text_layers": 2, "modality_decomposition": False}, "`text_layers` must be left out .* got 2"),
            ({"eos_token_id": 99}, r"`eos_token_id` must lie in the vocabulary \[0, 99\), got 99"),
            ({"eos_token_id": [2, -1]}, r"`eos_token_id` must lie in the vocabulary \[0, 99\), got -1"),
            ({"decoder_start_token_id": 100}, "`decoder_start_token_id` must lie in the vocabulary"),
            ({"decoder_exit_treshold": 0.9}, r"exit options, got \['decoder_exit_treshold'\]; pass them to"),
            ({"exit_criterion": "never"}, r"must not hold exit options, got \['exit_criterion'\]"),
        ],
        ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
    )
    def test_several_fields(self, fields, rule, tmp_path):
        with pytest.raises(StrictDataclassClassValidationError, match=rf"(?s){rule}"):
            tiny_config(**fields)
        config = tiny_config()
        for name, value in fields.items():
            setattr(config, name, value)
        with pytest.raises(StrictDataclassError, match=rf"(?s){rule}"):
            config.save_pretrained(tmp_path)
        assert not (tmp_path / "config.json").exists()

    def test_exit_options_of_generation_stay_out_of_it(self, tmp_path):
        model = tiny_model()
        model.generation_config.decoder_exit_threshold = 0.9
        model.save_pretrained(tmp_path)
        assert not any("exit" in name for name in MuEConfig.from_pretrained(tmp_path).to_dict())
        assert GenerationConfig.from_pretrained(tmp_path).decoder_exit_threshold == 0.9


class TestSaving:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"modality_decomposition": False, "image_relative_bias": False, "eos_token_id": [2, 3], "dropout": 0},
            {"add_position_embedding": True},
            {"eos_token_id": None},
            {"backbone_config": SWIN, "attn_scale_factor": 3, "activation_function": "relu"},
        ],
        ids=["defaults", "other values", "added positions", "no end", "swin"],
    )
    def test_round_trip(self, fields, tmp_path):
        config = tiny_config(**fields)
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is MuEConfig
        assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}
        assert type(loaded.backbone_config) is type(config.backbone_config)
        assert MuEConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()

    def test_without_an_end_texts_have_all_tokens(self):
        model = tiny_model(eos_token_id=None)
        assert model.generate(**tiny_inputs(2), max_new_tokens=9).shape == (2, 10)

    def test_loaded_config_names_no_pipelines(self, tmp_path):
        config = tiny_config()
        config.save_pretrained(tmp_path)
        assert set(config.to_dict()["custom_pipelines"]) == {"image-to-text", "image-text-to-text"}
        assert not hasattr(MuEConfig.from_pretrained(tmp_path), "custom_pipelines")
