"""What other libraries do with a model: offload it, compile it, put it on meta, draft with it, misspell its inputs."""

from collections import Counter

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import tiny_inputs, tiny_model
from stack import EXITS, generate

from mue_hf import MuECache

KV = ("project", "copy", "exact")


@pytest.fixture
def model():
    return tiny_model(std=0.3)


def assert_same(output, expected) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    for stream in ("image", "text", "decoder"):
        assert torch.equal(output[f"{stream}_exit_layers"], expected[f"{stream}_exit_layers"])


class TestOffload:
    @staticmethod
    def offloaded(model, how, folder):
        if how == "cpu":
            return cpu_offload(model, execution_device="cpu", offload_buffers=True)
        if how == "disk":
            disk_offload(model, str(folder), execution_device="cpu", offload_buffers=True)
            return model
        # as "auto" splits: some blocks here, some on disk
        places = {name: "cpu" for name, _ in model.model.encoder.named_children()}
        places = {f"model.encoder.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
        places |= {f"model.decoder.{name}": "disk" for name, _ in model.model.decoder.named_children()}
        places |= {"model.shared": "cpu", "model.decoder.embed_tokens": "cpu"}
        return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)

    @pytest.mark.parametrize("options", [{}, EXITS], ids=["full depth", "exits"])
    @pytest.mark.parametrize("num_beams", [1, 3])
    @pytest.mark.parametrize("how", ["cpu", "disk", "split"])
    def test_generate(self, model, tmp_path, how, num_beams, options):
        inputs = tiny_inputs()
        expected = generate(model, inputs, num_beams=num_beams, **options)
        assert not options or len(expected.decoder_exit_layers.unique()) > 1
        model = self.offloaded(model, how, tmp_path)
        assert any(weight.is_meta for weight in model.parameters())
        assert_same(generate(model, inputs, num_beams=num_beams, **options), expected)

    @pytest.mark.parametrize("kv", KV)
    def test_keys_of_skipped_layers(self, model, tmp_path, kv):
        expected = generate(model, tiny_inputs(), exit_kv=kv, **EXITS)
        model = self.offloaded(model, "disk", tmp_path)
        assert_same(generate(model, tiny_inputs(), exit_kv=kv, **EXITS), expected)

    @pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "joint"])
    def test_forward_and_answers(self, tmp_path, decompose):
        model, inputs = tiny_model(std=0.3, modality_decomposition=decompose), tiny_inputs()
        with torch.no_grad():
            logits, scores = model(**inputs).logits, model.score_answers([[5], [6, 7]], **inputs)
            model = self.offloaded(model, "cpu", tmp_path)
            torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=1e-12)
            torch.testing.assert_close(model.score_answers([[5], [6, 7]], **inputs), scores, rtol=0, atol=1e-12)

    def test_nothing_is_folded(self, model, tmp_path):
        assert self.offloaded(model, "cpu", tmp_path).fold_batch_norms() == 0


class TestAssistedGeneration:
    @pytest.fixture
    def assistant(self):
        return tiny_model(std=0.3, decoder_layers=2, encoder_layers=2)

    @pytest.mark.parametrize(
        "inputs", [tiny_inputs(1), {"pixel_values": tiny_inputs(1)["pixel_values"]}], ids=["both", "image"]
    )
    def test_another_model(self, model, assistant, inputs):
        expected = model.generate(**inputs, max_new_tokens=8)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, assistant_model=assistant), expected)

    @pytest.mark.parametrize("layers", [1, 3])
    def test_its_own_first_layers(self, model, layers):
        inputs, calls = tiny_inputs(1), Counter()
        expected = model.generate(**inputs, max_new_tokens=8)
        for index, layer in enumerate(model.get_decoder().layers):
            layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
        output = model.generate(**inputs, max_new_tokens=8, assistant_early_exit=layers)
        assert torch.equal(output, expected)
        # drafts run the first layers alone
        assert calls[0] == calls[layers - 1] > calls[layers] == calls[3]

    def test_exits_of_the_encoder_alone(self, model, assistant):
        exits = {name: value for name, value in EXITS.items() if "decoder" not in name}
        expected = model.generate(**tiny_inputs(1), max_new_tokens=8, **exits)
        output = model.generate(**tiny_inputs(1), max_new_tokens=8, assistant_model=assistant, **exits)
        assert torch.equal(output, expected)

    def test_exits_of_the_decoder_are_refused(self, model, assistant):
        with pytest.raises(ValueError, match="the decoder cannot exit early; drop the assistant"):
            model.generate(**tiny_inputs(1), max_new_tokens=8, assistant_model=assistant, **EXITS)


class TestForward:
    @pytest.mark.parametrize("method", ["generate", "forward", "encoder"])
    def test_attentions_need_eager(self, model, method):
        call = {"generate": model.generate, "forward": model, "encoder": model.get_encoder()}[method]
        options = {"return_dict_in_generate": True, "max_new_tokens": 3} if method == "generate" else {}
        with pytest.raises(
            ValueError, match=r"needs eager attention, got 'sdpa'; call `model.set_attn_implementation"
        ):
            call(**tiny_inputs(), output_attentions=True, **options)

    @pytest.mark.parametrize("name", ["image_feature", "pixel_value", "mask"])
    def test_unknown_inputs_are_refused(self, model, name):
        for one in (model, model.model):
            with pytest.raises(ValueError, match=f"`{name}` must be an input of the model"):
                one(**tiny_inputs(), **{name: None})

    def test_presets(self, model):
        model.generation_config.exit_presets = {"mine": EXITS}
        with torch.no_grad():
            named, written = model(**tiny_inputs(), exit_preset="mine"), model(**tiny_inputs(), **EXITS)
            assert torch.equal(named.logits, written.logits)
            assert torch.equal(named.decoder_exit_layers, written.decoder_exit_layers)
            shallow = model(**tiny_inputs(), exit_preset="mine", exit_criterion="fixed", decoder_exit_layer=1)
            assert shallow.decoder_exit_layers.tolist() == [1, 1, 1]
            assert model.model(**tiny_inputs(), exit_preset="paper-captioning").image_exit_layers is not None
        with pytest.raises(ValueError, match="`exit_preset` must name a preset of this model"):
            model(**tiny_inputs(), exit_preset="yours")

    def test_meta(self):
        model = tiny_model().to("meta")
        inputs = {name: value.to("meta") for name, value in tiny_inputs().items()}
        ids = torch.zeros(3, 4, dtype=torch.long, device="meta")
        output = model(**inputs, decoder_input_ids=ids, decoder_attention_mask=torch.ones_like(ids))
        assert output.logits.shape == (3, 4, 99) and output.logits.is_meta

    def test_without_a_cache_the_encoder_may_exit(self, model):
        exits = {name: value for name, value in EXITS.items() if "decoder" not in name}
        expected = generate(model, tiny_inputs(), **exits)
        assert_same(generate(model, tiny_inputs(), use_cache=False, **exits), expected)
        with pytest.raises(ValueError, match="exits of the decoder in `generate` need the cache"):
            generate(model, tiny_inputs(), use_cache=False, **EXITS)

    def test_layers_of_the_cache(self, model):
        cache = MuECache(model.config)
        assert len(cache) == len(cache.layers) == 4 and cache.is_croppable and not cache.is_compileable
        cache = generate(model, tiny_inputs(), **EXITS).cache
        assert [layer.keys.shape[0] for layer in cache.layers[:1]] == [3]
        assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False] * 4


class TestAnswers:
    def test_a_warm_up_of_generation_leaves_them_their_exits(self, model):
        answers = [[5], [6, 7]]
        without = model.score_answers(answers, **tiny_inputs(), return_dict=True, **EXITS)
        warmed = model.score_answers(answers, **tiny_inputs(), return_dict=True, exit_warmup=0.5, **EXITS)
        assert torch.equal(warmed.decoder_exit_layers, without.decoder_exit_layers)
        assert without.decoder_exit_layers.min() < 4

    @pytest.mark.parametrize("answers", [["yes", "no"], [5, 6], [[5], [99]], [[5], [-1]], [[5], ["a"]]], ids=str)
    def test_what_is_no_list_of_ids(self, model, answers):
        with pytest.raises(ValueError, match=r"`answers` must be lists of token ids in \[0, 99\).*encode_answers"):
            model.score_answers(answers, **tiny_inputs())


@pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "joint"])
def test_compiled_whole(decompose):
    """A graph that breaks at every layer takes minutes and looks like a hang: without exits there is one."""
    model, graphs = tiny_model(std=0.3, modality_decomposition=decompose), []
    inputs = tiny_inputs() | {"decoder_input_ids": torch.randint(4, 99, (3, 6))}
    expected = model(**inputs).logits

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    try:
        with torch.no_grad():
            logits = torch.compile(model, backend=count)(**inputs).logits
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    # torch 2.6 cannot trace some of Python's types
    assert len(graphs) <= (1 if torch.__version__ >= "2.13" else 16)
