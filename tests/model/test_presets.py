"""Presets and the weights that they were calibrated on: what is looked at when, and who is warned."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_inputs, tiny_model

from mue_hf import MuEForConditionalGeneration
from mue_hf.model.presets_mue import weights_fingerprint

STALE = "calibrated on other weights.*mue-hf calibrate"


@pytest.fixture
def model():
    model = tiny_model()
    model.generation_config.max_new_tokens = 4
    model.generation_config.exit_presets = {
        "mine": {"decoder_exit_threshold": 0.5, "weights_fingerprint": weights_fingerprint(model)},
        "bare": {"decoder_exit_threshold": 0.5},
    }
    return model


@pytest.fixture
def inputs():
    return tiny_inputs(1)


def change(model) -> None:
    with torch.no_grad():
        model.get_decoder().layers[1].fc1.weight.mul_(1.01)


def test_only_changed_weights_warn(model, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, exit_preset="mine")
        model.eval().generate(**inputs, exit_preset="mine")
        assert model.check_presets() == []
        change(model)
        model.generate(**inputs, exit_preset="bare")
        model.generate(**inputs, exit_preset="mine", exit_criterion="never")
        model.generate(**inputs)
        # writes in place are not noticed by themselves
        model.generate(**inputs, exit_preset="mine")
    with pytest.warns(UserWarning, match=r"exit presets \['mine'\] were " + STALE) as caught:
        assert model.check_presets() == ["mine"]
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="exit preset of this call was " + STALE) as caught:
        model.generate(**inputs, exit_preset="mine")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("how", ["train", "eval", "load_state_dict", "dtype"])
def test_changes_are_seen_after(model, inputs, how):
    model.generate(**inputs, exit_preset="mine")
    change(model)
    if how == "train":
        model.train().eval()
    elif how == "eval":
        model.eval()
    elif how == "load_state_dict":
        model.load_state_dict(tiny_model(seed=5).state_dict())
    else:
        model.float()
        inputs = tiny_inputs(1, dtype=torch.float32)
    with pytest.warns(UserWarning, match=STALE):
        model.generate(**inputs, exit_preset="mine")


def test_a_loaded_model_is_looked_at_when_it_is_loaded(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MuEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    change(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.generate(**inputs, exit_preset="mine")
    change(model)
    model.generation_config.exit_presets["mine"]["weights_fingerprint"] = "of another model"
    with pytest.warns(UserWarning, match=STALE):
        model.save_pretrained(tmp_path)
    loaded = MuEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    with pytest.warns(UserWarning, match=STALE):
        loaded.generate(**inputs, exit_preset="mine")


def test_scoring_answers_warns_too(model, inputs):
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    with pytest.warns(UserWarning, match=STALE) as caught:
        model.score_answers([[5], [6]], **inputs, exit_preset="mine")
    assert caught[0].filename == __file__


def test_once_per_place(model, inputs):
    model.generation_config.exit_presets["mine"]["weights_fingerprint"] = "another"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            model.generate(**inputs, exit_preset="mine")
        model.generate(**inputs, exit_preset="mine")
    assert len(caught) == 2


def test_weights_are_read_once(model, inputs, monkeypatch):
    reads = []
    monkeypatch.setattr(
        "mue_hf.model.presets_mue.weights_fingerprint", lambda one: reads.append(one) or weights_fingerprint(one)
    )
    model.generate(**inputs)
    assert not reads
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: model.generate(**inputs, exit_preset="mine"), range(3)))
    first = len(reads)
    model.generate(**inputs, exit_preset="mine")
    assert 1 <= first <= 3
    assert len(reads) == first


def test_costs_of_old_presets_are_ignored(model, inputs):
    """`exit_costs` of version 0.1, in files and in calls."""
    expected = model.generate(**inputs, exit_preset="bare")
    costs = {"cpu, 2 threads": {"image": {"fixed": 0.0, "per_row": 0.0, "shrink": 1.0}}}
    with pytest.warns(FutureWarning, match="`exit_costs` has no effect any more.*drop it"):
        assert torch.equal(model.generate(**inputs, exit_preset="bare", exit_costs=costs), expected)
    with pytest.warns(FutureWarning, match="`exit_costs` has no effect any more"):
        model(**inputs, exit_costs=costs)
    model.generation_config.exit_costs = costs
    with pytest.warns(FutureWarning, match="`exit_costs` has no effect any more"):
        assert torch.equal(model.generate(**inputs, exit_preset="bare"), expected)


class TestSettings:
    """Calls with other settings than those that a preset notes."""

    @pytest.fixture
    def model(self, model):
        settings = {"num_beams": 2, "do_sample": False, "no_repeat_ngram_size": 3, "max_new_tokens": 4}
        settings |= {"length_penalty": 1.0, "batch_size": 16, "dtype": "float64"}
        model.generation_config.exit_presets["mine"]["certified_for"] = settings
        return model

    @pytest.fixture
    def same(self):
        return {"exit_preset": "mine", "num_beams": 2, "no_repeat_ngram_size": 3}

    def test_the_same_settings_are_silent(self, model, inputs, same):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**inputs, **same)
            model.generate(**inputs, **same | {"max_new_tokens": None, "max_length": 5})
            # nothing exits, or nothing is promised
            model.generate(**inputs, exit_preset="mine", exit_criterion="never")
            model.generate(**inputs, exit_preset="bare")
            # decodes nothing
            model.score_answers([[5], [6]], **inputs, exit_preset="mine")

    @pytest.mark.parametrize(
        ("other", "told"),
        [
            ({"num_beams": 3}, "num_beams=2 where this call has 3"),
            ({"num_beams": 1}, "num_beams=2 where this call has 1"),
            ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=3 where this call has 2"),
            ({"max_new_tokens": 3}, "max_new_tokens=4 where this call has 3"),
            ({"length_penalty": 2.0}, "length_penalty=1.0 where this call has 2.0"),
            ({"num_beams": 1, "do_sample": True}, "do_sample=False where this call has True"),
        ],
    )
    def test_another_setting_is_named(self, model, inputs, same, other, told):
        with pytest.warns(UserWarning, match=f"{told}.*; call with its settings, or run `mue-hf calibrate`") as caught:
            model.generate(**inputs, **same | other)
        assert len(caught) == 1 and caught[0].filename == __file__
        assert ("num_beams" in other) == ("num_beams=" in str(caught[0].message))

    def test_options_beyond_the_usual_ones(self, model, inputs, same):
        model.generation_config.exit_presets["mine"]["certified_for"]["repetition_penalty"] = 1.5
        with pytest.warns(UserWarning, match=r"repetition_penalty=1.5 where this call has"):
            model.generate(**inputs, **same)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**inputs, **same, repetition_penalty=1.5)

    @pytest.mark.parametrize("door", ["generate", "score_answers"])
    def test_another_dtype_is_named_once(self, door, model, same):
        """And not as other weights, which cannot be told there."""
        inputs = tiny_inputs(1, dtype=torch.float32)
        model.float()
        with pytest.warns(UserWarning, match="dtype='float64' where this call has 'float32'") as caught:
            if door == "generate":
                model.generate(**inputs, **same)
            else:
                model.score_answers([[5], [6]], **inputs, exit_preset="mine")
        assert len(caught) == 1

    def test_once_per_place(self, model, inputs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                model.generate(**inputs, exit_preset="mine")
        assert len(caught) == 1
