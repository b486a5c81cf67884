"""The FLOP count against torch's counter on a model that runs, and its parts against slow arithmetic."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mue_hf import MuEConfig, MuEForConditionalGeneration
from mue_hf.inference.depths import Depths, layers_skipped
from mue_hf.inference.flops import FlopCount, caption_flops, filled_layers, full_depth_flops, trunk_flops
from mue_hf.model.agreement_mue import blank_fit

TRUNK = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "out_features": ["stage2"],
}


def make_config(**overrides):
    fields = {
        "vocab_size": 50,
        "d_model": 32,
        "encoder_layers": 3,
        "decoder_layers": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 80,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 64,
        "token_bucket_size": 16,
        "image_bucket_size": 10,
        "backbone_config": TRUNK,
    }
    return MuEConfig(**fields | overrides)


def make_model(config):
    torch.manual_seed(0)
    model = MuEForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    # torch's counter follows modules through the graph, which `generate` does not build.
    model.requires_grad_(False)
    # A model that never says </s> gives as many tokens as it is asked for.
    model.generation_config.suppress_tokens = [config.eos_token_id]
    return model


def count(config, model, **options):
    """Runs one caption; returns its depths, our count and torch's."""
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64), "input_ids": torch.tensor([[0, 5, 6, 7, 8, 2]])}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    tokens = options["max_new_tokens"]
    with FlopCounterMode(display=False) as counter:
        output = model.generate(**inputs, min_new_tokens=tokens, return_dict_in_generate=True, **options)
    trunk, channels, image_tokens = trunk_flops(model, (3, 64, 64))
    depths = output.decoder_exit_layers[0].tolist()
    parts = caption_flops(
        config,
        depths,
        image_tokens=image_tokens,
        text_tokens=6,
        image_exit_layers=int(output.image_exit_layers[0]),
        text_exit_layers=int(output.text_exit_layers[0]),
        channels=channels,
        max_tokens=tokens,
        trunk=trunk,
        beams=options.get("num_beams", 1),
        exit_kv=options.get("exit_kv", "project"),
        criterion=options.get("exit_criterion", "similarity"),
        rescore=options.get("exit_rescore", False),
        candidates=len(options.get("exit_candidates", ())) or None,
    )
    return depths, sum(parts.values()), counter.get_total_flops()


@pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "joint"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("exits", [False, True], ids=["full", "exits"])
def test_counts_what_torch_counts(decomposed, beams, exits):
    config = make_config(modality_decomposition=decomposed)
    options = {"num_beams": beams, "max_new_tokens": 6}
    if exits:
        streams = {"image_exit_layer": 2, "text_exit_layer": 1} if decomposed else {"encoder_exit_layer": 2}
        options |= {"exit_criterion": "fixed", "decoder_exit_layer": 2} | streams
    _, ours, theirs = count(config, make_model(config), **options)
    assert ours == theirs


@pytest.mark.parametrize("exits", [{}, {"exit_criterion": "fixed", "decoder_exit_layer": 2}], ids=["full", "exits"])
def test_counts_hypotheses_that_are_scored_anew(exits):
    config = make_config(text_vocab_size=30)
    _, ours, theirs = count(config, make_model(config), num_beams=3, max_new_tokens=6, exit_rescore=True, **exits)
    assert ours == theirs


@pytest.mark.parametrize("policy", ["project", "copy", "exact"])
@pytest.mark.parametrize(("criterion", "threshold"), [("similarity", 0.78), ("confidence", 0.3)])
def test_counts_tokens_of_different_depths(policy, criterion, threshold):
    config = make_config()
    model = make_model(config).double()
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    torch.manual_seed(3)
    options = {"exit_kv": policy, "exit_criterion": criterion, "decoder_exit_threshold": threshold}
    depths, ours, theirs = count(config, model, max_new_tokens=12, **options)
    assert sum(filled_layers(depths)) > 0
    # Tokens that catch up in one batch attend to places that lie after them, masked but multiplied.
    assert ours == pytest.approx(theirs, rel=1e-3 if policy == "exact" else 0)


@pytest.mark.parametrize("criterion", ["similarity", "confidence"])
def test_counts_the_rows_of_the_head_that_are_computed(criterion):
    config = make_config(text_vocab_size=30)
    options = {"exit_criterion": criterion, "decoder_exit_threshold": 0.99, "max_new_tokens": 4}
    _, ours, theirs = count(config, make_model(config), **options)
    assert ours == theirs


def test_fused_attention_of_a_trunk_counts():
    trunk = {"model_type": "dinov2", "image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2}
    trunk |= {"num_attention_heads": 4, "out_features": ["stage2"]}
    model = make_model(make_config(backbone_config=trunk))
    found = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation({"backbone_config": attention})
        found[attention] = trunk_flops(model, (3, 64, 64))
    assert found["sdpa"] == found["eager"]


SIZES = {"image_tokens": 16, "text_tokens": 6, "channels": 8, "max_tokens": 12}
DEPTHS = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@given(DEPTHS)
def test_filled_layers_are_those_that_a_later_token_reaches(depths):
    expected = [max([0, *(later - depth for later in depths[i + 1 :])]) for i, depth in enumerate(depths)]
    assert filled_layers(depths) == expected


@given(DEPTHS, st.integers(1, 3), st.integers(1, 3))
def test_exits_never_cost_more_than_full_depth(depths, image_exit_layers, text_exit_layers):
    config = make_config()
    ran = caption_flops(
        config, depths, image_exit_layers=image_exit_layers, text_exit_layers=text_exit_layers, trunk=100, **SIZES
    )
    full = full_depth_flops(config, len(depths), trunk=100, **SIZES)
    assert ran.keys() == full.keys()
    assert all(ran[part] <= full[part] for part in ran if part != "fill")
    assert sum(ran.values()) <= sum(full.values())


def test_key_value_policies_order():
    totals = [
        caption_flops(make_config(), [1, 4, 1, 3], image_exit_layers=3, text_exit_layers=3, exit_kv=policy, **SIZES)[
            "fill"
        ]
        for policy in ("copy", "project", "exact")
    ]
    assert totals[0] == 0 < totals[1] < totals[2]


def test_criteria_that_need_intermediate_logits_pay_for_them():
    sizes = {"image_exit_layers": 3, "text_exit_layers": 3, **SIZES}
    similarity = caption_flops(make_config(), [1, 4], **sizes)
    confidence = caption_flops(make_config(), [1, 4], criterion="confidence", **sizes)
    # Intermediate logits once for the first token, three times for the second, which needs none after its last layer.
    assert confidence["head"] == similarity["head"] * (2 + 4) // 2


@pytest.mark.parametrize("criterion", ["margin", "agreement"])
def test_a_list_of_tokens_costs_its_own_rows(criterion):
    config = make_config()
    model = make_model(config)
    options = {"exit_criterion": criterion, "decoder_exit_threshold": 0.99, "exit_candidates": list(range(20))}
    if criterion == "agreement":
        options["exit_fit"] = blank_fit(4, range(20), None)
    depths, ours, theirs = count(config, model, max_new_tokens=4, **options)
    assert depths == [4] * 4
    assert ours == theirs
    head, text = (
        FlopCount(model, one)((3, 64, 64), 6, Depths(3, 3, (4, 1)))[0]["head"]
        for one in (options, {"exit_criterion": "never"})
    )
    # three looks at the first token and one at the second
    looked_at = 4 * 20 if criterion == "margin" else 2 * 20 + 2 * 16
    assert head - text == 2 * config.d_model * looked_at


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="`exit_kv` must be"):
        caption_flops(make_config(), [1], image_exit_layers=1, text_exit_layers=1, exit_kv="keep", **SIZES)


@pytest.mark.parametrize(
    ("depths", "image", "text", "expected"),
    [
        ([4, 4], 3, 3, 0.0),
        ([2, 2], 3, 3, 2 / 7),
        ([4], 1, 2, 1.5 / 7),
        ([], 3, 3, 0.0),
        ([4, 4], 0, 3, 0.0),
        ([4], 1, 0, 2 / 7),
    ],
    ids=["none", "decoder", "encoder", "empty", "no image", "no text"],
)
def test_layers_skipped(depths, image, text, expected):
    """A stream that an output lacks does not count as skipped."""
    assert layers_skipped(make_config(), Depths(image, text, tuple(depths))) == pytest.approx(expected)
