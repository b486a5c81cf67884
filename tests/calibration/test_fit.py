"""The fit of criterion "agreement": candidate tokens, the regression, what is recorded, and calibration with it."""

import json
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from conftest import byte_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from mue_hf import MuEForConditionalGeneration, cli
from mue_hf.calibration import calibrate, write_preset
from mue_hf.calibration.fit import (
    FitRecorder,
    area_under_roc,
    choose_candidates,
    fit_agreement,
    logistic_regression,
    probability,
)
from mue_hf.evaluation.rows import describe_rows
from mue_hf.evaluation.signals import SignalRecorder, answer_tokens
from mue_hf.inference.predict import predict
from mue_hf.model.agreement_mue import INPUTS, blank_fit, token_hash

# of the fixtures `scenes` and `statements`
IMAGES = 12


@pytest.fixture(scope="module")
def parts():
    return byte_parts(image_size=48, dtype=torch.float32)


class TestCandidates:
    OUTPUTS = [[5, 6, 2], [5, 7, 2], [5, 6, 2], [5, 8, 2]]
    REFERENCES = [[9, 9, 6], [], [9, 8], [4]]

    def test_most_frequent_in_outputs_then_in_references(self):
        # 6 and 2 of one half cover two tokens of the other half's outputs, 2 and 5 of that one four
        assert choose_candidates(self.OUTPUTS, self.REFERENCES, 2) == ([2, 5], 6 / 12)
        assert choose_candidates(self.OUTPUTS, self.REFERENCES, 3) == ([2, 5, 6], 8 / 12)
        assert choose_candidates(self.OUTPUTS, self.REFERENCES, 100)[0] == [2, 4, 5, 6, 7, 8, 9]

    def test_coverage_is_that_of_outputs_that_were_not_counted(self):
        assert choose_candidates(self.OUTPUTS, self.REFERENCES, 0.5) == ([2, 5], 6 / 12)
        assert choose_candidates(self.OUTPUTS, self.REFERENCES, 0.51) == ([2, 5, 6], 8 / 12)
        # 6 is not among the outputs and references of the other half: as many as the place of the last that is, 8
        assert choose_candidates(self.OUTPUTS, self.REFERENCES, 0.99) == ([2, 5, 6, 7, 8], 9 / 12)

    def test_nothing_to_choose_from(self):
        with pytest.raises(ValueError, match="must be at least two tokens, but the full-depth outputs hold 1"):
            choose_candidates([[2], [2]], [[], []], 5)


class TestRegression:
    def test_finds_what_made_the_data(self):
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(20000, 3)) * [1.0, 50.0, 0.01] + [0.0, 7.0, 3.0]
        weights = np.array([1.5, -0.02, 80.0, -239.0])
        right = rng.random(20000) < probability(weights, inputs)
        found = logistic_regression(inputs, right)
        np.testing.assert_allclose(found[:-1], weights[:-1], rtol=0.1)
        np.testing.assert_allclose(probability(found, inputs), probability(weights, inputs), atol=0.05)

    @pytest.mark.parametrize("right", [True, False])
    def test_what_never_varies(self, right):
        """A layer that is always right, and an input that says nothing."""
        inputs = np.stack([np.full(50, 0.3), np.linspace(0, 1, 50)], 1)
        found = logistic_regression(inputs, np.full(50, right))
        assert found[0] == 0.0
        known = probability(found, inputs)
        assert np.allclose(known, 51 / 52 if right else 1 / 52, atol=1e-3)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
    def test_area_counts_pairs(self, decisions):
        scores, right = (np.array(column) for column in zip(*decisions, strict=True))
        pairs = [(a > b) + (a == b) / 2 for a, b in product(scores[right], scores[~right])]
        assert area_under_roc(scores, right) == (pytest.approx(np.mean(pairs)) if pairs else None)

    def test_report_is_of_the_other_half(self):
        """Where one half says the opposite of the other, what was learnt there is worse than a guess."""
        rng = np.random.default_rng(0)
        inputs = rng.random((400, 1, len(INPUTS)))
        right = inputs[:, :, 0] > 0.5
        right[200:] = ~right[200:]
        report = fit_agreement(inputs, right, blank_fit(2, [1, 2], None)).report
        (layer,) = report["layers"]
        assert layer["auc"]["agreement"] < 0.1 and layer["brier"]["agreement"] > 0.5
        assert layer["auc"]["confidence"] == area_under_roc(inputs[:, 0, 0], right[:, 0])
        assert sum(one["count"] for one in report["bins"]) == report["decisions"] == 400
        assert json.loads(json.dumps(report)) == report


class TestRecorder:
    @pytest.mark.parametrize("beams", [1, 3])
    def test_captions_are_those_of_full_depth(self, beams, parts, scenes):
        """Against the recorder of signals: which layers agree, cosines, and steps."""
        model, processor = parts
        decoding = {"num_beams": beams, "max_new_tokens": 3, "min_new_tokens": 3}
        with SignalRecorder(model) as slow:
            full = predict(model, processor, scenes, "captioning", decoding, batch_size=IMAGES, progress=False)
        tokens = list(range(10, 60))
        exits = {"exit_criterion": "agreement", "decoder_exit_threshold": 0.9, "exit_candidates": tokens}
        exits["exit_fit"] = blank_fit(4, tokens, None)
        with FitRecorder(model, answers=False) as recorder:
            again = predict(
                model, processor, scenes, "captioning", decoding | exits, batch_size=IMAGES, progress=False
            )
        assert [one.token_ids for one in again] == [one.token_ids for one in full]
        inputs, right = recorder.recorded()
        # call by call here, row by row there
        order = np.arange(len(right)).reshape(3, -1).T.flatten()
        signals = slow.signals
        assert np.array_equal(right[order], signals.agreeing[:, :-1].numpy())
        np.testing.assert_allclose(inputs[order][:, :, INPUTS.index("similarity")], signals.decoder[:, :-1], atol=1e-5)
        assert np.array_equal(inputs[order][:, 0, INPUTS.index("step")], signals.steps.numpy())
        assert 0 < right.mean() < 1
        assert not model.get_decoder()._forward_hooks and not model.get_decoder()._forward_pre_hooks

    def test_answers_are_decided_among_those_allowed(self, parts, statements):
        model, processor = parts
        answers = processor.encode_answers(list(processor.entailment_answers.values()))
        with SignalRecorder(model, answer_tokens(processor)) as slow:
            predict(model, processor, statements, "entailment", batch_size=8, progress=False)
        exits = {"exit_criterion": "agreement", "decoder_exit_threshold": 0.9, "exit_fit": blank_fit(4, None, answers)}
        with FitRecorder(model, answers=True) as recorder:
            predict(model, processor, statements, "entailment", exits, batch_size=8, progress=False)
        assert np.array_equal(recorder.recorded()[1], slow.signals.agreeing[:, :-1].numpy())


class TestCalibrate:
    @pytest.fixture
    def checkpoint(self, parts, tmp_path):
        model, processor = parts
        model.save_pretrained(tmp_path / "checkpoint")
        processor.save_pretrained(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    @pytest.mark.parametrize("task", ["captioning", "entailment"])
    def test_a_preset_is_what_was_certified(self, task, parts, scenes, statements, tmp_path, checkpoint):
        model, processor = parts
        rows = scenes if task == "captioning" else statements
        options = {"criteria": "agreement", "budget": 0.95, "num_thresholds": 3, "candidates": 2}
        # too deep for the encoder's three layers: the decoder alone exits
        options |= {"options": {"exit_kv": "exact", "exit_min_layers": 3}}
        options |= {"folder": tmp_path / "runs", "progress": False}
        found = calibrate(model, processor, describe_rows(rows), task, **options)
        assert calibrate(model, processor, describe_rows(rows), task, **options) == found
        preset = found.preset
        assert (preset["exit_criterion"], preset["exit_kv"]) == ("agreement", "exact")
        assert 0 < preset["decoder_exit_threshold"] < 1
        assert (found.exit_candidates is None) == (task == "entailment")
        assert found.report["decisions"] > 0
        write_preset(checkpoint, "mine", preset, found.exit_candidates)
        again = MuEForConditionalGeneration.from_pretrained(checkpoint)
        if task == "captioning":
            assert preset["exit_fit"]["candidates"] == token_hash(again.generation_config.exit_candidates)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            by_name = predict(again, processor, rows, task, {"exit_preset": "mine"}, progress=False)
        exits = {name: value for name, value in preset.items() if "exit" in name}
        exits |= {} if found.exit_candidates is None else {"exit_candidates": found.exit_candidates}
        expected = predict(model, processor, rows, task, exits, progress=False)
        assert [one.decoder_exit_layers for one in by_name] == [one.decoder_exit_layers for one in expected]
        assert min(depth for one in expected for depth in one.decoder_exit_layers) == 3
        # the next one goes by the list that is saved
        if task == "captioning":
            later = calibrate(again, processor, describe_rows(rows), task, **options | {"criteria": "margin"})
            assert later.exit_candidates == found.exit_candidates and later.report is None

    @pytest.mark.parametrize(
        ("task", "wanted", "message"),
        [
            ("captioning", 1, "a number of tokens, at least 2, or the share .*got 1"),
            ("captioning", 1.0, "a number of tokens, at least 2, or the share .*got 1.0"),
            ("entailment", 64, "must be None for entailment, got 64: the candidates are the answers' own"),
        ],
    )
    def test_bad_numbers_of_candidates(self, task, wanted, message, parts, scenes, statements):
        rows = describe_rows(scenes if task == "captioning" else statements)
        with pytest.raises(ValueError, match=message):
            calibrate(*parts, rows, task, budget=0.9, criteria="agreement", exit_candidates=wanted)

    def test_command(self, checkpoint, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        data = ["--task", "captioning", "--data", "scenes:3:24", "--split", "test", "--compute", "0.99"]
        how = ["--criterion", "agreement", "--exit-candidates", "20", "--kv", "copy", "--num-thresholds", "2"]
        how += ["--generate", "exit_min_layers=3"]
        assert cli.main(["calibrate", str(checkpoint), *data, *how, "--candidates", "2", "--preset", "mine"]) == 0
        output = capsys.readouterr().out
        assert "decisions over 20 tokens, which hold" in output and "area under ROC: agreement  confidence" in output
        saved = json.loads((checkpoint / "generation_config.json").read_text())
        assert len(saved["exit_candidates"]) == 20
        assert saved["exit_presets"]["mine"]["exit_kv"] == "copy"
        # evaluate takes the fit from the preset
        arguments = ["captioning", "--model", str(checkpoint), "--data", "scenes:1:4", "--sweep", "agreement=0.9,0.6"]
        scores = ["--tokenizer", "plain", "--metrics", "bleu", "--resamples", "20", "--time-rows", "0"]
        assert cli.main(["evaluate", *arguments, "--output", "points.jsonl", "--json", *scores]) == 0
        points = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["name"] for one in points] == ["full depth", "agreement 0.9", "agreement 0.6"]


class TestPresets:
    LOOKING = {"exit_criterion": "margin", "decoder_exit_threshold": 0.5, "weights_fingerprint": "a"}

    @staticmethod
    def written(folder, name, preset, tokens):
        write_preset(folder, name, preset, tokens)
        return json.loads((folder / "generation_config.json").read_text())

    def test_older_presets_go_on_looking_at_the_whole_vocabulary(self, tmp_path):
        (tmp_path / "generation_config.json").write_text("{}")
        write_preset(tmp_path, "older", self.LOOKING)
        write_preset(tmp_path, "other", {"decoder_exit_threshold": 0.5})
        saved = self.written(tmp_path, "new", self.LOOKING, [4, 5])
        assert saved["exit_candidates"] == [4, 5]
        assert saved["exit_presets"] == {
            "older": self.LOOKING | {"exit_candidates": None},
            "other": {"decoder_exit_threshold": 0.5},
            "new": self.LOOKING,
        }

    def test_a_list_stays_while_presets_look_at_it(self, tmp_path):
        (tmp_path / "generation_config.json").write_text("{}")
        self.written(tmp_path, "first", self.LOOKING, [4, 5])
        assert self.written(tmp_path, "second", self.LOOKING, [5, 4])["exit_candidates"] == [5, 4]
        with pytest.raises(ValueError, match=r"must stay the 2 tokens that are saved.*\['first'\] look at, got 3"):
            write_preset(tmp_path, "second", self.LOOKING, [4, 5, 6])
        # of other weights they promise nothing any more
        later = self.LOOKING | {"weights_fingerprint": "b"}
        assert self.written(tmp_path, "second", later, [4, 5, 6])["exit_candidates"] == [4, 5, 6]
