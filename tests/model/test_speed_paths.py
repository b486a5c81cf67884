"""Fast paths against slow ones: biases, prompt, output head, few rows, half precision, compiled modules."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import randomize, tiny_inputs, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError
from stack import EXITS, count_calls, generate
from torch import nn
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

from mue_hf.model.criteria_mue import similarity
from mue_hf.model.layers_mue import MuELinear, relative_bias
from mue_hf.model.vision_mue import add_patch_bias, patch_relative_index

PROMPT = torch.tensor([[5, 17, 23, 8, 2]])


def prompted(batch: int = 3) -> dict:
    """Images with the one prompt that captioning has."""
    return {"pixel_values": tiny_inputs(batch)["pixel_values"], "input_ids": PROMPT.repeat(batch, 1)}


class TestPatchBias:
    @pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 5), (6, 2)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_is_the_look_up(self, grid, dtype):
        table = nn.Embedding(11 * 11 + 3, 4).to(dtype)
        count = grid[0] * grid[1]
        scores = torch.randn(4, count, count).to(dtype)
        buffer = torch.empty(4, count + 2, count + 2, dtype=dtype)
        out = buffer[:, 1:-1, 1:-1]
        with torch.no_grad():
            add_patch_bias(table.weight, grid, 6, scores, out)
            index = patch_relative_index(*grid, 6, torch.device("cpu"))
            assert torch.equal(out, relative_bias(table, index) + scores)

    @pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "joint"])
    @pytest.mark.parametrize(
        "flags",
        [{}, {"image_relative_bias": False}, {"add_position_embedding": True}],
        ids=["bias", "no bias", "added positions"],
    )
    def test_encoder_is_the_differentiable_one(self, decompose, flags):
        model = tiny_model(std=0.3, modality_decomposition=decompose, **flags)
        inputs = tiny_inputs() | {"patch_mask": torch.tensor([True, False, True])}
        inputs["image_features"] = model.trunk_features(inputs.pop("pixel_values")[:, :, :48]).detach()
        slow = model.get_encoder()(**inputs)
        with torch.no_grad():
            fast = model.get_encoder()(**inputs)
        torch.testing.assert_close(fast.last_hidden_state, slow.last_hidden_state, rtol=0, atol=1e-13)


class TestTrunk:
    @pytest.fixture
    def pixels(self):
        return tiny_inputs(5)["pixel_values"]

    @pytest.mark.parametrize("how", ["whole", "in place", "a part"])
    def test_compiled_ones_are_run(self, pixels, how):
        model, runs = tiny_model(), []

        def backend(graph, inputs):
            return lambda *args: runs.append(1) or graph.forward(*args)

        trunk = model.model.encoder.embed_images
        expected = model.trunk_features(pixels).detach()
        try:
            if how == "whole":
                model.model.encoder.embed_images = torch.compile(trunk, backend=backend)
            else:
                (trunk if how == "in place" else trunk.embedder).compile(backend=backend)
            with torch.no_grad():
                torch.testing.assert_close(model.trunk_features(pixels), expected, rtol=1e-12, atol=1e-12)
        finally:
            torch._dynamo.reset()
        assert runs


class TestPrompt:
    @pytest.fixture
    def model(self):
        return tiny_model(std=0.3)

    def test_is_run_once_for_all_images(self, model):
        inputs = prompted()
        # rows that differ in a token that does not exist are run each by itself
        padded = inputs | {
            "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[7], [8], [9]])], 1),
            "attention_mask": torch.tensor([[1] * 5 + [0]] * 3),
        }
        for options in ({}, EXITS, {"text_exit_threshold": -1.1}):
            slow = generate(model, padded, **options)
            depth = int(slow.text_exit_layers[0])
            assert slow.executed_layers["text"] == 3 * 6 * depth
            for _ in range(2):
                output = generate(model, inputs, **options)
                assert output.executed_layers["text"] == 5 * depth
                assert torch.equal(output.sequences, slow.sequences)
                assert torch.equal(output.text_exit_layers, slow.text_exit_layers)
                assert torch.equal(output.decoder_exit_layers, slow.decoder_exit_layers)

    def test_hooks_see_every_run(self, model):
        outputs = []
        calls = count_calls(model, lambda: outputs.append(generate(model, prompted())))
        assert calls["joint"] == outputs[0].executed_layers["text"] == 5 * 3

    def test_states_of_all_layers_are_those_of_every_row(self, model):
        encoder, ids = model.get_encoder(), prompted()["input_ids"]
        with torch.no_grad():
            once = encoder(input_ids=ids, output_hidden_states=True).hidden_states
            each = encoder(inputs_embeds=encoder.embed_tokens(ids), output_hidden_states=True).hidden_states
        assert len(once) == 4
        for a, b in zip(once, each, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)

    def test_rows_differ_in_training(self):
        model = tiny_model(std=0.3, dropout=0.5).train()
        with torch.no_grad():
            states = model.get_encoder()(input_ids=prompted()["input_ids"]).last_hidden_state
        assert not torch.equal(states[0], states[1])

    def test_four_threads_on_one_model(self, model):
        settings = [{}, EXITS, {"text_exit_threshold": -1.1, "num_beams": 3}, {"image_exit_threshold": 0.3}]
        inputs = [prompted(2), prompted(3), prompted(1), tiny_inputs(3)]
        twin = copy.deepcopy(model)
        alone = [generate(twin, x, **options) for x, options in zip(inputs, settings, strict=True)]
        outputs = [[] for _ in settings]

        def work(i: int) -> None:
            for _ in range(4):
                outputs[i].append(generate(model, inputs[i], **settings[i]))

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
        for expected, made in zip(alone, outputs, strict=True):
            assert len(made) == 4
            for output in made:
                assert torch.equal(output.sequences, expected.sequences)
                assert torch.equal(output.text_exit_layers, expected.text_exit_layers)


class TestHead:
    @pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5, 1), (1, 4), (9, 1), (0, 1)], ids=str)
    @pytest.mark.parametrize(("width", "out"), [(8, 8), (8, 32), (32, 8), (64, 70000)])
    def test_few_rows(self, shape, width, out):
        layer = MuELinear(width, out)
        states = torch.randn(*shape, width)
        expected = nn.functional.linear(states, layer.weight, layer.bias)
        with torch.no_grad():
            assert layer(states).shape == expected.shape
            torch.testing.assert_close(layer(states), expected, rtol=1e-5, atol=1e-5)
        assert layer(states).requires_grad

    @pytest.mark.parametrize("ids", [slice(0, 60), torch.tensor([2, 7, 50])], ids=["text", "few"])
    @pytest.mark.parametrize("resized", [False, True])
    def test_other_ids_are_impossible(self, ids, resized):
        model, inputs = tiny_model(), tiny_inputs()
        if resized:
            model.resize_token_embeddings(99, pad_to_multiple_of=4)
        with torch.no_grad():
            full = model(**inputs).logits
            some = model(**inputs, emitted_ids=ids).logits
        kept = torch.zeros(full.shape[-1], dtype=torch.bool)
        kept[ids] = True
        torch.testing.assert_close(some[..., kept], full[..., kept], rtol=0, atol=1e-12)
        assert (some[..., ~kept] == -torch.inf).all() and some.shape == full.shape

    @pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beam", "sample"])
    def test_codes_and_bins_are_never_emitted(self, mode, monkeypatch):
        free, model = (tiny_model(std=0.3, text_vocab_size=size) for size in (None, 15))
        inputs = tiny_inputs()
        assert generate(free, inputs, **mode).sequences.max() >= 15
        torch.manual_seed(0)
        fast = generate(model, inputs, output_scores=True, **mode)
        assert fast.sequences.max() < 15 and fast.scores[0].shape[-1] == 99
        # the slow way: every logit, and the others struck out
        monkeypatch.setattr(type(model.lm_head), "takes_ids", False)
        torch.manual_seed(0)
        slow = generate(model, inputs, output_scores=True, **mode)
        assert torch.equal(fast.sequences, slow.sequences)
        for a, b in zip(fast.scores, slow.scores, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert model(**inputs).logits.isfinite().all()

    def test_the_default_knows_ofas_vocabulary(self):
        config = tiny_model().config
        assert config.num_text_tokens == 99
        config.vocab_size = 59457
        assert config.num_text_tokens == 50265
        config.vocab_size = 59460
        assert config.num_text_tokens == 59460
        with pytest.raises(StrictDataclassClassValidationError, match=r"`text_vocab_size` must lie in \[1, 99\]"):
            tiny_model(text_vocab_size=100)

    @pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beam", "sample"])
    def test_a_constraint_may_allow_codes_and_bins(self, mode):
        model, inputs = tiny_model(std=0.3, text_vocab_size=40), tiny_inputs()

        def allowed(batch_id, ids):
            return [7, 60 + batch_id, 80] if len(ids) % 2 else [9, 11, 70 + int(ids[-1]) % 4]

        options = {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": 6, **mode}
        output = generate(model, inputs, **options)
        for row, ids in enumerate(output.sequences):
            for length in range(1, len(ids)):
                assert ids[length] in (*allowed(row, ids[:length]), 1, 2)
        assert (output.sequences >= 40).any()

    @pytest.mark.parametrize(
        "mode",
        [{}, {"num_beams": 3, "renormalize_logits": True}, {"num_beams": 3}, {"do_sample": True, "top_k": 2}],
        ids=["greedy", "renormalised beam", "beam", "sample"],
    )
    def test_a_constraint_says_what_is_computed(self, mode, monkeypatch):
        # bins are allowed where the constraint says so
        model, inputs, asked = tiny_model(std=0.3, text_vocab_size=40), tiny_inputs(), []

        def allowed(batch_id, ids):
            asked.append((batch_id, *ids.tolist()))
            return [7, 60 + batch_id, 80] if len(ids) % 2 else [9, 11, 70 + int(ids[-1]) % 4]

        options = {"prefix_allowed_tokens_fn": allowed, "no_repeat_ngram_size": 3, "max_new_tokens": 6, **mode}
        rows = []
        handle = model.lm_head.register_forward_hook(lambda m, args, output: rows.append(len(args)))
        torch.manual_seed(0)
        fast = generate(model, inputs, **options)
        handle.remove()
        restricted = "num_beams" not in mode or "renormalize_logits" in mode
        assert set(rows) == {2 if restricted else 1}
        assert not restricted or len(asked) == len(set(asked))
        monkeypatch.setattr("mue_hf.model.generation_mue.MASKING", ())
        torch.manual_seed(0)
        slow = generate(model, inputs, **options)
        assert torch.equal(fast.sequences, slow.sequences)
        if mode.get("num_beams"):
            torch.testing.assert_close(fast.sequences_scores, slow.sequences_scores, rtol=0, atol=1e-6)

    def test_a_constraint_of_the_user_stays_as_it_is(self):
        model, inputs, tokens = tiny_model(std=0.3), tiny_inputs(), []

        def allowed(batch_id, ids):
            return tokens

        constraint = PrefixConstrainedLogitsProcessor(allowed, 1)
        for token in (7, 9):
            tokens[:] = [token]
            output = generate(model, inputs, logits_processor=LogitsProcessorList([constraint]), max_new_tokens=1)
            assert output.sequences[:, -1].tolist() == [token] * 3
        assert constraint._prefix_allowed_tokens_fn is allowed

    def test_all_logits_where_they_are_asked_for(self):
        model, inputs = tiny_model(std=0.3), tiny_inputs()
        options = {"prefix_allowed_tokens_fn": lambda batch_id, ids: [7, 9]}
        output = generate(model, inputs, output_logits=True, **options)
        assert all(logits.isfinite().all() for logits in output.logits)
        assert torch.equal(output.sequences, generate(model, inputs, **options).sequences)


def test_similarity_of_masked_states_is_that_of_the_states_alone():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 6, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 0]).unsqueeze(1)
    expected = [similarity(a[i : i + 1, :n], b[i : i + 1, :n]) for i, n in enumerate((6, 4, 1))]
    torch.testing.assert_close(similarity(a, b, mask)[:3], torch.cat(expected), rtol=0, atol=1e-14)
    assert similarity(a, b, mask)[3] == 0


@pytest.mark.parametrize("num_beams", [1, 3], ids=["greedy", "beam"])
@pytest.mark.parametrize("kv", ["project", "copy", "exact"])
def test_bfloat16(num_beams, kv):
    inputs = tiny_inputs(dtype=torch.bfloat16)
    model = randomize(tiny_model(), std=0.3).to(torch.bfloat16)
    output = generate(model, inputs, num_beams=num_beams, exit_kv=kv, **EXITS)
    assert output.sequences.shape[0] == 3 and output.decoder_exit_layers.min() >= 0
    exact = tiny_model(std=0.3, dtype=torch.float32)
    with torch.no_grad():
        a, b = model(**inputs).logits.float(), exact(**tiny_inputs(dtype=torch.float32)).logits
    assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("works", [True, False], ids=["compiler", "no compiler"])
def test_compiled_layers_keep_exits(works):
    """Layers are the segments between exit points. Tracing is what can go wrong here; code is not generated."""

    def compiler(graph, inputs):
        if not works:
            raise RuntimeError("no compiler")
        return graph.forward

    model, inputs = tiny_model(std=0.3, decoder_layers=2), tiny_inputs()
    options = {"decoder_exit_threshold": [0.4, None], "max_new_tokens": 2}
    expected = generate(model, inputs, **options)
    assert len(expected.decoder_exit_layers.unique()) > 1
    try:
        with torch._dynamo.config.patch(suppress_errors=not works):
            for layer in model.model.decoder.layers:
                layer.compile(backend=compiler, dynamic=True)
            output = generate(model, inputs, **options)
    finally:
        torch._dynamo.reset()
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.decoder_exit_layers, expected.decoder_exit_layers)
