"""`generate` with exits: every decoding mode, options from every source, answers, and what is refused."""

import pytest
import torch
from conftest import tiny_inputs, tiny_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from mue_hf import MuECache
from mue_hf.model.early_exit_mue import ExitSchedule
from mue_hf.model.generation_mue import MuEGenerateBeamOutput, MuEGenerateOutput

EXITS = {
    "image_exit_threshold": [0.27, 0.815, 2.0],
    "text_exit_threshold": [0.3, 0.76, 2.0],
    "decoder_exit_threshold": [0.66, 0.815, 0.835, 2.0],
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(std=0.3)


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 6, "return_dict_in_generate": True} | kwargs)


@pytest.mark.parametrize("stream", ["image", "text"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_depths_of_other_rows_are_refused(model, stream, count):
    depths = torch.ones(count, dtype=torch.long)
    with pytest.raises(ValueError, match=f"must hold one depth per row of its stream, 3, got {count}; pass as many"):
        generate(model, tiny_inputs(), exit_criterion="fixed", **{f"{stream}_exit_layer": depths})


class TestModes:
    @pytest.mark.parametrize(
        "mode",
        [
            {},
            {"do_sample": True, "top_k": 20},
            {"num_beams": 3},
            {"num_beams": 3, "do_sample": True},
            {"num_beams": 4, "num_return_sequences": 3},
            {"do_sample": True, "num_return_sequences": 2},
            {"cache_implementation": "static"},
            {"num_beams": 3, "cache_implementation": "static"},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_beams": 2},
            {"min_new_tokens": 4, "eos_token_id": [2, 7]},
            {"forced_eos_token_id": 2},
        ],
        ids=lambda mode: " ".join(mode) or "greedy",
    )
    def test_depths_belong_to_the_returned_sequences(self, model, mode):
        torch.manual_seed(0)
        output = generate(model, tiny_inputs(), **EXITS, **mode)
        beam = mode.get("num_beams", 1) > 1
        assert isinstance(output, MuEGenerateBeamOutput if beam else MuEGenerateOutput)
        per_sample = mode.get("num_return_sequences", 1)
        assert output.sequences.shape[0] == 3 * per_sample
        depths = output.decoder_exit_layers
        assert depths.shape == (3 * per_sample, output.sequences.shape[1] - 1)
        assert output.image_exit_layers.shape == output.text_exit_layers.shape == (3,)
        # a depth for every token up to the end of its sequence, and none after
        for sequence, row in zip(output.sequences[:, 1:].tolist(), depths.tolist(), strict=True):
            ends = [i for i, token in enumerate(sequence) if token in mode.get("eos_token_id", [2])]
            length = ends[0] + 1 if ends else len(sequence)
            assert all(1 <= depth <= 4 for depth in row[:length])
            assert all(depth == 0 for depth in row[length:])

    @pytest.mark.parametrize("kv", ["project", "copy", "exact"])
    def test_static_is_dynamic(self, model, kv):
        inputs = tiny_inputs()
        outputs = [
            generate(model, inputs, exit_kv=kv, num_beams=3, cache_implementation=kind, **EXITS)
            for kind in (None, "static", "dynamic")
        ]
        outputs.append(generate(model, inputs, exit_kv=kv, num_beams=3, cache=MuECache(model.config, 2, kv), **EXITS))
        for output in outputs[1:]:
            assert torch.equal(output.sequences, outputs[0].sequences)
            assert torch.equal(output.decoder_exit_layers, outputs[0].decoder_exit_layers)

    def test_streamer(self, model):
        class Collect(BaseStreamer):
            def __init__(self):
                self.tokens, self.ended = [], False

            def put(self, value):
                self.tokens += value.flatten().tolist()

            def end(self):
                self.ended = True

        streamer, inputs = Collect(), {name: value[:1] for name, value in tiny_inputs().items()}
        output = generate(model, inputs, streamer=streamer, **EXITS)
        assert streamer.tokens == output.sequences[0].tolist() and streamer.ended

    def test_prefix_constraint(self, model):
        allowed = {0: [11, 12], 1: [13, 14], 2: [15, 16]}
        for beams in (1, 2):
            output = generate(
                model,
                tiny_inputs(),
                num_beams=beams,
                prefix_allowed_tokens_fn=lambda batch_id, ids: [*allowed[batch_id], 2],
                **EXITS,
            )
            for row, sequence in enumerate(output.sequences[:, 1:].tolist()):
                assert set(sequence) <= {*allowed[row], 2, 1}

    def test_nothing_extra_unless_asked(self, model):
        inputs = tiny_inputs()
        assert isinstance(generate(model, inputs, return_dict_in_generate=False, **EXITS), torch.Tensor)
        assert "decoder_exit_layers" not in model(**inputs)
        assert "decoder_exit_layers" in model(**inputs, **EXITS)
        assert "image_exit_layers" in model(**inputs, output_exit_layers=True)

    def test_pictures_alone_and_text_alone(self, model):
        inputs = tiny_inputs()
        image = generate(model, {"pixel_values": inputs["pixel_values"]}, **EXITS)
        assert image.text_exit_layers.tolist() == [0, 0, 0] and image.executed_layers["text"] == 0
        text = generate(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, **EXITS)
        assert text.image_exit_layers.tolist() == [0, 0, 0] and text.executed_layers["image"] == 0
        assert (text.text_exit_layers > 0).all()

    def test_encoder_outputs_are_reused(self, model):
        inputs = tiny_inputs()
        with torch.no_grad():
            encoded = model.get_encoder()(**inputs)
        again = generate(model, {"encoder_outputs": encoded}, num_beams=2)
        assert torch.equal(again.sequences, generate(model, inputs, num_beams=2).sequences)

    def test_prompt_lookup_without_exits(self, model):
        inputs = {name: value[:1] for name, value in tiny_inputs().items()}
        prompt = {"decoder_input_ids": torch.tensor([[0, 5, 6, 5, 6, 5]])}
        plain = generate(model, inputs | prompt)
        drafted = generate(model, inputs | prompt, prompt_lookup_num_tokens=2)
        assert torch.equal(plain.sequences, drafted.sequences)


class TestLoop:
    def test_processors_that_want_more_are_refused_as_in_transformers(self, model):
        class Wanting(LogitsProcessor):
            def __call__(self, input_ids, scores, more):
                return scores

        with pytest.raises(ValueError, match="Make sure that all the required parameters"):
            generate(model, tiny_inputs(), logits_processor=LogitsProcessorList([Wanting()]))

    def test_saved_options_are_not_copied_and_those_of_the_call_come_first(self, model):
        saved, before = model.generation_config, dict(vars(model.generation_config))
        presets = {"mine": {"decoder_exit_threshold": 0.5}, "other": {"decoder_exit_threshold": 0.7}}
        saved.exit_presets, saved.exit_min_layers = presets, 2
        try:
            passed = GenerationConfig(exit_min_layers=3, max_new_tokens=4)
            for given, layers in ((None, 2), (passed, 3)):
                config, _ = model._prepare_generation_config(given, exit_preset="mine", num_beams=2)
                assert config.exit_presets is presets and config.num_beams == 2
                assert config.exit_min_layers == layers and config._exit_options.decoder_exit_threshold == 0.5
            assert saved.exit_presets is presets and saved.exit_min_layers == 2
        finally:
            vars(saved).clear()
            vars(saved).update(before)


class TestSchedule:
    def test_theta_reaches_every_step(self, model):
        seen = []

        class Spy(LogitsProcessor):
            def __call__(self, input_ids, scores):
                seen.append(input_ids.shape[1])
                return scores

        # beta 0 leaves exp(-tau t / N) alone: above every cosine at first, below every cosine at the end
        options = {"decoder_exit_threshold": 0.5, "exit_decay_beta": 0.0, "exit_decay_tau": 50.0}
        output = generate(model, tiny_inputs(), logits_processor=LogitsProcessorList([Spy()]), **options)
        assert seen == [1, 2, 3, 4, 5, 6]
        depths = output.decoder_exit_layers
        assert (depths[:, 0] == 4).all() and (depths[:, -1] == 1).all()
        assert ExitSchedule(model_policy(options, model), 1, 6).policy(1).thresholds[0] == 1.0

    def test_warm_up(self, model):
        output = generate(model, tiny_inputs(), decoder_exit_threshold=-1.1, exit_warmup=0.5)
        assert output.decoder_exit_layers.tolist() == [[4, 4, 4, 1, 1, 1]] * 3

    def test_time_starts_after_the_decoder_prompt(self, model):
        prompt = {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]] * 3)}
        output = generate(model, tiny_inputs() | prompt, decoder_exit_threshold=-1.1, exit_warmup=0.5)
        assert output.decoder_exit_layers.tolist() == [[4, 4, 4, 1, 1, 1]] * 3

    def test_forward_takes_the_step(self, model):
        inputs = tiny_inputs()
        options = {"decoder_exit_threshold": -1.1, "exit_warmup": 0.5}
        model.generation_config.max_new_tokens = 6
        try:
            depths = [model(**inputs, exit_step=t, **options).decoder_exit_layers[0].item() for t in range(6)]
        finally:
            model.generation_config.max_new_tokens = None
        assert depths == [4, 4, 4, 1, 1, 1]


def model_policy(options, model):
    from mue_hf import ExitOptions

    return ExitOptions.from_dict(options, model.config).policy("decoder", 4)


class TestCriteria:
    @pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy"])
    def test_output_criteria(self, model, criterion):
        inputs = tiny_inputs()
        easy, never = (2.0, -1.0) if criterion == "entropy" else (-1.0, 2.0)
        for threshold, depth in ((easy, 1), (never, 4)):
            output = generate(model, inputs, exit_criterion=criterion, decoder_exit_threshold=threshold)
            assert output.decoder_exit_layers.unique().tolist() == [depth]

    def test_confidence_is_the_softmax_of_that_depth(self, model):
        inputs = tiny_inputs(batch=6)
        with torch.no_grad():
            full = model(**inputs, output_hidden_states=True)
            layers = [model.model.decoder.layer_norm(h[:, -1]) for h in full.decoder_hidden_states[1:]]
            confidence = torch.stack([model.lm_head(h).softmax(-1).amax(-1) for h in layers])
        # between two rows, so that rounding does not decide
        threshold = confidence[0].sort().values[2:4].mean().item()
        expected = [next((i + 1 for i in range(3) if confidence[i, row] > threshold), 4) for row in range(6)]
        output = model(**inputs, exit_criterion="confidence", decoder_exit_threshold=threshold)
        assert output.decoder_exit_layers.tolist() == expected and len(set(expected)) > 1

    def test_patience_and_fixed(self, model):
        inputs = tiny_inputs()
        patient = generate(model, inputs, exit_criterion="patience", exit_patience=1)
        assert patient.decoder_exit_layers.min() >= 2
        fixed = generate(
            model, inputs, exit_criterion="fixed", decoder_exit_layer=3, image_exit_layer=1, text_exit_layer=2
        )
        assert fixed.decoder_exit_layers.unique().tolist() == [3]
        assert fixed.image_exit_layers.tolist() == [1] * 3 and fixed.text_exit_layers.tolist() == [2] * 3

    def test_minimum_depth(self, model):
        thresholds = dict.fromkeys(EXITS, -1.1)
        output = generate(model, tiny_inputs(), exit_min_layers=2, **thresholds)
        assert output.decoder_exit_layers.unique().tolist() == [2]
        assert output.image_exit_layers.unique().tolist() == [2]

    def test_depths_drawn_per_sample_in_training(self):
        model = tiny_model(std=0.3).train()
        inputs = tiny_inputs()
        depths = torch.tensor([1, 3, 2])
        labels = torch.randint(4, 99, (6, 5))
        output = model(**inputs, labels=labels, exit_criterion="fixed", image_exit_layer=depths)
        assert output.image_exit_layers.tolist() == [1, 3, 2]
        output.loss.backward()
        assert model.model.encoder.layers[2].fc1.weight.grad.abs().sum() > 0


class TestSources:
    def test_generation_config(self, model):
        inputs = tiny_inputs()
        expected = generate(model, inputs, **EXITS)
        passed = generate(model, inputs, generation_config=GenerationConfig(max_new_tokens=6, **EXITS))
        assert torch.equal(passed.decoder_exit_layers, expected.decoder_exit_layers)
        own = tiny_model(std=0.3)
        own.generation_config.update(**EXITS)
        for name, value in EXITS.items():
            setattr(own.generation_config, name, value)
        assert torch.equal(generate(own, inputs).decoder_exit_layers, expected.decoder_exit_layers)
        off = generate(own, inputs, exit_criterion="never")
        assert off.decoder_exit_layers.unique().tolist() == [4]
        off = generate(own, inputs, generation_config=GenerationConfig(max_new_tokens=6, exit_criterion="never"))
        assert off.decoder_exit_layers.unique().tolist() == [4]
        deeper = generate(own, inputs, decoder_exit_threshold=1.0)
        assert deeper.decoder_exit_layers.unique().tolist() == [4]
        assert torch.equal(deeper.image_exit_layers, expected.image_exit_layers)

    def test_preset_of_the_model(self, model):
        own = tiny_model(std=0.3)
        own.generation_config.exit_presets = {"fast": {"decoder_exit_threshold": -1.1}}
        output = generate(own, tiny_inputs(), exit_preset="fast")
        assert output.decoder_exit_layers.unique().tolist() == [1]
        generate(own, tiny_inputs(), exit_preset="paper-captioning")

    def test_config_object_is_left_alone(self, model):
        config = GenerationConfig(max_new_tokens=4, **EXITS)
        before = config.to_dict()
        generate(model, tiny_inputs(), generation_config=config)
        assert config.to_dict() == before and not hasattr(config, "_exit_options")


class TestAnswers:
    ANSWERS = [[7], [9, 11], [9, 12, 13], [9, 12]]

    @pytest.mark.parametrize("prompted", [False, True], ids=["start token", "prompts of mixed lengths"])
    def test_scores_are_teacher_forced_softmax_over_allowed_tokens(self, model, prompted):
        inputs, prompts = tiny_inputs(), [[0]] * 3
        extra = {}
        if prompted:
            prompts = [[0, 21, 22], [0], [0, 31]]
            ids, mask = torch.ones(3, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long)
            for row, prompt in enumerate(prompts):
                ids[row, 3 - len(prompt) :], mask[row, 3 - len(prompt) :] = torch.tensor(prompt), 1
            extra = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        scores = model.score_answers(self.ANSWERS, **inputs, **extra)
        allowed = {(): [7, 9], (9,): [11, 12], (9, 12): [2, 13]}
        for row, prompt in enumerate(prompts):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            for column, answer in enumerate(self.ANSWERS):
                with torch.no_grad():
                    logits = model(**one, decoder_input_ids=torch.tensor([prompt + answer])).logits[0]
                expected = 0.0
                for i, token in enumerate([*answer, 2]):
                    options = allowed.get(tuple(answer[:i]), [token])
                    at = logits[len(prompt) - 1 + i]
                    expected += (at[token] - at[options].logsumexp(-1)).item()
                assert scores[row, column].item() == pytest.approx(expected, abs=1e-10)

    def test_single_token_answers_take_one_pass_per_sample(self, model):
        output = model.score_answers([[5], [6], [7]], **tiny_inputs(), **EXITS, return_dict=True)
        assert output.scores.exp().sum(-1).tolist() == pytest.approx([1, 1, 1])
        assert output.decoder_exit_layers.shape == (3, 1)
        assert output.executed_layers["decoder"] == output.decoder_exit_layers.sum()

    def test_exits_apply_and_can_be_switched_off(self, model):
        own = tiny_model(std=0.3)
        own.generation_config.decoder_exit_threshold = -1.1
        inputs = tiny_inputs()
        saved = own.score_answers(self.ANSWERS, **inputs, return_dict=True)
        assert saved.decoder_exit_layers.unique().tolist() == [1]
        off = own.score_answers(self.ANSWERS, **inputs, exit_criterion="never")
        torch.testing.assert_close(off, model.score_answers(self.ANSWERS, **inputs), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("answers", "message"),
        [([], "at least one"), ([[5], []], "no empty one"), ([[5], [5]], "differ"), ([[500]], r"in \[0, 99\)")],
        ids=["none", "empty", "repeated", "outside"],
    )
    def test_bad_answers(self, model, answers, message):
        with pytest.raises(ValueError, match=message):
            model.score_answers(answers, **tiny_inputs())

    def test_misspelt_option(self, model):
        with pytest.raises(ValueError, match="did you mean `decoder_exit_threshold`"):
            model.score_answers([[5], [6]], **tiny_inputs(), decoder_exit_treshold=0.5)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"decoder_exit_treshold": 0.9}, "did you mean `decoder_exit_threshold`"),
            ({"decoder_exit_threshold": float("nan")}, "must be a finite number"),
            ({"decoder_exit_threshold": 0.9, "use_cache": False}, "need the cache"),
            ({"encoder_exit_threshold": 0.9}, "needs `modality_decomposition=False`"),
            ({"decoder_exit_threshold": 0.9, "prompt_lookup_num_tokens": 2}, "assisted generation"),
            ({"cache_implementation": "offloaded"}, "must be None, 'dynamic' or 'static'"),
            ({"exit_preset": "nowhere"}, "must name a preset"),
            ({"generation_config": GenerationConfig(exit_treshold=0.9)}, "is not an exit option"),
            ({"not_an_option": 1}, "not_an_option"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_options(self, model, options, message):
        inputs = {name: value[:1] for name, value in tiny_inputs().items()}
        calls = []
        handle = model.get_encoder().register_forward_pre_hook(lambda *args: calls.append(1))
        try:
            with pytest.raises(ValueError, match=message):
                generate(model, inputs, **options)
        finally:
            handle.remove()
        # before any work is lost; the cache comes after the encoder in transformers' order
        assert not calls or "cache_implementation" in options

    def test_cache_of_another_policy(self, model):
        with pytest.raises(ValueError, match="`exit_kv='copy'` contradicts the cache"):
            generate(model, tiny_inputs(), exit_kv="copy", cache=MuECache(model.config), **EXITS)

    def test_right_padded_prompts(self, model):
        prompt = torch.tensor([[0, 5, 1]] * 3)
        mask = torch.tensor([[1, 1, 0]] * 3)
        with pytest.raises(ValueError, match="padded on the left"):
            generate(model, tiny_inputs() | {"decoder_input_ids": prompt, "decoder_attention_mask": mask})

    def test_stock_cache(self, model):
        from transformers import DynamicCache

        with pytest.raises(ValueError, match="must be a MuECache, got DynamicCache"):
            model(**tiny_inputs(), cache=DynamicCache())


class TestInputs:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: {"input_ids": x["input_ids"] + 95}, r"in the vocabulary \[0, 99\)"),
            (lambda x: {"input_ids": x["input_ids"] - 50}, "in the vocabulary"),
            (lambda x: {"input_ids": x["input_ids"][0]}, r"shape \[batch, length\]"),
            (
                lambda x: {"input_ids": x["input_ids"].repeat(1, 20), "attention_mask": None},
                "`max_position_embeddings` is 64",
            ),
            (lambda x: {"input_ids": x["input_ids"][:, :0], "attention_mask": None}, "holds no token"),
            (lambda x: {"attention_mask": x["attention_mask"][:, :3]}, "`attention_mask` must have the shape"),
            (lambda x: {"pixel_values": x["pixel_values"][:2]}, r"batch of texts \(3\).*images \(2\)"),
            (lambda x: {"pixel_values": x["pixel_values"][0]}, r"\[batch, 3, height, width\]"),
            (lambda x: {"pixel_values": x["pixel_values"].repeat(1, 1, 2, 2)}, "8 x 8 patches.*6 x 6"),
            (lambda x: {"patch_mask": torch.ones(2, dtype=torch.bool)}, "one value per image"),
            (lambda x: {"pixel_values": None, "patch_mask": torch.ones(3)}, "none was passed"),
            (lambda x: {"image_features": torch.zeros(3, 16, 4, 4).double()}, "not both"),
            (lambda x: {"pixel_values": None, "image_features": torch.zeros(3, 5, 4, 4)}, r"\[batch, 16, rows"),
            (lambda x: {"input_ids": None, "attention_mask": None, "pixel_values": None}, "nothing to encode"),
            (lambda x: {"decoder_input_ids": torch.zeros(2, 4, dtype=torch.long)}, "2 rows for 3 encoded samples"),
            *(
                (
                    lambda x, length=length: {"decoder_input_ids": torch.full((3, length), 99)},
                    "`decoder_input_ids` must lie in the vocabulary",
                )
                for length in (1, 4)
            ),
            (lambda x: {"decoder_input_ids": torch.zeros(3, 70, dtype=torch.long)}, "decoder sequence has 70 tokens"),
            (lambda x: {"decoder_input_ids": torch.zeros(3, 0, dtype=torch.long)}, "holds no token"),
            (
                lambda x: {"decoder_input_ids": torch.zeros(3, 4).long(), "decoder_attention_mask": torch.ones(3, 3)},
                "`decoder_attention_mask` must have the shape",
            ),
            (lambda x: {"encoder_outputs": (torch.zeros(3, 4, 32),)}, "must be what `model.get_encoder"),
            (lambda x: {"output_attentions": True}, "needs eager attention"),
            (lambda x: {"decoder_exit_treshold": 0.5}, "did you mean"),
        ],
    )
    def test_bad_inputs(self, model, change, message):
        inputs = tiny_inputs()
        with pytest.raises(ValueError, match=message):
            model(**inputs | change(inputs))

    def test_full_caches_refuse_other_rows(self, model):
        inputs = tiny_inputs()
        output = model(**inputs, decoder_input_ids=torch.tensor([[0]] * 3))
        with pytest.raises(ValueError, match="holds 3 rows, but `decoder_input_ids` has 6"):
            model(**inputs, decoder_input_ids=torch.tensor([[0]] * 6), cache=output.cache)


class TestCache:
    def test_grows_crops_and_repeats(self, model):
        inputs = tiny_inputs()
        ids = torch.randint(4, 99, (3, 40), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected = model(**inputs, decoder_input_ids=ids).logits
            cache = MuECache(model.config, 4)
            encoded = model.get_encoder()(**inputs)

            def step(a, b):
                return model(encoder_outputs=encoded, decoder_input_ids=ids[:, a:b], cache=cache).logits

            torch.testing.assert_close(step(0, 3), expected[:, :3], rtol=0, atol=1e-12)
            step(3, 20)
            cache.crop(-10)
            assert cache.get_seq_length() == 10
            torch.testing.assert_close(step(10, 11), expected[:, 10:11], rtol=0, atol=1e-12)
            torch.testing.assert_close(step(11, 40), expected[:, 11:], rtol=0, atol=1e-12)
            cache.batch_repeat_interleave(2)
            assert cache.num_rows == 6
        with pytest.raises(ValueError, match="must be negative"):
            cache.crop(3)
        cache.reset()
        assert not cache.is_initialized and cache.get_seq_length() == 0

    @pytest.mark.parametrize("kv", ["project", "copy", "exact"])
    def test_growing_keeps_exit_states(self, model, kv):
        inputs = tiny_inputs()
        outputs = [
            generate(model, inputs, cache=MuECache(model.config, size, kv), exit_kv=kv, max_new_tokens=20, **EXITS)
            for size in (1, 64)
        ]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert torch.equal(outputs[0].decoder_exit_layers, outputs[1].decoder_exit_layers)


@pytest.mark.parametrize("requested", ["sdpa", "eager"])
def test_attention_is_chosen_without_the_trunk(tmp_path, requested):
    from mue_hf import MuEForConditionalGeneration

    tiny_model().save_pretrained(tmp_path)
    loaded = MuEForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=requested)
    assert loaded.config._attn_implementation == requested
    for implementation in ("sdpa", "eager"):
        loaded.set_attn_implementation(implementation)
        assert loaded.config._attn_implementation == implementation
        assert loaded.model.encoder.embed_images.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        loaded.set_attn_implementation("flash_attention_2")


def test_exit_options_and_presets_are_saved_with_the_model(tmp_path):
    from mue_hf import MuEForConditionalGeneration

    model, inputs = tiny_model(std=0.3), tiny_inputs()
    for name, value in EXITS.items():
        setattr(model.generation_config, name, value)
    model.generation_config.exit_presets = {"shallow": {"decoder_exit_threshold": -1.1}}
    model.save_pretrained(tmp_path)
    loaded = MuEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    a, b = (generate(m, inputs) for m in (model, loaded))
    assert torch.equal(a.sequences, b.sequences) and torch.equal(a.decoder_exit_layers, b.decoder_exit_layers)
    assert len(a.decoder_exit_layers.unique()) > 1
    assert generate(loaded, inputs, exit_preset="shallow").decoder_exit_layers.unique().tolist() == [1]
