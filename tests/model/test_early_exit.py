"""The exit decision by itself: options and what is wrong with them, the schedule, each criterion, the layer loop."""

import math

import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.modeling_outputs import Seq2SeqLMOutput

from mue_hf import ExitOptions, MuECache
from mue_hf.model.criteria_mue import (
    CRITERIA,
    Criterion,
    ExitPolicy,
    LayerStates,
    last_valid,
    register_criterion,
    similarity,
)
from mue_hf.model.early_exit_mue import ExitDecider, ExitSchedule, run_stack
from mue_hf.model.exit_options_mue import SHIPPED_PRESETS, resolve_options
from mue_hf.model.modeling_mue import MuESeq2SeqLMOutput

CONFIG = tiny_config()
JOINT = tiny_config(modality_decomposition=False)


def options(**kwargs) -> ExitOptions:
    return ExitOptions.from_dict(kwargs, CONFIG)


class TestOptions:
    def test_default_never_leaves(self):
        assert not options().active
        for stream in ("image", "text", "decoder"):
            assert options().policy(stream, 4).is_never

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"decoder_exit_treshold": 0.9}, "did you mean `decoder_exit_threshold`"),
            ({"decoder_exit_threshold": math.nan}, "must be a finite number.*nan"),
            ({"image_exit_threshold": math.inf}, "must be a finite number.*inf"),
            ({"decoder_exit_threshold": "0.9"}, "must be a finite number"),
            ({"decoder_exit_threshold": True}, "must be a finite number"),
            ({"decoder_exit_threshold": [0.9, 0.9]}, "each of the 4 layers"),
            ({"image_exit_threshold": [0.9, math.nan, 0.9]}, "each of the 3 layers"),
            ({"exit_decay_beta": 1.5}, r"`exit_decay_beta` must be a number in \[0, 1\].*1.5"),
            ({"exit_decay_tau": -1}, "`exit_decay_tau` must be a finite number of at least 0"),
            ({"exit_warmup": 2}, "`exit_warmup` must be a share"),
            ({"exit_criterion": "cosine"}, "`exit_criterion` must be one of"),
            ({"exit_kv": "zeros"}, "`exit_kv` must be one of"),
            ({"exit_min_layers": 0}, "`exit_min_layers` must be an integer from 1 to 4"),
            ({"exit_criterion": "fixed"}, "needs `image_exit_layer` or .* or `decoder_exit_layer`, got none"),
            ({"exit_criterion": "fixed", "decoder_exit_layer": 5}, "from 1 to 4, got 5"),
            ({"exit_criterion": "fixed", "image_exit_layer": 0}, "from 1 to 3, got 0"),
            ({"exit_criterion": "fixed", "decoder_exit_layer": 2.0}, "from 1 to 4, got 2.0"),
            ({"exit_criterion": "fixed", "decoder_exit_layer": 1, "exit_min_layers": 2}, "must not be below"),
            ({"exit_criterion": "fixed", "decoder_exit_layer": 1, "decoder_exit_threshold": 0.9}, "contradicts"),
            ({"decoder_exit_layer": 2}, "contradicts `exit_criterion='similarity'`"),
            ({"exit_criterion": "never", "decoder_exit_threshold": 0.9}, "contradicts `exit_criterion='never'`"),
            ({"exit_criterion": "patience"}, "needs `exit_patience`"),
            ({"exit_patience": 2}, "contradicts"),
            ({"exit_criterion": "patience", "exit_patience": 2, "decoder_exit_threshold": 0.9}, "contradicts"),
            ({"encoder_exit_threshold": 0.9}, "needs `modality_decomposition=False`.*image_exit"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_bad_options(self, given, message):
        with pytest.raises(ValueError, match=message):
            options(**given)

    def test_joint_mode_refuses_stream_options(self):
        with pytest.raises(
            ValueError, match="`image_exit_threshold` needs `modality_decomposition=True`.*encoder_exit"
        ):
            ExitOptions.from_dict({"image_exit_threshold": 0.9}, JOINT)
        assert ExitOptions.from_dict({"encoder_exit_threshold": 0.9}, JOINT).active

    @pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy", "patience"])
    def test_the_encoder_goes_by_similarity(self, criterion):
        extra = {"exit_patience": 1} if criterion == "patience" else {"decoder_exit_threshold": 0.5}
        made = options(exit_criterion=criterion, image_exit_threshold=0.9, **extra)
        assert made.policy("image", 3).criterion == "similarity"
        assert made.policy("text", 3).is_never
        assert made.policy("decoder", 4).criterion == criterion

    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_any_finite_threshold_is_legal(self, value):
        assert options(decoder_exit_threshold=value).policy("decoder", 4).thresholds == (value,) * 4

    @pytest.mark.parametrize("name", sorted(SHIPPED_PRESETS))
    def test_shipped_presets_are_valid(self, name):
        assert resolve_options({"exit_preset": name}, {}, {}, CONFIG).active


class TestResolve:
    def test_call_beats_config_beats_model(self):
        made = resolve_options(
            {"decoder_exit_threshold": 0.1},
            {"decoder_exit_threshold": 0.2, "text_exit_threshold": 0.2},
            {"decoder_exit_threshold": 0.3, "text_exit_threshold": 0.3, "image_exit_threshold": 0.3},
            CONFIG,
        )
        assert (made.decoder_exit_threshold, made.text_exit_threshold, made.image_exit_threshold) == (0.1, 0.2, 0.3)

    def test_never_is_the_off_switch(self):
        saved = {"decoder_exit_threshold": 0.9, "exit_decay_beta": 0.9, "exit_kv": "exact"}
        assert not resolve_options({"exit_criterion": "never"}, {}, saved, CONFIG).active
        assert not resolve_options({}, {"exit_criterion": "never"} | saved, saved, CONFIG).active
        assert not resolve_options({}, {}, saved | {"exit_criterion": "never"}, CONFIG).active

    def test_another_criterion_sets_saved_options_aside(self):
        saved = {"decoder_exit_threshold": 0.9, "exit_decay_beta": 0.9, "exit_kv": "exact"}
        made = resolve_options({"exit_criterion": "fixed", "decoder_exit_layer": 2}, {}, saved, CONFIG)
        assert (made.decoder_exit_threshold, made.exit_kv) == (None, "exact")
        with pytest.raises(ValueError, match="contradicts"):
            resolve_options({"decoder_exit_layer": 2}, {}, saved, CONFIG)

    def test_presets(self):
        saved = {
            "exit_presets": {"mine": {"decoder_exit_threshold": 0.5, "note": "dev set"}},
            "text_exit_threshold": 0.1,
        }
        made = resolve_options({"exit_preset": "mine"}, {}, saved, CONFIG)
        assert (made.decoder_exit_threshold, made.text_exit_threshold) == (0.5, None)
        made = resolve_options({"exit_preset": "mine", "decoder_exit_threshold": 0.6}, {}, saved, CONFIG)
        assert made.decoder_exit_threshold == 0.6
        made = resolve_options({}, {}, saved | {"exit_preset": "mine"}, CONFIG)
        assert (made.decoder_exit_threshold, made.text_exit_threshold) == (0.5, 0.1)
        with pytest.raises(ValueError, match="`exit_preset` must name a preset.*mine.*'yours'"):
            resolve_options({"exit_preset": "yours"}, {}, saved, CONFIG)

    @pytest.mark.parametrize("where", [0, 1, 2], ids=["call", "config", "model"])
    def test_misspelt_names_are_found_everywhere(self, where):
        sources = [{}, {}, {}]
        sources[where] = {"exit_critereon": "never"}
        with pytest.raises(ValueError, match="did you mean `exit_criterion`"):
            resolve_options(*sources, CONFIG)

    def test_transformers_own_name_is_let_through(self):
        config = GenerationConfig()
        names = {name: value for name, value in vars(config).items() if "exit" in name}
        assert not resolve_options({}, names, {}, CONFIG).active


class TestSchedule:
    def test_the_papers_numbers(self):
        policy = ExitPolicy("similarity", (0.99,), beta=0.95, tau=1.0)
        values = [round(policy.at_step(t, 16).thresholds[0], 4) for t in (0, 8, 16)]
        assert values == [0.9905, 0.9708, 0.9589]

    def test_entropy_is_mirrored(self):
        entropy = ExitPolicy("entropy", (0.3,), beta=0.9, tau=1.0)
        confidence = ExitPolicy("confidence", (0.7,), beta=0.9, tau=1.0)
        for t in (0, 3, 7):
            assert entropy.at_step(t, 8).thresholds[0] == pytest.approx(1 - confidence.at_step(t, 8).thresholds[0])

    def test_warm_up(self):
        policy = ExitPolicy("similarity", (0.9,), warmup=1 / 3)
        assert [policy.at_step(t, 12).is_never for t in range(6)] == [True] * 4 + [False] * 2
        assert ExitPolicy("fixed", (None,), depth=1, warmup=1.0).at_step(11, 12).is_never

    def test_steps_are_counted_from_the_end_of_the_prompt(self):
        schedule = ExitSchedule(ExitPolicy("similarity", (0.9,), beta=0.5, tau=2.0), prompt_length=3, num_steps=10)
        thresholds = [schedule.policy(length).thresholds[0] for length in (2, 3, 4, 5)]
        assert thresholds == [pytest.approx(0.45 + 0.5 * math.exp(-2 * t / 10)) for t in (0, 0, 1, 2)]


class TestSignals:
    def test_similarity_is_at_most_one(self):
        x = torch.randn(50, 3, 700)
        assert similarity(x, x * 3).max() <= 1.0
        assert similarity(x.bfloat16(), x.bfloat16()).dtype == torch.float32
        assert similarity(torch.zeros(1, 2, 3), torch.ones(1, 2, 3)).tolist() == [0.0]

    def test_scores(self):
        logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
        probs = logits.softmax(-1)
        states = LayerStates(0, logits[:, None], logits[:, None], predict=lambda x: x)

        def score(name):
            return CRITERIA[name](ExitPolicy(name)).score(states)

        assert score("confidence").tolist() == probs.amax(-1).tolist()
        torch.testing.assert_close(score("margin"), probs[:, 0] - probs[:, 1])
        entropy = -(probs * probs.log()).sum(-1) / math.log(4)
        torch.testing.assert_close(score("entropy"), entropy)

    def test_last_valid(self):
        states = torch.arange(12.0).view(2, 3, 2)
        mask = torch.tensor([[True, True, False], [False, True, True]])
        assert last_valid(states, mask).tolist() == [[2.0, 3.0], [10.0, 11.0]]
        assert last_valid(states, None).tolist() == [[4.0, 5.0], [10.0, 11.0]]


class TestStack:
    """A stack whose layer i adds 1 to every state, and whose rows leave by hand-made rules."""

    @staticmethod
    def run(policy, states, predict=None, mask=None, rows=None, layers=5):
        seen = []

        def layer(i, x, rows):
            seen.append((i, None if rows is None else rows.tolist(), len(x)))
            return x + 1

        decider = ExitDecider(policy, mask, predict)
        return run_stack(states, layers, layer, decider, rows, output_hidden_states=True), seen

    def test_rows_that_left_are_not_run(self):
        depths = torch.tensor([2, 5, 1, 3])
        result, seen = self.run(ExitPolicy("fixed", depth=depths), torch.zeros(4, 2, 3))
        assert result.depths.tolist() == depths.tolist()
        assert result.states[:, 0, 0].tolist() == depths.tolist()
        assert [count for *_, count in seen] == [4, 3, 2, 1, 1]
        assert seen[2][1] == [1, 3]
        assert result.executed == 2 * depths.sum()
        assert [h[:, 0, 0].tolist() for h in result.hidden_states][-1] == depths.tolist()

    def test_rows_that_take_no_part(self):
        result, seen = self.run(ExitPolicy(), torch.zeros(3, 1, 2), rows=torch.tensor([0, 2]), layers=2)
        assert result.depths.tolist() == [2, 0, 2]
        assert result.states[:, 0, 0].tolist() == [2, 0, 2]
        result, seen = self.run(ExitPolicy(), torch.zeros(2, 1, 2), rows=torch.tensor([], dtype=torch.long))
        assert (result.depths.tolist(), seen) == ([0, 0], [])

    def test_minimum_depth(self):
        result, _ = self.run(ExitPolicy("similarity", (-2.0,) * 5, min_layers=3), torch.randn(2, 1, 4))
        assert result.depths.tolist() == [3, 3]

    def test_one_threshold_per_layer(self):
        policy = ExitPolicy("similarity", (None, 1.0, -2.0, -2.0, -2.0))
        assert self.run(policy, torch.randn(2, 1, 4))[0].depths.tolist() == [3, 3]

    def test_patience_counts_layers_that_agree(self):
        # the prediction of a row is its layer number until it settles at 2 or at 4
        settle = torch.tensor([2.0, 4.0])

        def predict(states):
            value = torch.minimum(states[:, 0], settle[states[:, 1].long()])
            return torch.nn.functional.one_hot(value.long(), 9).float()

        states = torch.zeros(2, 1, 2)
        states[1, 0, 1] = 1

        def run(patience):
            def layer(i, x, rows):
                return torch.cat([x[..., :1] + 1, x[..., 1:]], -1)

            decider = ExitDecider(ExitPolicy("patience", patience=patience), None, predict)
            return run_stack(states, 7, layer, decider).depths.tolist()

        # layer 3 is the first whose prediction is that of the layer before
        assert run(1) == [3, 5]
        assert run(2) == [4, 6]

    @pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy"])
    def test_output_criteria_look_at_the_last_valid_position(self, criterion):
        threshold = 0.2 if criterion == "entropy" else 0.9
        mask = torch.tensor([[True, False], [True, True]])
        states = torch.zeros(2, 2, 3)
        # sure at position 0 only, and at position 1 only
        states[0, 0, 0] = states[1, 0, 0] = 20.0
        policy = ExitPolicy(criterion, (threshold,) * 5)
        result, _ = self.run(policy, states, predict=lambda x: x, mask=mask)
        assert result.depths.tolist() == [1, 5]

    def test_a_threshold_out_of_reach_costs_no_head(self):
        def predict(states):
            raise AssertionError("nobody can be surer than 1")

        for criterion in ("confidence", "margin"):
            result, _ = self.run(ExitPolicy(criterion, (1.0,) * 5), torch.randn(2, 1, 4), predict=predict)
            assert result.depths.tolist() == [5, 5]


class TestCriteria:
    def test_every_criterion_is_covered(self):
        assert set(CRITERIA) == {
            "similarity",
            "confidence",
            "margin",
            "entropy",
            "patience",
            "fixed",
            "never",
            "agreement",
        }

    @pytest.mark.parametrize("name", CRITERIA)
    def test_sweeps_go_from_careful_to_fast(self, name):
        criterion = CRITERIA[name]
        values = list(criterion.sweep(6))
        assert values == sorted(values, reverse=name != "entropy") and len(set(values)) == len(values)
        assert bool(values) == bool(criterion.sweep_options) == (name != "never")
        assert criterion.name == name and criterion.summary
        for option in criterion.sweep_options.values():
            assert option in criterion.options

    def test_a_registered_criterion_is_known(self):
        """One entry, and `exit_criterion` takes it: options, decay, errors and the encoder's stand-in."""

        @register_criterion
        class Odd(Criterion):
            name = "odd"
            summary = "for this test"
            needs_logits = True
            exits_above = False

            @classmethod
            def sweep(cls, num_layers):
                return (0.1, 0.5)

            def score(self, states):
                return states.logits().softmax(-1).amin(-1)

        try:
            made = options(exit_criterion="odd", decoder_exit_threshold=0.2, image_exit_threshold=0.9)
            assert made.policy("decoder", 4).criterion == "odd" and made.policy("image", 3).criterion == "similarity"
            early, late = (ExitPolicy("odd", (0.4,), beta=0.5).at_step(t, 10).thresholds[0] for t in (0, 9))
            assert early < late
            with pytest.raises(ValueError, match="pass `exit_criterion` as one of .*'odd'"):
                options(exit_criterion="patience", exit_patience=1, decoder_exit_threshold=0.2)
            with pytest.raises(ValueError, match="`exit_criterion` must be one of .*'odd'"):
                options(exit_criterion="even")
            with pytest.raises(ValueError, match="`name` must be new, got 'odd'"):
                register_criterion(Odd)
            sure = torch.tensor([[9.0, 0.0], [0.1, 0.0]])[:, None]
            result, _ = TestStack.run(ExitPolicy("odd", (0.2,) * 5), sure, predict=lambda x: x)
            assert result.depths.tolist() == [1, 5]
        finally:
            del CRITERIA["odd"]


def test_outputs_take_assignments_as_those_of_transformers_do():
    """The record has an assignment of its own, which must do what that of `ModelOutput` does."""
    fields = {"logits": torch.ones(1), "cache": MuECache(tiny_config()), "loss": None}
    ours, theirs = MuESeq2SeqLMOutput(**fields), Seq2SeqLMOutput(**fields)
    for output in (ours, theirs):
        output.encoder_last_hidden_state, output.decoder_attentions, output.other = torch.zeros(1), None, 3
        output.past_key_values = fields["cache"]
    assert list(ours) == list(theirs) == ["logits", "cache", "encoder_last_hidden_state"]
    assert all(ours[name] is getattr(ours, name) for name in ours) and ours["cache"] is fields["cache"]
    assert (ours.other, ours.loss, ours.decoder_attentions) == (3, None, None)
    for alone in ({"loss": torch.ones(1), "logits": torch.zeros(1)}, torch.ones(1), (("loss", torch.ones(1)),)):
        assert list(MuESeq2SeqLMOutput(alone)) == list(Seq2SeqLMOutput(alone))
    ours.executed_layers = {"decoder": 1}
    assert ours["executed_layers"] == {"decoder": 1} and ours.to_tuple()[-1] == {"decoder": 1}
