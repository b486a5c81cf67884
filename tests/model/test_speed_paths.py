"""Fast paths against slow ones: biases, trunk, prompt, output head, few rows, batches that shrink, half precision."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import randomize, tiny_inputs, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError
from stack import EXITS, count_calls, generate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

from mue_hf import MuEForConditionalGeneration
from mue_hf.benchmarking.costs import measure_costs
from mue_hf.model import early_exit_mue as exits
from mue_hf.model.costs_mue import device_key, shrinking_pays
from mue_hf.model.criteria_mue import similarity
from mue_hf.model.generation_mue import _ExitRun
from mue_hf.model.layers_mue import MuELinear, relative_bias
from mue_hf.model.memo_mue import WeightMemo, modules_of, weights_of
from mue_hf.model.vision_mue import add_patch_bias, inference_trunk, patch_relative_index, trunk_features

PROMPT = torch.tensor([[5, 17, 23, 8, 2]])
SIZES = {"image": 16, "text": 7, "decoder": 1}


def prompted(batch: int = 3) -> dict:
    """Images with the one prompt that captioning has."""
    return {"pixel_values": tiny_inputs(batch)["pixel_values"], "input_ids": PROMPT.repeat(batch, 1)}


def never_shrink() -> dict:
    costs = {"fixed": 0.0, "per_row": 0.0, "shrink": 1.0}
    return {device_key(torch.device("cpu")): dict.fromkeys(("image", "text", "encoder", "decoder"), costs)}


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
        for _ in range(2):
            # the second time from memory
            with torch.no_grad():
                fast = model.get_encoder()(**inputs)
            torch.testing.assert_close(fast.last_hidden_state, slow.last_hidden_state, rtol=0, atol=1e-13)


class TestTrunk:
    @pytest.fixture
    def trunk(self):
        return tiny_model().model.encoder.embed_images

    @pytest.fixture
    def pixels(self):
        return tiny_inputs(5)["pixel_values"]

    def test_features_and_state_are_those_of_the_trunk(self, trunk, pixels, monkeypatch):
        before = {name: value.clone() for name, value in trunk.state_dict().items()}
        with torch.no_grad():
            folded = inference_trunk(trunk, pixels)
            features = trunk_features(trunk, pixels)
            assert torch.equal(trunk_features(trunk, pixels), features)
            torch.testing.assert_close(features, trunk(pixels).feature_maps[-1], rtol=1e-12, atol=1e-12)
            # as many images at once as memory likes
            monkeypatch.setattr("mue_hf.model.vision_mue.PIXELS_AT_ONCE", 2 * 64 * 64)
            torch.testing.assert_close(trunk_features(trunk, pixels), features, rtol=1e-12, atol=1e-12)
        assert folded is not trunk and not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        after = trunk.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)

    @pytest.mark.parametrize("how", ["in place", "data", "new", "loaded", "statistics", "one value"])
    def test_changed_weights_are_seen(self, trunk, pixels, how):
        with torch.no_grad():
            trunk_features(trunk, pixels)
            convolution = next(m for m in trunk.modules() if isinstance(m, nn.Conv2d))
            if how == "in place":
                convolution.weight.mul_(2)
            elif how == "data":
                # averaged weights are written like this
                for weight in trunk.parameters():
                    weight.data.copy_(weight * 1.5)
            elif how == "new":
                convolution.weight = nn.Parameter(convolution.weight * 2)
            elif how == "loaded":
                trunk.load_state_dict({name: value * 2 for name, value in trunk.state_dict().items()})
            elif how == "statistics":
                trunk.train()(pixels)
                trunk.eval()
            else:
                convolution.weight[0, 0, 0, 0] += 3
            expected = trunk(pixels).feature_maps[-1]
            torch.testing.assert_close(trunk_features(trunk, pixels), expected, rtol=1e-10, atol=1e-10)

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

    def test_trains_and_differentiates_as_itself(self, trunk, pixels):
        assert inference_trunk(trunk, pixels) is trunk
        with torch.no_grad():
            assert inference_trunk(trunk.train(), pixels) is trunk
            assert inference_trunk(trunk.eval().bfloat16(), pixels.bfloat16()) is trunk

    def test_hooks_are_called(self, trunk, pixels):
        calls = []
        with torch.no_grad():
            trunk_features(trunk, pixels)
            outer = trunk.register_forward_hook(lambda *_: calls.append("outer"))
            trunk_features(trunk, pixels)
            outer.remove()
            inner = next(m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d))
            handle = inner.register_forward_hook(lambda *_: calls.append("inner"))
            trunk_features(trunk, pixels)
            handle.remove()
            trunk_features(trunk, pixels)
        assert calls == ["outer", "inner"]

    def test_norms_that_bring_their_activation(self):
        config = {
            "model_type": "timm_backbone",
            "backbone": "tf_efficientnet_lite0",
            "use_pretrained_backbone": False,
            "out_indices": [2],
        }
        model = tiny_model(backbone_config=config, image_bucket_size=8)
        pixels = tiny_inputs(2)["pixel_values"]
        with torch.no_grad():
            trunk = model.model.encoder.embed_images
            assert inference_trunk(trunk, pixels) is not trunk
            expected = trunk(pixels).feature_maps[-1]
            torch.testing.assert_close(trunk_features(trunk, pixels), expected, rtol=1e-10, atol=1e-10)

    def test_a_copy_that_computes_something_else_is_dropped(self, pixels):
        backbone = tiny_model().config.backbone_config.to_dict() | {"depths": [1, 1, 2]}
        trunk = tiny_model(backbone_config=backbone).model.encoder.embed_images
        with torch.no_grad():
            assert inference_trunk(trunk, pixels) is not trunk
            # one convolution before two norms cannot hold both
            pairs = [m for m in trunk.modules() if hasattr(m, "convolution") and hasattr(m, "normalization")]
            first = next(m for m in pairs if m.convolution.weight.shape == pairs[-1].convolution.weight.shape)
            first.convolution = pairs[-1].convolution
            assert first is not pairs[-1] and inference_trunk(trunk, pixels) is trunk

    def test_models_are_saved_copied_and_pickled_without_it(self, tmp_path):
        model, inputs = tiny_model(), prompted()
        expected = generate(model, inputs).sequences
        model.save_pretrained(tmp_path)
        loaded = MuEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert loaded.state_dict().keys() == tiny_model().state_dict().keys()
        for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(twin.model.encoder.prompts) == len(twin.model.encoder.embed_images.folded) == 0
            assert torch.equal(generate(twin, inputs).sequences, expected)

    def test_a_trunk_without_batch_norms(self):
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
        trunk, pixels = model.model.encoder.embed_images, tiny_inputs()["pixel_values"]
        with torch.no_grad():
            assert inference_trunk(trunk, pixels) is trunk
            assert torch.equal(trunk_features(trunk, pixels), trunk(pixels).feature_maps[-1])


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
            first, second = generate(model, inputs, **options), generate(model, inputs, **options)
            depth = int(slow.text_exit_layers[0])
            assert slow.executed_layers["text"] == 3 * 6 * depth
            assert (first.executed_layers["text"], second.executed_layers["text"]) == (5 * depth, 0)
            for output in (first, second):
                assert torch.equal(output.sequences, slow.sequences)
                assert torch.equal(output.text_exit_layers, slow.text_exit_layers)
                assert torch.equal(output.decoder_exit_layers, slow.decoder_exit_layers)

    def test_hooks_see_every_run(self, model):
        generate(model, prompted())
        outputs = []
        calls = count_calls(model, lambda: outputs.append(generate(model, prompted())))
        assert calls["joint"] == outputs[0].executed_layers["text"] == 5 * 3

    @pytest.mark.parametrize("how", ["in place", "data", "loaded", "cast", "embeddings", "attention"])
    def test_changed_weights_are_seen(self, model, how):
        inputs = prompted()
        generate(model, inputs)
        if how == "in place":
            with torch.no_grad():
                model.model.encoder.layers[1].fc2.bias.add_(1)
        elif how == "data":
            for weight in model.parameters():
                weight.data.copy_(weight * 1.1)
        elif how == "loaded":
            model.load_state_dict(tiny_model(std=0.3, seed=5).state_dict())
        elif how == "cast":
            model.float().double()
        elif how == "embeddings":
            model.resize_token_embeddings(120)
            with torch.no_grad():
                model.get_input_embeddings().weight[17] += 1
        else:
            model.set_attn_implementation("eager")
        assert generate(model, inputs).executed_layers["text"] == 15
        twin = copy.deepcopy(model)
        assert torch.equal(generate(model, inputs).sequences, generate(twin, inputs).sequences)

    def test_bounded(self, model):
        encoder = model.get_encoder()
        with torch.no_grad():
            for token in range(40):
                encoder(input_ids=torch.tensor([[5, token + 4]]))
        assert 1 < len(encoder.prompts) <= 16

    def test_not_in_training_nor_where_all_layers_are_asked_for(self, model):
        encoder = model.get_encoder()
        encoder(input_ids=PROMPT).last_hidden_state.sum().backward()
        with torch.no_grad():
            assert len(encoder(input_ids=PROMPT, output_hidden_states=True).hidden_states) == 4
            encoder.train()(input_ids=PROMPT)
        assert len(encoder.prompts) == 0

    def test_inference_tensors_are_not_watched(self):
        with torch.inference_mode():
            model = tiny_model()
        generate(model, prompted())
        assert generate(model, prompted()).executed_layers["text"] == 15

    def test_four_threads_on_one_model(self, model):
        settings = [{}, EXITS, {"text_exit_threshold": -1.1, "num_beams": 3}, {"image_exit_threshold": 0.3}]
        inputs = [prompted(2), prompted(3), prompted(1), tiny_inputs(3)]
        twin = copy.deepcopy(model)
        alone = [generate(twin, x, **options) for x, options in zip(inputs, settings, strict=True)]
        outputs = [[] for _ in settings]

        def work(i: int) -> None:
            for _ in range(4):
                outputs[i].append(generate(model, inputs[i], **settings[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for expected, made in zip(alone, outputs, strict=True):
            assert len(made) == 4
            for output in made:
                assert torch.equal(output.sequences, expected.sequences)
                assert torch.equal(output.text_exit_layers, expected.text_exit_layers)


class Subclass(torch.Tensor):
    """Not a plain tensor, as quantised weights are."""


class TestMemo:
    def test_keeps_the_latest(self):
        memo, weight, made = WeightMemo(2), nn.Linear(2, 2).weight, []

        def make(key):
            return memo.get(key, [weight], lambda: made.append(key) or key)

        assert [make(key) for key in "aabbccab"] == list("aabbccab")
        assert made == list("abcab") and len(memo) == 2
        memo.clear()
        assert len(memo) == 0 and memo.get("a", None, lambda: 1) is None

    @pytest.mark.parametrize("kind", [torch.Tensor, Subclass])
    def test_every_weight_is_watched(self, kind):
        """Fused optimizers and merged adapters write without counting."""
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16) * 15
        weights = [torch.randn(2, 3, dtype=dtype) for dtype in dtypes]
        weights += [torch.tensor(3), torch.empty(0), torch.randn(()), torch.randn(3, 2).T]
        weights = [
            nn.Parameter(weight.as_subclass(kind), requires_grad=weight.is_floating_point()) for weight in weights
        ]
        memo, made = WeightMemo(1), []

        def ask():
            memo.get("a", weights, lambda: made.append(1))
            return len(made)

        assert (ask(), ask()) == (1, 1)
        for number, weight in enumerate(weight for weight in weights if weight.numel()):
            weight.data.add_(1)
            assert ask() == number + 2

    def test_others_in_their_place_are_seen(self):
        memo, weight, made = WeightMemo(1), nn.Parameter(torch.ones(2)), []
        twin = nn.Parameter(weight.detach())
        for weights in ([weight], [weight], [twin], [twin, weight], [twin]):
            memo.get("a", weights, lambda: made.append(1))
        weight.data = torch.ones(2)
        memo.get("a", [weight], lambda: made.append(1))
        memo.get("a", [weight], lambda: made.append(1))
        assert len(made) == 5

    def test_storage_stays_resizable(self):
        """FSDP frees whole weights between their uses."""
        memo, flat, made = WeightMemo(1), torch.ones(5), []
        weight = nn.Parameter(flat[3:])

        def ask():
            return memo.get("a", [weight], lambda: made.append(1) or len(made))

        assert (ask(), ask()) == (1, 1)
        flat.untyped_storage().resize_(0)
        assert ask() is None
        flat.untyped_storage().resize_(20)
        with torch.no_grad():
            flat.fill_(2)
        assert (ask(), ask()) == (2, 2)

    def test_modules_of_a_model(self, model):
        assert set(modules_of(model)) == set(model.modules())
        weights = {id(one) for one in (*model.parameters(), *model.buffers())}
        assert {id(one) for one in weights_of(modules_of(model))} == weights
        around = nn.ModuleDict({"inner": nn.Linear(2, 2), "none": None})
        around.register_module("itself", around)
        assert len(modules_of(around)) == 2

    def test_double_precision_is_not_asked_of_the_device(self):
        """Apple's GPUs have none."""

        class Refuse(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                output = func(*args, **kwargs or {})
                assert not isinstance(output, torch.Tensor) or output.dtype != torch.float64, func
                return output

        with Refuse():
            WeightMemo(1).get("a", [nn.Parameter(torch.randn(2)), torch.tensor(3)], lambda: 1)


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
        monkeypatch.setattr(_ExitRun, "follow_constraint", lambda *_: None)
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


class TestShrinking:
    """Whatever is run in vain, and whenever a decision is read: the same tokens and depths."""

    @pytest.fixture
    def model(self):
        return tiny_model(std=0.3)

    @pytest.fixture(params=["kept", "late", "late and kept"])
    def slow_batches(self, request, monkeypatch):
        """Options and a patch under which rows that left stay in the batch."""
        if "late" in request.param:
            monkeypatch.setattr(exits, "reads_late", lambda device: True)
        return {"exit_costs": never_shrink()} if "kept" in request.param else {}

    @pytest.mark.parametrize("kv", ["project", "copy", "exact"])
    @pytest.mark.parametrize("num_beams", [1, 3], ids=["greedy", "beam"])
    def test_same_tokens_and_depths(self, model, slow_batches, num_beams, kv, monkeypatch):
        inputs = tiny_inputs(5) | {"patch_mask": torch.tensor([True, True, False, True, True])}
        options = {"num_beams": num_beams, "exit_kv": kv, **EXITS}
        outputs = []
        calls = count_calls(model, lambda: outputs.append(generate(model, inputs, **options, **slow_batches)))
        monkeypatch.undo()
        output, expected = outputs[0], generate(model, inputs, **options)
        assert torch.equal(output.sequences, expected.sequences)
        for name in ("image", "text", "decoder"):
            got, wanted = (getattr(x, f"{name}_exit_layers") for x in (output, expected))
            assert torch.equal(got, wanted)
            # what ran in vain counts
            assert output.executed_layers[name] == calls[name] >= expected.executed_layers[name]
        assert output.executed_layers["text"] > expected.executed_layers["text"]

    def test_late_wastes_one_layer_of_each_row_that_left(self, model, monkeypatch):
        inputs = tiny_inputs(5)
        monkeypatch.setattr(exits, "reads_late", lambda device: True)
        output = generate(model, inputs, **EXITS)
        for name, layers in (("image", 3), ("text", 3), ("decoder", 4)):
            depths = getattr(output, f"{name}_exit_layers")
            assert output.executed_layers[name] == SIZES[name] * (depths + (depths < layers).long()).sum()

    def test_states_between_layers(self, model, slow_batches):
        inputs, options = tiny_inputs(4), {"output_hidden_states": True, **EXITS}
        with torch.no_grad():
            got, expected = (model(**inputs, **options, **extra) for extra in (slow_batches, {}))
        for name in ("encoder_hidden_states", "decoder_hidden_states"):
            for a, b in zip(getattr(got, name), getattr(expected, name), strict=True):
                assert torch.equal(a, b)

    def test_nobody_leaves_and_everybody_leaves(self, model, slow_batches):
        for threshold in (1.0, -1.1):
            options = dict.fromkeys(EXITS, threshold)
            output = generate(model, tiny_inputs(), **options, **slow_batches)
            assert torch.equal(output.sequences, generate(model, tiny_inputs(), **options).sequences)

    def test_saved_costs_hold_for_presets(self, model):
        """They are the device's."""
        model.generation_config.exit_presets = {"mine": EXITS}
        at_once = generate(model, tiny_inputs(5), exit_preset="mine")
        model.generation_config.exit_costs = never_shrink()
        kept = generate(model, tiny_inputs(5), exit_preset="mine")
        assert torch.equal(kept.sequences, at_once.sequences)
        assert kept.executed_layers["text"] > at_once.executed_layers["text"]

    def test_what_pays(self):
        cpu, gpu = torch.device("cpu"), torch.device("meta")
        assert shrinking_pays(None, cpu, 1, 1, 1)
        assert not shrinking_pays(None, gpu, 4, 1, 5) and shrinking_pays(None, gpu, 1, 900, 1)
        costs = {device_key(cpu): {"fixed": 1.0, "per_row": 2.0, "shrink": 5.0}}
        assert [shrinking_pays(costs, cpu, rows, 1, layers) for rows, layers in ((1, 2), (1, 3), (3, 1))] == [
            False,
            True,
            True,
        ]

    @pytest.mark.parametrize(
        "costs",
        [
            3,
            {"cpu": 1},
            {"cpu": {"image": {"fixed": 1}}},
            {"cpu": {"image": dict.fromkeys(("fixed", "per_row", "x"), 1)}},
        ]
        + [{"cpu": {"image": {"fixed": 1, "per_row": float("nan"), "shrink": 1}}}],
        ids=str,
    )
    def test_bad_costs(self, model, costs):
        with pytest.raises(ValueError, match=r"`exit_costs` must hold finite seconds.*measure_costs"):
            generate(model, tiny_inputs(), exit_costs=costs)

    @pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "joint"])
    def test_measured_costs_are_kept_with_the_model(self, tmp_path, decompose):
        model = tiny_model(std=0.3, modality_decomposition=decompose)
        model.generation_config.exit_costs = measure_costs(model, (4, 4), 5, (1, 2, 4), repeats=1)
        streams = {"image", "text", "decoder"} if decompose else {"encoder", "decoder"}
        assert set(model.generation_config.exit_costs[device_key(model.device)]) == streams
        model.save_pretrained(tmp_path)
        loaded = MuEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert loaded.generation_config.exit_costs == model.generation_config.exit_costs
        options = {"decoder_exit_threshold": EXITS["decoder_exit_threshold"]}
        output = generate(loaded, tiny_inputs(), **options)
        model.generation_config.exit_costs = None
        assert torch.equal(output.sequences, generate(model, tiny_inputs(), **options).sequences)
        with pytest.raises(ValueError, match="at least two sizes"):
            measure_costs(model, (4, 4), 5, (2, 2))


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
