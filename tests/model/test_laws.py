"""The laws of early exit, in float64: what is reported was skipped, and nothing else changes."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_inputs, tiny_model
from reference import Row, encoder_stream
from stack import EXITS, count_calls, generate

from mue_hf import ExitOptions
from mue_hf.model.criteria_mue import similarity
from mue_hf.model.layers_mue import text_relative_index
from mue_hf.model.vision_mue import patch_relative_index

NEVER = dict.fromkeys(EXITS, 1.0)


@pytest.fixture(scope="module")
def model():
    return tiny_model(std=0.3)


class TestExitsOff:
    def test_never_taken_is_never(self, model):
        inputs = tiny_inputs()
        plain = generate(model, inputs, output_logits=True)
        for options in ({"exit_criterion": "never"}, NEVER):
            other = generate(model, inputs, output_logits=True, **options)
            assert torch.equal(plain.sequences, other.sequences)
            for a, b in zip(plain.logits, other.logits, strict=True):
                assert torch.equal(a, b)
        assert plain.decoder_exit_layers.unique().tolist() == [4]

    def test_forward_is_the_reference(self, model):
        inputs = tiny_inputs()
        ids = torch.randint(4, 99, (3, 6), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            output = model(**inputs, decoder_input_ids=ids)
            encoder = model.get_encoder()(**inputs)
            for row in range(3):
                valid = encoder.attention_mask[row]
                states = encoder.last_hidden_state[row, valid]
                reference = Row(model, states, encoder.position_embeddings[row, valid], "exact")
                for t, token in enumerate(ids[row].tolist()):
                    logits, _ = reference.push(token, [2.0] * 4)
                    torch.testing.assert_close(output.logits[row, t], logits, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("num_beams", [1, 3])
    @pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "joint"])
    def test_cached_is_uncached(self, num_beams, decompose):
        model, inputs = tiny_model(std=0.3, modality_decomposition=decompose), tiny_inputs()
        cached = generate(model, inputs, num_beams=num_beams)
        uncached = generate(model, inputs, num_beams=num_beams, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)

    def test_sdpa_is_eager(self, model):
        inputs, ids = tiny_inputs(), torch.randint(4, 99, (3, 6))
        eager = tiny_model(std=0.3)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            a, b = (m(**inputs, decoder_input_ids=ids) for m in (model, eager))
            torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-12)
            weights = eager(**inputs, decoder_input_ids=ids, output_attentions=True)
        assert [tuple(x.shape) for x in weights.encoder_attentions] == [(3, 4, 23, 23)] * 3
        assert weights.encoder_attentions[0][:, :, :16, 16:].abs().max() == 0
        assert [tuple(x.shape) for x in weights.cross_attentions] == [(3, 2, 6, 23)] * 4


class TestCounted:
    @pytest.mark.parametrize("kv", ["project", "copy", "exact"])
    @pytest.mark.parametrize("num_beams", [1, 3], ids=["greedy", "beam"])
    def test_hooks_agree(self, model, num_beams, kv):
        inputs, outputs = tiny_inputs(), []
        options = {"num_beams": num_beams, "exit_kv": kv, **EXITS}
        calls = count_calls(model, lambda: outputs.append(generate(model, inputs, **options)))
        output = outputs[0]
        assert {name: calls[name] for name in output.executed_layers} == output.executed_layers
        assert len(output.image_exit_layers.unique()) > 1
        assert len(output.decoder_exit_layers.unique()) > 1
        assert output.executed_layers["image"] == 16 * output.image_exit_layers.sum()
        assert output.executed_layers["text"] == 7 * output.text_exit_layers.sum()
        if num_beams == 1 and kv != "exact":
            assert output.executed_layers["decoder"] == output.decoder_exit_layers.sum()

    def test_finished_rows_do_not_run(self, model):
        inputs = tiny_inputs(batch=4)
        free = generate(model, inputs)
        # the token that one row says third ends a sequence
        end = free.sequences[0, 3].item()
        outputs = []
        calls = count_calls(model, lambda: outputs.append(generate(model, inputs, eos_token_id=end, pad_token_id=1)))
        depths = outputs[0].decoder_exit_layers
        assert (depths == 0).any()
        assert calls["decoder"] == depths.sum() == outputs[0].executed_layers["decoder"]
        ended = generate(model, inputs, eos_token_id=end, pad_token_id=1, output_scores=True)
        assert torch.equal(ended.sequences, outputs[0].sequences)
        assert torch.equal(ended.decoder_exit_layers, depths)

    def test_joint_stream(self):
        model, inputs, outputs = tiny_model(std=0.3, modality_decomposition=False), tiny_inputs(), []
        options = {"encoder_exit_threshold": [0.28, 0.8, 2.0]}
        calls = count_calls(model, lambda: outputs.append(generate(model, inputs, **options)))
        output = outputs[0]
        assert calls["joint"] == output.executed_layers["image"] + output.executed_layers["text"]
        assert calls["joint"] == 23 * output.image_exit_layers.sum()
        assert torch.equal(output.image_exit_layers, output.text_exit_layers)

    def test_a_sample_without_image_runs_no_image_layer(self, model):
        inputs = tiny_inputs() | {"patch_mask": torch.tensor([True, False, True])}
        outputs = []
        calls = count_calls(model, lambda: outputs.append(generate(model, inputs)))
        assert outputs[0].image_exit_layers.tolist() == [3, 0, 3]
        assert calls["image"] == 2 * 3 * 16

    def test_one_image_for_several_texts_is_encoded_once(self, model):
        inputs = tiny_inputs()
        single = inputs | {"pixel_values": inputs["pixel_values"][:1]}
        repeated = inputs | {"pixel_values": inputs["pixel_values"][:1].expand(3, -1, -1, -1)}
        outputs = []
        calls = count_calls(model, lambda: outputs.append(generate(model, single, **EXITS)))
        expected = generate(model, repeated, **EXITS)
        assert torch.equal(outputs[0].sequences, expected.sequences)
        assert torch.equal(outputs[0].image_exit_layers, expected.image_exit_layers)
        assert calls["image"] * 3 == expected.executed_layers["image"]


class TestAlone:
    @pytest.mark.parametrize("kv", ["project", "copy", "exact"])
    @pytest.mark.parametrize("num_beams", [1, 3], ids=["greedy", "beam"])
    def test_row_alone_is_row_in_batch(self, model, num_beams, kv):
        inputs = tiny_inputs(batch=5)
        options = {"num_beams": num_beams, "exit_kv": kv, **EXITS}
        together = generate(model, inputs, **options)
        assert len(together.decoder_exit_layers.unique()) > 1
        for row in range(5):
            length = int(inputs["attention_mask"][row].sum())
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
            output = generate(model, alone, **options)
            width = output.sequences.shape[1]
            assert torch.equal(output.sequences[0], together.sequences[row, :width])
            assert torch.equal(output.decoder_exit_layers[0], together.decoder_exit_layers[row, : width - 1])
            assert output.image_exit_layers[0] == together.image_exit_layers[row]
            assert output.text_exit_layers[0] == together.text_exit_layers[row]

    @pytest.mark.parametrize("kv", ["project", "exact"])
    def test_decoder_prompts_of_mixed_lengths(self, model, kv):
        inputs = tiny_inputs()
        prompts = [[0, 11, 12, 13], [0, 21], [0, 31, 32]]
        ids, mask = torch.ones(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, 4 - len(prompt) :] = torch.tensor(prompt)
            mask[row, 4 - len(prompt) :] = 1
        options = {"exit_kv": kv, **EXITS}
        prompted = inputs | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        # generate would prepend a start token to prompts that begin with padding in every row
        together = generate(model, prompted, **options)
        for row, prompt in enumerate(prompts):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            output = generate(model, alone | {"decoder_input_ids": torch.tensor([prompt])}, **options)
            assert torch.equal(output.sequences[0, len(prompt) :], together.sequences[row, 4:])
            assert torch.equal(output.decoder_exit_layers[0], together.decoder_exit_layers[row])


class TestRecomputed:
    @pytest.mark.parametrize("kv", ["project", "exact"])
    def test_greedy_is_the_reference(self, model, kv):
        inputs = tiny_inputs()
        output = generate(model, inputs, exit_kv=kv, **EXITS)
        assert len(output.decoder_exit_layers.unique()) > 2
        self._check(model, inputs, output, kv, output.sequences)

    @pytest.mark.parametrize("kv", ["project", "exact"])
    def test_beams_are_the_reference(self, model, kv):
        inputs = tiny_inputs()
        output = generate(
            model,
            inputs,
            exit_kv=kv,
            num_beams=4,
            num_return_sequences=2,
            output_scores=True,
            length_penalty=0.0,
            **EXITS,
        )
        assert len(output.decoder_exit_layers.unique()) > 2
        total = self._check(model, inputs, output, kv, output.sequences)
        torch.testing.assert_close(output.sequences_scores.double(), total, rtol=0, atol=1e-4)

    @staticmethod
    @torch.no_grad()
    def _check(model, inputs, output, kv, sequences):
        encoded = model.get_encoder()(**inputs, exit_options=ExitOptions.from_dict(EXITS, model.config))
        per_sample = len(sequences) // len(inputs["input_ids"])
        totals = []
        for row, sequence in enumerate(sequences.tolist()):
            sample = row // per_sample
            valid = encoded.attention_mask[sample]
            states = encoded.last_hidden_state[sample, valid]
            reference = Row(model, states, encoded.position_embeddings[sample, valid], kv)
            total = 0.0
            for t, (token, following) in enumerate(zip(sequence[:-1], sequence[1:], strict=True)):
                logits, depth = reference.push(token, EXITS["decoder_exit_threshold"])
                assert depth == output.decoder_exit_layers[row, t]
                total += logits.log_softmax(-1)[following]
                if output.get("beam_indices") is None:
                    assert logits.argmax() == following
            totals.append(total)
        return torch.stack(totals)


class TestEncoder:
    def test_streams_are_the_authors_decision_at_batch_1(self, model):
        inputs = {name: value[:1] for name, value in tiny_inputs().items()}
        encoder = model.get_encoder()
        for threshold in (-1.1, 0.3, 0.78, 0.82, 1.0):
            options = {"image_exit_threshold": threshold, "text_exit_threshold": threshold}
            with torch.no_grad():
                output = model(**inputs, output_hidden_states=True, **options)
                image, text = encoder._embed_image(inputs["pixel_values"], None, None), None
                text = encoder._embed_text(inputs["input_ids"], None, None)
                index = (
                    text_relative_index(7, 8, 64, torch.device("cpu")),
                    patch_relative_index(4, 4, 6, torch.device("cpu")),
                )
                expected_image, image_exit_layers = encoder_stream(
                    model,
                    image.states[0],
                    encoder._position_scores(image),
                    encoder.image_rel_pos_table_list,
                    index[1],
                    threshold,
                )
                expected_text, text_exit_layers = encoder_stream(
                    model,
                    text.states[0],
                    encoder._position_scores(text),
                    encoder.token_rel_pos_table_list,
                    index[0],
                    threshold,
                )
            assert (output.image_exit_layers.item(), output.text_exit_layers.item()) == (
                image_exit_layers,
                text_exit_layers,
            )
            expected = encoder.layer_norm(torch.cat([expected_image, expected_text]))
            torch.testing.assert_close(output.encoder_last_hidden_state[0], expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "joint"])
    def test_depth_is_monotone_in_the_threshold(self, decompose):
        model, inputs = tiny_model(std=0.3, modality_decomposition=decompose), tiny_inputs(batch=6)
        names = ("image", "text") if decompose else ("encoder",)
        depths = []
        for threshold in (-1.5, 0.25, 0.3, 0.6, 0.75, 0.8, 0.82, 0.99, 1.0):
            options = {f"{name}_exit_threshold": threshold for name in names}
            with torch.no_grad():
                output = model(**inputs, **options)
            depths.append(torch.stack([output.image_exit_layers, output.text_exit_layers]))
        depths = torch.stack(depths)
        assert (depths.diff(dim=0) >= 0).all()
        assert (depths[0] == 1).all() and (depths[-1] == 3).all() and len(depths.unique()) == 3

    def test_similarity_ignores_padding(self):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        expected = torch.stack(
            [
                torch.cosine_similarity(a[0].view(-1), b[0].view(-1), dim=0),
                torch.cosine_similarity(a[1, :3].reshape(-1), b[1, :3].reshape(-1), dim=0),
            ]
        )
        torch.testing.assert_close(similarity(a, b, mask), expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "joint"])
    def test_added_positions_are_in_the_states(self, decompose):
        plain, model = (
            tiny_model(std=0.3, modality_decomposition=decompose, add_position_embedding=add) for add in (False, True)
        )
        inputs, encoder = tiny_inputs(), model.get_encoder()
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        without, states = (
            one.get_encoder()(**inputs, output_hidden_states=True).hidden_states[0] for one in (plain, model)
        )
        assert not torch.allclose(states, without)
        features = encoder.image_proj(model.trunk_features(inputs["pixel_values"]).flatten(2).transpose(1, 2))
        bucket = model.config.image_bucket_size
        places = torch.tensor([row * bucket + column + 1 for row in range(4) for column in range(4)])
        patches = (
            features + encoder.type_embedding.weight[1] + encoder.image_pos_ln(encoder.embed_image_positions(places))
        )
        words = encoder.embed_tokens(inputs["input_ids"]) + encoder.type_embedding.weight[0]
        words = words + encoder.pos_ln(encoder.embed_positions.weight[:7])
        expected = [encoder.patch_layernorm_embedding(patches), encoder.layernorm_embedding(words)]
        torch.testing.assert_close(states, torch.cat(expected, dim=1), rtol=0, atol=1e-12)

    def test_features_are_pixels(self, model):
        inputs = tiny_inputs()
        with torch.no_grad():
            features = model.trunk_features(inputs["pixel_values"])
        cached = {"image_features": features, **{k: v for k, v in inputs.items() if k != "pixel_values"}}
        assert torch.equal(generate(model, inputs).sequences, generate(model, cached).sequences)


class TestDecoder:
    def test_first_token_is_monotone_in_the_threshold(self, model):
        inputs = tiny_inputs(batch=6)
        depths = []
        for threshold in (-1.5, 0.2, 0.3, 0.5, 0.7, 0.75, 0.78, 0.82, 1.0):
            output = generate(model, inputs, decoder_exit_threshold=threshold, max_new_tokens=1)
            depths.append(output.decoder_exit_layers[:, 0])
        depths = torch.stack(depths)
        assert (depths.diff(dim=0) >= 0).all()
        assert (depths[0] == 1).all() and (depths[-1] == 4).all() and len(depths.unique()) > 2

    @pytest.mark.parametrize("kv", ["project", "copy", "exact"])
    def test_below_minus_one_leaves_after_the_first_layer(self, model, kv):
        thresholds = dict.fromkeys(EXITS, -1.01)
        output = generate(model, tiny_inputs(), exit_kv=kv, **thresholds)
        for name in ("image", "text", "decoder"):
            assert getattr(output, f"{name}_exit_layers").unique().tolist() == [1]

    def test_four_threads_with_their_own_thresholds(self, model):
        inputs = tiny_inputs()
        settings = [EXITS, NEVER, {"decoder_exit_threshold": -1.1}, EXITS | {"exit_kv": "exact"}]
        alone = [generate(model, inputs, **options) for options in settings]
        outputs = {}

        def work(i: int) -> None:
            for _ in range(3):
                outputs[i] = generate(model, inputs, **settings[i])

        with ThreadPoolExecutor(len(settings)) as threads:
            list(threads.map(work, range(len(settings))))
        for i, expected in enumerate(alone):
            assert torch.equal(outputs[i].sequences, expected.sequences)
            assert torch.equal(outputs[i].decoder_exit_layers, expected.decoder_exit_layers)

    def test_cross_keys_are_made_when_a_layer_is_first_reached(self, model):
        made = []
        for layer in model.model.decoder.layers:
            project = layer.cross_attn.k_proj
            made.append(
                project.register_forward_hook(lambda m, args, out, i=layer.layer_idx: rows.append((i, len(args[0]))))
            )
        try:
            rows: list = []
            generate(model, tiny_inputs(), num_beams=3, exit_criterion="fixed", decoder_exit_layer=2)
            assert rows == [(0, 3), (1, 3)]
            rows.clear()
            generate(model, tiny_inputs(), num_beams=3, **EXITS)
            per_layer = Counter()
            for layer, images in rows:
                per_layer[layer] += images
            assert max(per_layer.values()) <= 3
        finally:
            for handle in made:
                handle.remove()
