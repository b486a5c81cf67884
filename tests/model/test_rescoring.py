"""`exit_rescore` against beam search itself, against hypotheses scored one by one, and what it refuses."""

import pytest
import torch
from conftest import tiny_inputs, tiny_model
from stack import EXITS, count_calls, generate
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mue_hf.model.scoring_mue import answer_trie

# so many tokens end a sequence that hypotheses differ in length
ENDS = [2, 5, 9, 14, 33, 40, 41, 42, 43, 57, 61, 70, 88]
DECODER = {"decoder_exit_threshold": EXITS["decoder_exit_threshold"], "exit_kv": "exact"}
PROMPTS = {
    "decoder_input_ids": torch.tensor([[1, 1, 0], [0, 8, 31], [1, 0, 17]]),
    "decoder_attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]),
}
ANSWERS = [[7], [8, 9], [8, 30, 11]]


@pytest.fixture(scope="module")
def model():
    return tiny_model(std=0.3)


def beams(model, inputs=None, **options):
    options = {"num_beams": 4, "eos_token_id": ENDS, "output_scores": True} | options
    return generate(model, inputs or tiny_inputs(), **options)


def hypotheses(output) -> list[list[int]]:
    """New tokens of each sequence, up to its end."""
    lengths = (output.decoder_exit_layers > 0).sum(1).tolist()
    new = output.sequences[:, output.sequences.shape[1] - output.decoder_exit_layers.shape[1] :].tolist()
    return [ids[:length] for ids, length in zip(new, lengths, strict=True)]


def assert_same(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.beam_indices, expected.beam_indices)
    assert torch.equal(output.decoder_exit_layers, expected.decoder_exit_layers)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-6)


class Constraint:
    """What `ANSWERS` allow, and what was asked."""

    def __init__(self):
        self.trie, self.asked = answer_trie(ANSWERS, 2), []

    def __call__(self, batch_id, prefix):
        self.asked.append((batch_id, *prefix.tolist()))
        # a search with more beams than answers also asks about prefixes that it does not keep
        return self.trie.get(tuple(prefix[1:].tolist()), [2])


class TestWithoutExits:
    """All scores are those of full depth already."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_return_sequences": 3},
            {"early_stopping": True, "length_penalty": 0.0},
            {"length_penalty": -1.0, "num_return_sequences": 2},
            {"no_repeat_ngram_size": 1, "min_new_tokens": 3},
            {"repetition_penalty": 1.4, "renormalize_logits": True},
            {"forced_eos_token_id": 2, "exponential_decay_length_penalty": (2, 1.5)},
            {"use_cache": False},
            {"cache_implementation": "static"},
            PROMPTS,
            {"eos_token_id": None, "pad_token_id": 1},
        ],
        ids=lambda options: " ".join(options) or "beams",
    )
    def test_is_beam_search(self, model, options):
        assert_same(beams(model, exit_rescore=True, **options), beams(model, **options))

    def test_of_a_vocabulary_with_codes(self):
        model = tiny_model(std=0.3, text_vocab_size=80)
        assert_same(beams(model, exit_rescore=True), beams(model))

    @pytest.mark.parametrize("renormalize", [False, True])
    @pytest.mark.parametrize("num_beams", [2, 5], ids=["fewer beams than answers", "more"])
    def test_under_a_constraint(self, model, num_beams, renormalize):
        outputs, constraints = [], [Constraint(), Constraint()]
        for rescore, constraint in zip((False, True), constraints, strict=True):
            options = {"num_beams": num_beams, "num_return_sequences": min(num_beams, 3), "exit_rescore": rescore}
            options |= {"eos_token_id": 2, "renormalize_logits": renormalize, "prefix_allowed_tokens_fn": constraint}
            outputs.append(beams(model, **options))
        assert_same(outputs[1], outputs[0])
        # nothing but the search is asked about, above all no sequence that has ended
        assert {*constraints[1].asked} <= {*constraints[0].asked}

    def test_what_is_no_hypothesis_comes_last(self, model):
        options = {"num_beams": 5, "num_return_sequences": 5, "eos_token_id": 2, "exit_rescore": True}
        output = beams(model, prefix_allowed_tokens_fn=Constraint(), **options)
        found = [hypotheses(output)[start : start + 3] for start in (0, 5, 10)]
        assert all(sorted(some) == [[*answer, 2] for answer in ANSWERS] for some in found)
        ended = output.sequences_scores.unflatten(0, (3, 5)).isfinite()
        assert ended[:, :3].all() and not ended[:, 3:].any()


class TestScores:
    @pytest.mark.parametrize("prompts", [{}, PROMPTS], ids=["start token", "prompts"])
    @pytest.mark.parametrize("penalty", [1.0, 0.6])
    def test_are_those_of_each_hypothesis_alone(self, model, penalty, prompts):
        inputs = tiny_inputs()
        options = {"length_penalty": penalty, "num_return_sequences": 4, **DECODER, **prompts}
        searched, output = beams(model, **options), beams(model, exit_rescore=True, **options)
        assert len({len(tokens) for tokens in hypotheses(output)}) > 1
        changed = 0
        for row in range(3):
            of = slice(4 * row, 4 * row + 4)
            found = hypotheses(output)[of]
            assert sorted(found) == sorted(hypotheses(searched)[of])
            changed += found != hypotheses(searched)[of]
            scores = output.sequences_scores[of]
            assert torch.equal(scores, scores.sort(descending=True).values)
            encoded, prompt = self.alone(model, inputs, row), self.prompt(prompts, row)
            expected = [self.score(model, encoded, prompt, tokens, penalty) for tokens in found]
            torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=1e-6)
        # otherwise this would say nothing
        assert changed

    @staticmethod
    def alone(model, inputs, row):
        length = int(inputs["attention_mask"][row].sum())
        texts = {name: inputs[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return model.get_encoder()(**texts, pixel_values=inputs["pixel_values"][row : row + 1])

    @staticmethod
    def prompt(prompts, row) -> list[int]:
        if not prompts:
            return [0]
        return prompts["decoder_input_ids"][row, prompts["decoder_attention_mask"][row].bool()].tolist()

    @staticmethod
    def score(model, encoded, prompt, tokens, penalty) -> float:
        """One token after the other, at full depth, without cache, batch and padding."""
        total = 0.0
        for step, token in enumerate(tokens):
            ids = torch.tensor([[*prompt, *tokens[:step]]])
            with torch.no_grad():
                logits = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits
            total += logits[0, -1].log_softmax(-1)[token].item()
        return total / len(tokens) ** penalty

    def test_the_head_runs_in_pieces(self, model, monkeypatch):
        expected = beams(model, exit_rescore=True, **DECODER)
        monkeypatch.setattr("mue_hf.model.rescoring_mue.LOGITS", 2 * 12 * 99)
        assert_same(beams(model, exit_rescore=True, **DECODER), expected)

    def test_depths_are_those_of_the_search(self, model):
        options = {"num_return_sequences": 4, **DECODER}
        searched, output = beams(model, **options), beams(model, exit_rescore=True, **options)

        def by_hypothesis(found):
            depths = [[x for x in row if x] for row in found.decoder_exit_layers.tolist()]
            return sorted(zip(hypotheses(found), depths, strict=True))

        for start in (0, 4, 8):
            assert by_hypothesis(output)[start] == by_hypothesis(searched)[start]
        assert by_hypothesis(output) == by_hypothesis(searched)

    def test_the_pass_is_counted(self, model):
        outputs = []
        for rescore in (False, True):

            def run(rescore=rescore):
                outputs.append(beams(model, exit_rescore=rescore, **DECODER))

            assert count_calls(model, run)["decoder"] == outputs[-1].executed_layers["decoder"]
        # four layers, three images with four beams, and as many tokens as the longest hypothesis has
        longest = max(map(len, hypotheses(beams(model, num_return_sequences=4, **DECODER))))
        extra = outputs[1].executed_layers["decoder"] - outputs[0].executed_layers["decoder"]
        assert extra == 4 * 12 * longest

    def test_sequences_alone(self, model):
        expected = beams(model, exit_rescore=True, **DECODER).sequences
        options = {"return_dict_in_generate": False, "output_scores": False, "exit_rescore": True}
        assert torch.equal(beams(model, **options, **DECODER), expected)


class Streamer(BaseStreamer):
    put = end = lambda self, *args: None


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 1}, "`num_beams=1` makes this greedy search; pass more beams, or drop"),
            ({"num_beams": 1, "do_sample": True}, "`do_sample=True`; pass `do_sample=False`, or drop"),
            ({"do_sample": True}, "pass `do_sample=False`, or drop `exit_rescore`"),
            ({"num_beams": 1, "streamer": Streamer()}, "drop the streamer, or drop `exit_rescore`"),
            ({"streamer": Streamer()}, "drop the streamer"),
            ({"exit_rescore": 1}, "`exit_rescore` must be True or False, got 1"),
            ({"exit_criterion": "never"}, r"`exit_rescore` \(got True\) contradicts `exit_criterion='never'`"),
        ],
        ids=["greedy", "sampling", "beam sampling", "streamer", "streamer of beams", "number", "never"],
    )
    def test_before_the_encoder_runs(self, model, options, message):
        handle = model.get_encoder().register_forward_pre_hook(lambda *args: pytest.fail("the encoder ran"))
        try:
            with pytest.raises(ValueError, match=message):
                generate(model, tiny_inputs(), **{"num_beams": 4, "exit_rescore": True} | options)
        finally:
            handle.remove()

    def test_without_a_search(self, model):
        with pytest.raises(ValueError, match="`exit_rescore` must be left out of `forward`"):
            model(**tiny_inputs(), exit_rescore=True)
        with pytest.raises(ValueError, match="`exit_rescore` must be left out of `score_answers`"):
            model.score_answers(ANSWERS, **tiny_inputs(), exit_rescore=True)


class TestSources:
    def test_presets_and_configs(self):
        model = tiny_model(std=0.3)
        expected = beams(model, exit_rescore=True, **DECODER)
        assert not torch.equal(expected.sequences, beams(model, **DECODER).sequences)
        config = GenerationConfig(**model.generation_config.to_diff_dict() | {"exit_rescore": True, **DECODER})
        assert_same(beams(model, generation_config=config), expected)
        model.generation_config.exit_presets = {"anew": {"exit_rescore": True, **DECODER}}
        assert_same(beams(model, exit_preset="anew"), expected)
        model.generation_config.exit_preset = "anew"
        assert_same(beams(model), expected)
        assert_same(beams(model, exit_rescore=False), beams(tiny_model(std=0.3), **DECODER))
        # the off switch is the plain model
        assert_same(beams(model, exit_criterion="never"), beams(tiny_model(std=0.3)))
        # there it rests
        scores = model.score_answers(ANSWERS, **tiny_inputs())
        assert torch.equal(scores, tiny_model(std=0.3).score_answers(ANSWERS, **tiny_inputs(), **DECODER))
