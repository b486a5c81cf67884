"""A criterion that is registered is evaluated and calibrated, and named in help and errors, without another line."""

import json

import pytest
from torch import linalg

from mue_hf import cli
from mue_hf.evaluation.settings import known_sweeps
from mue_hf.inference.predict import predict
from mue_hf.model.criteria_mue import CRITERIA, THRESHOLD_OPTIONS, Criterion, register_criterion

SCORES = ["--tokenizer", "plain", "--metrics", "bleu", "--resamples", "20", "--time-rows", "0"]


class Ratio(Criterion):
    """About the decoder, with an option of its own meaning: no score has a bound."""

    name = "ratio"
    summary = "the best token is so many times as probable as the second"
    needs_logits = True

    @classmethod
    def sweep(cls, num_layers):
        return (1e9, 1.5, 1.0)

    def score(self, states):
        best = states.logits().softmax(-1).topk(2, dim=-1).values
        return best[:, 0] / best[:, 1]


class Change(Criterion):
    """About all streams, and rows exit below the threshold."""

    name = "change"
    summary = "the layer's output is near to its input"
    in_encoder = True
    exits_above = False
    sweep_options = THRESHOLD_OPTIONS

    @classmethod
    def sweep(cls, num_layers):
        return (0.0, 0.5, 9.0)

    def score(self, states):
        norms = [linalg.vector_norm(x.flatten(1), dim=1) for x in (states.current - states.previous, states.previous)]
        return norms[0] / norms[1]


@pytest.fixture(params=[Ratio, Change], ids=["decoder", "all streams"])
def criterion(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield register_criterion(request.param)
    del CRITERIA[request.param.name]


def test_evaluate_sweeps_it(criterion, checkpoint, capsys):
    sweep, output = criterion.name, ["--output", "points.jsonl", "--json", *SCORES]
    arguments = ["captioning", "--model", str(checkpoint), "--data", "scenes:1:4", "--sweep", sweep, *output]
    assert cli.main(["evaluate", *arguments]) == 0
    full, careful, middle, fast = map(json.loads, capsys.readouterr().out.splitlines())
    assert [one["name"] for one in (careful, middle, fast)] == [f"{sweep} {v:g}" for v in criterion.sweep(3)]
    assert careful["depth"] == full["depth"] and full["depth"]["decoder"] == 3
    assert full["depth"]["decoder"] >= middle["depth"]["decoder"] > fast["depth"]["decoder"] == 1
    assert fast["depth"]["image"] == (1 if criterion.in_encoder else 3)
    parts = {f"{sweep}-{part}" for part in ("encoder", "decoder")} if criterion.in_encoder else set()
    assert {name for name in known_sweeps() if name.startswith(sweep)} == {sweep, *parts}


def test_calibrate_takes_it(criterion, checkpoint, capsys, monkeypatch):
    tried, real = [], predict

    def recorded(*args, **kwargs):
        found = real(*args, **kwargs)
        tried.append((args[4], found))
        return found

    monkeypatch.setattr("mue_hf.calibration.runner.predict", recorded)
    data = ["--task", "captioning", "--data", "scenes:3:24", "--split", "test", "--compute", "0.99", "--dry-run"]
    settings = ["--criterion", criterion.name, "--num-thresholds", "3", "--candidates", "2"]
    assert cli.main(["calibrate", str(checkpoint), *data, *settings]) == 0
    assert "of full depth's FLOPs" in capsys.readouterr().out
    own = [(options, found) for options, found in tried if options["exit_criterion"] == criterion.name]
    open_streams = ["image", "text", "decoder"] if criterion.in_encoder else ["decoder"]
    for stream in open_streams:
        depths = {}
        for options, found in own:
            others = [THRESHOLD_OPTIONS[other] for other in ("image", "text", "decoder") if other != stream]
            # what is left open runs in full, whichever way the criterion looks
            if all(options[name] == [None] * 3 for name in others):
                depths[options[THRESHOLD_OPTIONS[stream]]] = found[0]
        assert depths.keys() == set(criterion.sweep(3))
        reached = [vars(one)[f"{stream}_exit_layers"] for one in depths.values()]
        assert len(set(reached)) > 1
        for one in depths.values():
            assert stream == "image" or one.image_exit_layers == 3
            assert stream == "text" or one.text_exit_layers == 3
            assert stream == "decoder" or set(one.decoder_exit_layers) == {3}


def test_help_and_errors_name_it(criterion, checkpoint, capsys):
    for command in ("evaluate", "calibrate"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert criterion.name in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "captioning", "--sweep", "nosuch"])
    assert f", {criterion.name}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["calibrate", str(checkpoint), "--criterion", "nosuch"])
    assert criterion.name in capsys.readouterr().err
