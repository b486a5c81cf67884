"""Nothing is stale: after any write to a weight, a buffer or the config, `generate` gives what a deep copy gives."""

import copy

import pytest
import torch
from conftest import tiny_inputs, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stack import EXITS, generate
from torch import nn

WRITES = ("data of one value", "in place", "replaced", "pruned", "cast and back")
# Fields that the forward pass reads, with another legal value.
FIELDS = {
    "attn_scale_factor": 3.0,
    "image_relative_bias": False,
    "add_position_embedding": True,
    "text_vocab_size": 40,
    "token_bucket_size": 8,
    "max_position_embeddings": 60,
    "decoder_start_token_id": 7,
}


def prompted() -> dict:
    """Images with one prompt, as captioning has it."""
    prompt = torch.tensor([[5, 17, 23, 8, 2]]).repeat(2, 1)
    return {"pixel_values": tiny_inputs(2)["pixel_values"], "input_ids": prompt}


def write(model, name: str, how: str) -> None:
    """Changes one tensor of the model, in one of the ways that libraries do."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, own)
    with torch.no_grad():
        if how == "data of one value":
            # folded kernels are laid out channels last, and have no flat view
            tensor.data[(-1,) * tensor.ndim] += 2
        elif how == "in place":
            tensor.mul_(1.5) if tensor.is_floating_point() else tensor.add_(1)
        elif how == "replaced" and isinstance(tensor, nn.Parameter):
            setattr(module, own, nn.Parameter(tensor * 1.5))
        elif how == "pruned":
            tensor.data[(..., slice(None, None, 2)) if tensor.ndim else ()] = 0
        else:
            model.float().double()


@pytest.fixture(scope="module")
def names():
    model = tiny_model()
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


def same_as_a_copy(model, options) -> None:
    got, expected = (generate(one, prompted(), output_logits=True, **options) for one in (model, copy.deepcopy(model)))
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert torch.equal(a, b)
    for stream in ("image", "text", "decoder"):
        assert torch.equal(got[f"{stream}_exit_layers"], expected[f"{stream}_exit_layers"])
    assert got.executed_layers == expected.executed_layers


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), folded=st.booleans(), exits=st.sampled_from([{}, EXITS]))
def test_generate_is_that_of_a_deep_copy(data, folded, exits, names):
    model = tiny_model(std=0.3)
    if folded:
        model.fold_batch_norms()
    generate(model, prompted(), **exits)
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([name for name in names if name in known]))
        write(model, name, data.draw(st.sampled_from(WRITES)))
    field = data.draw(st.sampled_from([None, *FIELDS]))
    if field is not None:
        setattr(model.config, field, FIELDS[field])
    same_as_a_copy(model, exits)


@pytest.mark.parametrize("where", ["layer norm eps", "running mean", "prompt embedding", "position embedding"])
def test_writes_that_were_once_missed(where):
    """Version 0.1 kept the prompt's states, position scores and the trunk between calls."""
    model = tiny_model(std=0.3)
    before = generate(model, prompted(), output_logits=True).logits[0]
    encoder = model.get_encoder()
    if where == "layer norm eps":
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.5
    elif where == "running mean":
        next(value for name, value in model.named_buffers() if "running_mean" in name).data[1] += 3
    elif where == "prompt embedding":
        encoder.embed_tokens.weight.data[17] += 3
    else:
        encoder.embed_image_positions.weight.data[8:12, 3] += 3
    assert not torch.equal(generate(model, prompted(), output_logits=True).logits[0], before)
    same_as_a_copy(model, {})
