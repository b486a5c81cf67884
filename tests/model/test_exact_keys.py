"""`exit_kv="exact"`: a token that skipped a layer runs it in a later token's call; all numbers are full depth's."""

import random

import pytest
import torch
from conftest import tiny_inputs, tiny_model
from stack import EXITS, generate

from mue_hf.model.cache_mue import MuECache
from mue_hf.model.criteria_mue import ExitPolicy

LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return tiny_model(std=0.3)


class LayerCalls:
    """How often decoder layers are called, and rows x tokens of these calls."""

    def __init__(self, model):
        self.calls = self.tokens = 0
        self.handles = [layer.register_forward_hook(self._count) for layer in model.get_decoder().layers]

    def _count(self, layer, args, output):
        self.calls, self.tokens = self.calls + 1, self.tokens + args[0].shape[0] * args[0].shape[1]

    def take(self) -> tuple[int, int]:
        taken, self.calls, self.tokens = (self.calls, self.tokens), 0, 0
        return taken

    def remove(self):
        for handle in self.handles:
            handle.remove()


def full_depth(model, encoded, ids, mask) -> torch.Tensor:
    """States after every layer [layers + 1, rows, tokens, d] without a cache, normalised as exit states are."""
    decoder = model.get_decoder()
    output = decoder(encoded, input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return torch.stack([decoder.layer_norm(states) for states in output.hidden_states])


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_exit_states_are_those_of_full_depth(model, seed):
    """Chunks of tokens, a drawn depth for each row, rows that pause, beams that move, tokens that are taken back."""
    draw = random.Random(seed)
    images, beams = draw.randint(1, 3), draw.randint(1, 3)
    rows = images * beams
    encoded = model.get_encoder()(**tiny_inputs(images, seed=seed))
    decoder, cache, calls = model.get_decoder(), MuECache(model.config, 4, "exact"), LayerCalls(model)
    ids, mask = torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, 0, dtype=torch.long)
    moves, total, mixed = draw.random() < 0.5, 0, False
    try:
        for step in range(9):
            count = draw.choice([1, 1, 2, 3])
            ids = torch.cat([ids, torch.tensor([[draw.randint(4, 98) for _ in range(count)] for _ in range(rows)])], 1)
            new = torch.ones(rows, count, dtype=torch.long)
            if step == 0 and count > 1:
                new[draw.randrange(rows), : draw.randrange(count)] = 0  # left padding
            mask = torch.cat([mask, new], 1)
            active = torch.tensor([step > 0 or not moves or draw.random() < 0.8 for _ in range(rows)])
            depths = torch.tensor([LAYERS if step == 8 else draw.randint(1, LAYERS) for _ in range(rows)])
            before = cache.length
            output = decoder(
                encoded,
                input_ids=ids[:, before:],
                attention_mask=mask,
                cache=cache,
                active_rows=active,
                policy=ExitPolicy("fixed", depth=depths),
            )
            depths = depths.where(active, 0)
            assert torch.equal(output.decoder_exit_layers, depths)
            called, executed = calls.take()
            assert called == depths.max()
            assert executed == output.executed_layers["decoder"]
            mixed |= executed > count * depths.sum()
            total += executed
            expected = full_depth(model, encoded, ids, mask)[depths, torch.arange(rows), before:]
            calls.take()
            real = mask[:, before:].bool()
            torch.testing.assert_close(output.last_hidden_state[real], expected[real], rtol=0, atol=1e-10)
            if moves and step < 8:
                source = torch.tensor([r - r % beams + draw.randrange(beams) for r in range(rows)])
                cache.reorder_cache(source)
                ids, mask = ids[source], mask[source]
                if ids.shape[1] > 3 and draw.random() < 0.3:
                    cache.crop(-2)
                    ids, mask = ids[:, :-2], mask[:, :-2]
    finally:
        calls.remove()
    assert mixed
    if not moves:
        # after a last step at full depth, every token has run every layer once
        assert total == LAYERS * ids.numel()


@torch.no_grad()
def test_attention_weights_of_new_tokens():
    """Of all tokens in a layer call, the new ones are reported."""
    model = tiny_model(std=0.3)
    model.set_attn_implementation("eager")
    encoded, decoder = model.get_encoder()(**tiny_inputs()), model.get_decoder()
    ids = torch.randint(4, 99, (3, 6), generator=torch.Generator().manual_seed(3))
    cache = MuECache(model.config, 8, "exact")
    for before, after, depths in ((0, 2, [1, 4, 2]), (2, 3, [2, 4, 1]), (3, 4, [4, 1, 1])):
        policy = ExitPolicy("fixed", depth=torch.tensor(depths))
        decoder(encoded, input_ids=ids[:, before:after], cache=cache, policy=policy)
    last = decoder(encoded, input_ids=ids[:, 4:], cache=cache, output_attentions=True)
    whole = decoder(encoded, input_ids=ids, output_attentions=True)
    assert last.executed_layers["decoder"] > LAYERS * 3 * 2
    for name in ("attentions", "cross_attentions"):
        for weights, expected in zip(last[name], whole[name], strict=True):
            torch.testing.assert_close(weights, expected[:, :, 4:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_sampled_tokens_come_from_states_of_full_depth(model):
    inputs = tiny_inputs(batch=5)
    torch.manual_seed(0)
    exits = {"decoder_exit_threshold": EXITS["decoder_exit_threshold"], "exit_kv": "exact"}
    output = generate(model, inputs, do_sample=True, output_logits=True, max_new_tokens=12, **exits)
    depths = output.decoder_exit_layers
    encoded = model.get_encoder()(**inputs)
    states = full_depth(model, encoded, output.sequences[:, :-1], None)
    assert len(depths.unique()) > 2 and (depths > 0).all()
    for step, logits in enumerate(output.logits):
        expected = model.lm_head(states[depths[:, step], torch.arange(5), step])
        # `generate` keeps logits in single precision
        torch.testing.assert_close(logits, expected.float(), rtol=0, atol=1e-6)


def test_gradients_flow_through_the_new_tokens(model):
    """Rows that miss different numbers of tokens give the gradients that each gives alone."""
    inputs = tiny_inputs(batch=2)
    with torch.no_grad():
        encoded = [model.get_encoder()(**{k: v[rows] for k, v in inputs.items()}) for rows in ([0, 1], [1])]
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    gradients = []
    for encoder_outputs, rows in zip(encoded, ([0, 1], [1]), strict=True):
        decoder, cache = model.get_decoder(), MuECache(model.config, 4, "exact")
        for step, depths in ((0, [1, 4]), (1, [2, 1])):
            policy = ExitPolicy("fixed", depth=torch.tensor(depths)[rows])
            decoder(encoder_outputs, input_ids=ids[rows, step : step + 1], cache=cache, policy=policy)
        embeds = torch.randn(1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        embeds = embeds.expand(len(rows), 1, 32).clone().requires_grad_()
        decoder(encoder_outputs, inputs_embeds=embeds, cache=cache).last_hidden_state[-1].square().sum().backward()
        gradients.append(embeds.grad[-1])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
