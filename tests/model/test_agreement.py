"""Candidate tokens of exit criteria, and the criterion "agreement": against slow arithmetic, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_inputs, tiny_model
from torch.nn.functional import cosine_similarity

from mue_hf import ExitOptions
from mue_hf.model.agreement_mue import FIT_VERSION, INPUTS, Agreement, answers_hash, fit_weights, token_hash
from mue_hf.model.criteria_mue import ExitPolicy, LayerStates
from mue_hf.model.exit_options_mue import resolve_options
from mue_hf.model.layers_mue import CandidateHead, NormedHead

CONFIG = tiny_config()
TOKENS = (2, 5, 11, 12, 30, 31, 60, 97)
ANSWERS = [[20], [20, 21], [22, 23], [22, 24, 25]]


def made_up_fit(candidates=TOKENS, answers=None, bias=None, layers=4, seed=0):
    """A fit of random weights that says most of all about the margin, or one that always says the same."""
    weights = torch.randn(layers - 1, len(INPUTS) + 1, generator=torch.Generator().manual_seed(seed)).double() / 5
    weights[:, 1] += 12
    weights[:, -1] -= 4
    if bias is not None:
        weights = torch.cat([weights[:, :-1] * 0, torch.full((layers - 1, 1), float(bias))], 1)
    return {
        "version": FIT_VERSION,
        "inputs": list(INPUTS),
        "layers": layers,
        "candidates": candidates and token_hash(candidates),
        "answers": answers and answers_hash(answers),
        "weights": weights.tolist(),
    }


def exits(threshold=0.5, tokens=TOKENS, **fit):
    """Exit options of the criterion."""
    options = {"exit_criterion": "agreement", "decoder_exit_threshold": threshold}
    options["exit_fit"] = made_up_fit(tokens, **fit)
    return options | ({} if tokens is None else {"exit_candidates": list(tokens)})


def run(model, inputs, **options):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, **options)


class TestScore:
    @pytest.mark.parametrize("size", [3, 16])
    def test_is_the_regression_on_what_the_layers_say(self, size, monkeypatch):
        """Every row by itself, in plain formulae, along layers after which rows leave."""
        monkeypatch.setattr(Agreement, "shortlist_size", size)
        generator = torch.Generator().manual_seed(0)
        head = torch.randn(9, 6, generator=generator).double()
        states = torch.randn(4, 5, 1, 6, generator=generator).double()
        # one row that does not change its mind
        states[2, 4] = states[1, 4] * 1.1
        fit = made_up_fit()["weights"]
        criterion = Agreement(ExitPolicy("agreement", (0.5,) * 4, fit=np.array(fit), step=3))
        for layer, rows in enumerate([None, [0, 2, 3, 4], [2, 4]]):
            members = range(5) if rows is None else rows
            chosen = states[:, list(members)]
            found = criterion.score(
                LayerStates(
                    layer,
                    chosen[layer],
                    chosen[layer + 1],
                    rows=None if rows is None else torch.tensor(rows),
                    predict=lambda x: x @ head.T,
                )
            )
            for row, score in zip(members, found.tolist(), strict=True):
                short = (states[1, row, 0] @ head.T).topk(min(size, 9)).indices
                confidence, margin, best = self.look(states[layer + 1, row, 0], head[short])
                before = self.look(states[layer, row, 0], head[short]) if layer else (confidence, margin, None)
                inputs = [
                    *(confidence, margin, -math.log(1 - confidence), -math.log(1 - margin)),
                    *(confidence - before[0], margin - before[1], float(best == before[2])),
                    cosine_similarity(states[layer, row, 0], states[layer + 1, row, 0], dim=0).item(),
                    *(3.0, math.log(4.0)),
                ]
                total = fit[layer][-1] + sum(x * w for x, w in zip(inputs, fit[layer][:-1], strict=True))
                assert score == pytest.approx(1 / (1 + math.exp(-total)), rel=1e-9)

    @staticmethod
    def look(state, head):
        probs = (state @ head.T).softmax(-1).tolist()
        best = max(range(len(probs)), key=probs.__getitem__)
        first, second = sorted(probs, reverse=True)[:2]
        return first, first - second, best

    def test_certainty_has_a_floor(self):
        logits = torch.tensor([[[100.0, 0.0, 0.0]]])
        criterion = Agreement(ExitPolicy("agreement", (0.5,) * 4, fit=None))
        seen = criterion.inputs(LayerStates(0, logits, logits, predict=lambda x: x))
        assert seen[0, 2] == seen[0, 3] == pytest.approx(-math.log(1e-5))

    @pytest.mark.parametrize(
        ("thresholds", "min_layers", "looked"),
        [
            ((0.9, 0.9, 0.9, 0.9), 1, [0, 1, 2]),
            ((0.9, 0.9, 0.9, 0.9), 3, [1, 2]),
            ((None, None, 0.9, None), 1, [1, 2]),
            ((None, 0.9, None, None), 1, [0, 1]),
            ((None,) * 4, 1, []),
        ],
        ids=str,
    )
    def test_layers_are_looked_at_where_one_may_exit_or_compares(self, thresholds, min_layers, looked):
        seen = []
        weights = fit_weights(made_up_fit(bias=-9))
        criterion = Agreement(ExitPolicy("agreement", thresholds, fit=weights, min_layers=min_layers))
        states = torch.randn(2, 1, 6)
        for layer in range(3):
            criterion.exits(
                LayerStates(layer, states, states + layer, predict=lambda x, layer=layer: seen.append(layer) or x)
            )
        assert seen == looked


class TestGenerate:
    @pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy", "patience", "agreement"])
    @pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
    def test_tokens_inform_the_decision_alone(self, how, criterion):
        """Where nothing exits, and where every token exits after the same layer, the whole head has the word."""
        model, inputs = tiny_model(std=0.3), tiny_inputs()
        plain = run(model, inputs, **how)
        shallow = run(model, inputs, exit_criterion="fixed", decoder_exit_layer=2, **how)
        never, always = {
            "confidence": (0.9999999, 0.0),
            "margin": (0.9999999, -1.0),
            "entropy": (1e-9, 2.0),
            "patience": (4, 1),
            "agreement": (0.9999999, 1e-9),
        }[criterion]
        name = "exit_patience" if criterion == "patience" else "decoder_exit_threshold"
        options = {"exit_criterion": criterion, "exit_candidates": list(TOKENS)} | how
        if criterion == "agreement":
            options["exit_fit"] = made_up_fit(bias=0)
        found = run(model, inputs, **options, **{name: never})
        assert torch.equal(found.sequences, plain.sequences) and set(found.decoder_exit_layers.unique().tolist()) <= {
            0,
            4,
        }
        if criterion != "patience":
            found = run(model, inputs, **options, **{name: always}, exit_min_layers=2)
            assert torch.equal(found.sequences, shallow.sequences)
            assert torch.equal(found.decoder_exit_layers, shallow.decoder_exit_layers)
        assert not set(shallow.sequences.flatten().tolist()) <= {0, 1, *TOKENS}

    def test_the_list_is_what_is_looked_at(self):
        """A margin over a list is that of the whole head's logits of it."""
        model, inputs = tiny_model(std=0.3), tiny_inputs()
        seen = []

        class Spy:
            def __init__(self, head):
                self.head = head

            def __call__(self, states):
                seen.append((self.head(states), model.lm_head(states)[..., list(TOKENS)]))
                return seen[-1][0]

        model._exit_head = lambda tokens: Spy(type(model)._exit_head(model, tokens))
        options = {"exit_criterion": "margin", "decoder_exit_threshold": 0.3, "exit_candidates": TOKENS[::-1]}
        output = run(model, inputs, **options)
        assert len(seen) > 6 and len(output.decoder_exit_layers.unique()) > 2
        for found, expected in seen:
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
    @pytest.mark.parametrize("ids", [None, [1, 4, 8]], ids=["vocabulary", "list"])
    @pytest.mark.parametrize("own", [True, False], ids=["own head", "another"])
    def test_rows_of_any_head(self, own, ids, bias):
        head, norm = tiny_model().lm_head, torch.nn.LayerNorm(32).double()
        if not own:
            head = torch.nn.Linear(32, 99).double()
        head.bias = torch.nn.Parameter(torch.randn(99).double()) if bias else None
        states, places = torch.randn(3, 32).double(), torch.tensor([[2, 0], [1, 2], [0, 1]])
        chosen = CandidateHead(head, None if ids is None else torch.tensor(ids))
        every = head(states) if ids is None else head(states)[:, ids]
        torch.testing.assert_close(chosen(states), every)
        torch.testing.assert_close(chosen.at(states, places), every.gather(1, places))
        for normed in (NormedHead(norm, chosen), NormedHead(norm, chosen.__call__)):
            torch.testing.assert_close(normed(states), chosen(norm(states)))
            torch.testing.assert_close(normed.at(states, places), chosen(norm(states)).gather(1, places))

    @pytest.mark.parametrize("kv", ["project", "exact"])
    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("tokens", [TOKENS, None], ids=["list", "vocabulary"])
    def test_a_row_alone_is_a_row_in_a_batch(self, tokens, beams, kv):
        model, inputs = tiny_model(std=0.3), tiny_inputs()
        options = exits(0.6, tokens) | {"num_beams": beams, "exit_kv": kv, "min_new_tokens": 6}
        batch = run(model, inputs, **options)
        assert len(batch.decoder_exit_layers.unique()) > 1
        for row in range(3):
            alone = run(model, {name: value[row : row + 1] for name, value in inputs.items()}, **options)
            assert torch.equal(alone.sequences[0], batch.sequences[row])
            assert torch.equal(alone.decoder_exit_layers[0], batch.decoder_exit_layers[row])

    def test_the_step_counts_new_tokens(self):
        """A fit that knows the place alone: rows exit from the third token on, whatever the prompt."""
        fit = made_up_fit(bias=-2.5)
        for row in fit["weights"]:
            row[INPUTS.index("step")] = 1.0
        model, inputs = tiny_model(), tiny_inputs()
        prompt = torch.tensor([[0, 9, 8]] * 3)
        options = exits() | {"exit_fit": fit, "min_new_tokens": 6}
        for more in ({}, {"decoder_input_ids": prompt}):
            depths = run(model, inputs | more, **options).decoder_exit_layers
            assert depths.tolist() == [[4, 4, 4, 1, 1, 1]] * 3

    def test_forward_knows_the_list_of_the_checkpoint(self):
        model, inputs = tiny_model(std=0.3), tiny_inputs()
        ids = torch.tensor([[0, 9, 8]] * 3)
        given = model(**inputs, decoder_input_ids=ids, **exits(0.6))
        assert len(given.decoder_exit_layers.unique()) > 1
        model.generation_config.exit_candidates = list(TOKENS)
        options = exits(0.6)
        del options["exit_candidates"]
        saved = model(**inputs, decoder_input_ids=ids, **options)
        assert torch.equal(saved.decoder_exit_layers, given.decoder_exit_layers)
        assert torch.equal(saved.logits, given.logits)
        base = model.model(**inputs, decoder_input_ids=ids, **exits(0.6))
        assert torch.equal(base.decoder_exit_layers, given.decoder_exit_layers)


class TestAnswers:
    @pytest.mark.parametrize("criterion", ["margin", "entropy", "agreement"])
    @pytest.mark.parametrize("answers", [[[20], [22], [24]], ANSWERS], ids=["one node", "several nodes"])
    def test_each_node_looks_at_the_tokens_that_it_allows(self, answers, criterion):
        """Against one teacher-forced call for each node, with its tokens as the list."""
        model, inputs = tiny_model(std=0.3), tiny_inputs()
        nodes = {(): [20, 22, 24]} if len(answers) == 3 else {(): [20, 22], (20,): [2, 21], (22,): [23, 24]}
        every = len({token for tokens in nodes.values() for token in tokens})
        seen = set()
        for threshold in (0.01, 0.3, 0.9, 0.99, 0.999, 0.9995):
            options = {"exit_criterion": criterion, "decoder_exit_threshold": threshold}
            extra = {"exit_fit": made_up_fit(None, answers)} if criterion == "agreement" else {}
            found = model.score_answers(answers, **inputs, **options, **extra, return_dict=True).decoder_exit_layers
            assert found.shape == (3, len(nodes))
            seen |= set(found.flatten().tolist())
            for place, (prefix, tokens) in enumerate(nodes.items()):
                if criterion == "agreement":
                    extra = {"exit_fit": made_up_fit(tokens)}
                if criterion == "entropy":
                    # of as many classes as the nodes have together
                    options["decoder_exit_threshold"] = threshold * math.log(every) / math.log(len(tokens))
                prompt = torch.tensor([[0, *prefix]] * 3)
                options |= {"exit_candidates": tokens, "exit_step": len(prefix)}
                alone = model(**inputs, decoder_input_ids=prompt, **options, **extra)
                assert alone.decoder_exit_layers.tolist() == found[:, place].tolist()
        assert len(seen) > 1

    def test_the_list_of_captions_has_no_say(self):
        model, inputs = tiny_model(std=0.3), tiny_inputs()
        options = {"exit_criterion": "margin", "decoder_exit_threshold": 0.5}
        expected = model.score_answers(ANSWERS, **inputs, **options, return_dict=True)
        model.generation_config.exit_candidates = [50, 60]
        found = model.score_answers(ANSWERS, **inputs, **options, return_dict=True)
        assert torch.equal(found.decoder_exit_layers, expected.decoder_exit_layers)

    def test_a_single_answer_is_run(self):
        model, inputs = tiny_model(), tiny_inputs()
        options = {"exit_criterion": "margin", "decoder_exit_threshold": 0.0, "return_dict": True}
        assert model.score_answers([[20]], **inputs, **options).decoder_exit_layers.tolist() == [[1]] * 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"exit_fit": None},
                "needs `exit_fit`, got none; fit it on this model with `mue-hf calibrate .*agreement",
            ),
            ({"decoder_exit_threshold": 1.0}, "must be a probability above 0 and below 1 .*got 1.0"),
            ({"decoder_exit_threshold": [0.9, 0.0, None, 0.9]}, "must be a probability above 0 and below 1 .*got 0.0"),
            ({"exit_decay_beta": 0.9}, "`exit_decay_beta` .*contradicts"),
            ({"exit_fit": 3}, "`exit_fit` must be a dict that .* made, got 3"),
            ({"exit_fit": made_up_fit(layers=5)}, "`exit_fit` must have layers 4, got 5; fit it anew"),
            ({"exit_fit": made_up_fit() | {"version": 0}}, "must have version 1, got 0"),
            ({"exit_fit": made_up_fit() | {"inputs": ["margin"]}}, "must have inputs .*got .'margin'.; fit it anew"),
            ({"exit_fit": made_up_fit() | {"weights": [[0.0]] * 3}}, "11 finite numbers as `weights` of each of 3"),
            ({"exit_fit": made_up_fit() | {"weights": [[math.nan] * 11] * 3}}, "must have 11 finite numbers"),
            ({"exit_candidates": [3, 4]}, "the `exit_candidates` that it was made with.*fit it anew"),
            ({"exit_candidates": None}, "the `exit_candidates` that it was made with.*got None"),
            ({"exit_candidates": [3]}, r"`exit_candidates` must be a list of at least two .* in \[0, 99\), got \[3\]"),
            ({"exit_candidates": [3, 3]}, "at least two different token ids"),
            ({"exit_candidates": [3, 99]}, r"in \[0, 99\)"),
            ({"exit_candidates": [3, 4.0]}, "`exit_candidates` must be a list"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_options(self, change, message):
        with pytest.raises(ValueError, match=message):
            ExitOptions.from_dict(exits() | change, CONFIG)

    def test_a_fit_is_for_its_answers_or_for_generating(self):
        model, inputs = tiny_model(), tiny_inputs()
        with pytest.raises(ValueError, match="fitted on other answers and is used for these answers"):
            model.score_answers(ANSWERS[:2], **inputs, **exits(tokens=None, answers=ANSWERS))
        with pytest.raises(ValueError, match="fitted on generated tokens and is used for these answers"):
            model.score_answers(ANSWERS, **inputs, **exits())
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="fitted on other answers and is used for generated tokens"):
                call(**inputs, **exits(tokens=None, answers=ANSWERS))
        # their order does not matter
        model.score_answers(ANSWERS[::-1], **inputs, **exits(tokens=None, answers=ANSWERS))


class TestSaved:
    SAVED = {
        "exit_candidates": list(TOKENS),
        "exit_presets": {
            "mine": {"exit_criterion": "margin", "decoder_exit_threshold": 0.5},
            "older": {"exit_criterion": "margin", "decoder_exit_threshold": 0.5, "exit_candidates": None},
            "other": {"decoder_exit_threshold": 0.5},
        },
    }

    @pytest.mark.parametrize(
        ("call", "tokens"),
        [
            ({"exit_preset": "mine"}, TOKENS),
            ({"exit_preset": "older"}, None),
            ({"exit_preset": "older", "exit_candidates": [7, 8]}, (7, 8)),
            ({"exit_preset": "other"}, None),
            ({"exit_criterion": "margin"}, TOKENS),
            ({"exit_criterion": "never"}, None),
            ({}, None),
        ],
        ids=str,
    )
    def test_the_list_is_that_of_the_checkpoint(self, call, tokens):
        assert resolve_options(call, {}, self.SAVED, CONFIG).exit_candidates == tokens
        # an off switch that is saved does not take it away
        off = self.SAVED | {"exit_criterion": "never"}
        if call:
            assert resolve_options(call, {}, off, CONFIG).exit_candidates == tokens

    def test_fit_and_list_survive_saving(self, tmp_path):
        model, inputs = tiny_model(std=0.3), tiny_inputs()
        options = exits(0.6)
        model.generation_config.exit_candidates = options.pop("exit_candidates")
        model.generation_config.exit_presets = {"mine": options}
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "generation_config.json").read_text())["exit_candidates"] == list(TOKENS)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
        expected, found = (run(one, inputs, exit_preset="mine") for one in (model, again))
        assert torch.equal(found.decoder_exit_layers, expected.decoder_exit_layers)
        assert len(found.decoder_exit_layers.unique()) > 1
