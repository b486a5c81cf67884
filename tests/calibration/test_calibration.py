"""Calibration: replayed depths against real runs, the promise on synthetic draws, presets, and the command."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_parts

from mue_hf import MuEForConditionalGeneration, MuEImageProcessor, MuEProcessor, cli
from mue_hf.calibration import calibrate, write_preset
from mue_hf.calibration.bounds import smallest_budget
from mue_hf.calibration.certify import Outcome, certify, check_size, control, split_images
from mue_hf.calibration.goal import Goal
from mue_hf.calibration.runner import Runner, Split
from mue_hf.calibration.search import Candidate, pareto_path, thinned
from mue_hf.data.features import cache_trunk_features
from mue_hf.evaluation.measure import Meter
from mue_hf.evaluation.rows import describe_rows
from mue_hf.evaluation.signals import SignalRecorder, answer_tokens, replay, without_decay
from mue_hf.evaluation.thresholds import candidate_thresholds, depth_thresholds
from mue_hf.inference.predict import predict
from mue_hf.metrics.rewards import CiderDReward
from mue_hf.model.criteria_mue import ExitPolicy
from mue_hf.model.exit_options_mue import resolve_options
from mue_hf.model.generation_mue import weights_fingerprint

# Of the fixtures `scenes` and `statements`. Most draws of random weights give outputs that depend on depth; the loss
# of the held-out split is then well above 0.
IMAGES = 24


def make_parts(dtype=torch.float32, **overrides):
    return byte_parts(image_size=48, dtype=dtype, **overrides)


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture
def checkpoint(parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="module")
def data(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for index, scene in enumerate(scenes):
        scene["image"].save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "captions": list(scene["references"]), "split": "dev"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "captions.jsonl"


def calibrated(parts, rows, task, **options):
    return calibrate(*parts, describe_rows(rows), task, progress=False, **options)


def record(model, processor, rows, task, options=None, tokens=None):
    with SignalRecorder(model, tokens) as recorder:
        full = predict(model, processor, rows, task, options, batch_size=5, progress=False)
    return recorder.signals, full


class TestSignals:
    @pytest.mark.parametrize("per_layer", [False, True], ids=["one threshold", "per layer"])
    @pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "joint"])
    @pytest.mark.parametrize("min_layers", [1, 2])
    def test_replayed_encoder_depths_are_those_of_a_run(self, min_layers, decomposed, per_layer, statements):
        parts = make_parts(modality_decomposition=decomposed)
        rows = [
            row | {"image": None if index // 2 in (1, 4) else row["image"]} for index, row in enumerate(statements)
        ][:16]
        signals, _ = record(*parts, rows, "entailment")
        seen = set()
        for stream, cosines in signals.encoder.items():
            found = candidate_thresholds(cosines, 4, per_layer=per_layer, min_layers=min_layers)
            assert found
            for thresholds in found:
                every = thresholds if per_layer else [thresholds] * 3
                depths = replay(cosines, every, min_layers).tolist()
                options = {f"{stream}_exit_threshold": thresholds, "exit_min_layers": min_layers}
                real = predict(*parts, rows, "entailment", options, batch_size=3, progress=False)
                if stream != "text":
                    assert [one.image_exit_layers for one in real] == [
                        0 if row["image"] is None else depth for row, depth in zip(rows, depths, strict=True)
                    ]
                if stream != "image":
                    assert [one.text_exit_layers for one in real] == depths
                seen |= set(depths)
        assert {min_layers, 3} <= seen

    @pytest.mark.parametrize("beams", [1, 3])
    def test_first_token_of_the_decoder(self, beams, parts, scenes):
        options = {"num_beams": beams, "max_new_tokens": 3, "min_new_tokens": 3}
        signals, _ = record(*parts, scenes, "captioning", options)
        rows = len(scenes) * beams
        assert signals.rows.tolist() == [row for row in range(rows) for _ in range(3)]
        assert signals.steps.tolist() == [0, 1, 2] * rows
        assert signals.samples.tolist() == [row // beams for row in range(rows)]
        for thresholds in candidate_thresholds(signals.decoder, 3):
            depths = replay(signals.decoder, [thresholds] * 4)[signals.steps == 0][::beams]
            options = {"decoder_exit_threshold": thresholds, "max_new_tokens": 1, "num_beams": beams}
            real = predict(*parts, scenes, "captioning", options, progress=False)
            assert [one.decoder_exit_layers[0] for one in real] == depths.tolist()

    def test_answers_are_one_decision_per_place_where_they_part(self, parts, statements):
        model, processor = parts
        signals, full = record(model, processor, statements[:8], "entailment")
        contexts = len(full[0].decoder_exit_layers)
        assert len(signals.decoder) == 8 * contexts
        assert not signals.steps.any()
        for thresholds in candidate_thresholds(signals.decoder, 3):
            depths = replay(signals.decoder, [thresholds] * 4).view(8, contexts).tolist()
            options = {"decoder_exit_threshold": thresholds}
            real = predict(model, processor, statements[:8], "entailment", options, progress=False)
            assert [list(one.decoder_exit_layers) for one in real] == depths

    def test_agreement_is_with_the_last_layer_among_the_tokens_that_count(self, parts, scenes):
        options = {"max_new_tokens": 2}
        signals, _ = record(*parts, scenes, "captioning", options)
        assert signals.agreeing[:, -1].all()
        assert not signals.agreeing.all()
        single, _ = record(*parts, scenes, "captioning", options, tokens=[7])
        assert single.agreeing.all()

    def test_recording_changes_nothing_and_ends(self, parts, scenes):
        _, full = record(*parts, scenes, "captioning")
        again = predict(*parts, scenes, "captioning", progress=False)
        assert [one.token_ids for one in full] == [one.token_ids for one in again]
        assert not parts[0].get_encoder()._forward_hooks
        assert not parts[0].get_decoder()._forward_pre_hooks

    @pytest.mark.parametrize("beta", [1.0, 0.9, 0.3])
    def test_decay_is_that_of_the_policy(self, beta):
        generator = torch.Generator().manual_seed(0)
        cosines = torch.rand(40, 3, generator=generator, dtype=torch.float64)
        steps = torch.arange(40) % 10
        thresholds = (0.4, None, 0.7)
        depths = replay(without_decay(cosines, steps, 10, beta, 0.5), thresholds)
        policy = ExitPolicy("similarity", thresholds, beta=beta, tau=0.5)
        for row in range(40):
            now = policy.at_step(int(steps[row]), 10)
            assert replay(cosines[row : row + 1], now.thresholds) == depths[row]


class TestCandidateThresholds:
    def test_are_spread_from_careful_to_fast(self):
        cosines = torch.rand(200, 5, generator=torch.Generator().manual_seed(0))
        means = [replay(cosines, [one] * 5).double().mean().item() for one in candidate_thresholds(cosines, 4)]
        assert means == sorted(means, reverse=True)
        assert np.allclose(means, [4, 3, 2, 1], atol=0.3)

    def test_purity_decides_per_layer_in_the_decoder(self):
        # The first layer agrees only above 0.5, and lives on another scale than the others.
        cosines = torch.stack([torch.linspace(0, 1, 101), torch.full((101,), 0.99), torch.ones(101)], dim=1)
        agreeing = torch.stack([cosines[:, 0] > 0.5, *[torch.ones(101, dtype=torch.bool)] * 2], dim=1)
        careful = candidate_thresholds(cosines, 5, agreeing=agreeing, per_layer=True)[0]
        assert careful[0] == pytest.approx(0.505, abs=0.01)
        assert careful[1] < 0.99
        assert careful[2] is None

    @pytest.mark.parametrize("min_layers", [1, 3])
    def test_open_layers_alone_count(self, min_layers):
        assert candidate_thresholds(torch.rand(9, 1), 3) == []
        cosines = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
        for per_layer in (False, True):
            for one in candidate_thresholds(cosines, 3, per_layer=per_layer, min_layers=min_layers):
                every = one if per_layer else [one] * 4
                assert replay(cosines, every, min_layers).min() >= min_layers

    @pytest.mark.parametrize("per_layer", [False, True])
    def test_a_constant_prompt_has_thresholds(self, per_layer):
        noise = 1e-8 * torch.rand(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        cosines = torch.tensor([0.3, 0.7, 0.5, 0.9, 0.4]).double() + noise
        found = candidate_thresholds(cosines, 5, per_layer=per_layer)
        depths = [set(replay(cosines, one if per_layer else [one] * 5).tolist()) for one in found]
        assert depths == [{4}, {2}, {1}]

    def test_rows_without_the_stream_are_left_out(self):
        cosines = torch.full((3, 4), torch.nan)
        assert candidate_thresholds(cosines, 3) == []
        assert replay(cosines, [0.5] * 4).tolist() == [0, 0, 0]


class TestSearch:
    def test_path_is_what_nothing_beats(self):
        image = [Candidate({"image": 1}, 0.9, 0.0), Candidate({"image": 2}, 0.7, 0.2)]
        decoder = [Candidate({"decoder": 1}, 0.8, 0.01), Candidate({"decoder": 2}, 0.8, 0.5)]
        path = pareto_path([image, decoder])
        assert [one.options for one in path] == [
            {"image": 1},
            {"image": 1, "decoder": 1},
            {"image": 2, "decoder": 1},
        ]
        assert [one.cost for one in path] == pytest.approx([0.9, 0.7, 0.5])
        assert pareto_path([[Candidate({}, 1.1, 0.0)]]) == []

    def test_thinning_keeps_the_ends(self):
        path = [Candidate({}, 1 - step / 20, step / 100) for step in range(1, 15)]
        kept = thinned(path, 0.1, 4)
        assert [one.risk for one in kept] == pytest.approx([0.01, 0.04, 0.07, 0.1])
        assert thinned(path, 0.001, 4) == path[:1]

    def test_split_is_by_image_and_seeded(self):
        ids = [f"image {number // 3}" for number in range(60)]
        a, b = split_images(ids, 0.3, seed=1)
        assert (len(a), len(b)) == (6, 14)
        assert sorted(row for image in a + b for row in image) == list(range(60))
        assert all(len({ids[row] for row in image}) == 1 for image in a + b)
        assert split_images(ids, 0.3, seed=1) == (a, b)
        assert split_images(ids, 0.3, seed=2) != (a, b)
        assert b != sorted(b)

    def test_images_are_the_units(self):
        part = Split(None, [], [1, 3, 2])
        assert part.by_image([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]) == pytest.approx([1, 2 / 3, 0])

    def test_testing_stops_at_the_first_failure(self):
        losses = {1: 0.0, 2: 0.5, 3: 0.0}
        runs = []

        def measure(options):
            runs.append(options["setting"])
            return Outcome(np.full(200, losses[options["setting"]]), 0.5, 0.5, 0.5)

        path = [Candidate({"setting": setting}, 0.5, 0.0) for setting in losses]
        tested, certified = certify(path, measure, 0.1, 0.05, "hoeffding-bentkus")
        assert (runs, certified) == ([1, 2], 1)
        assert tested[0].bound == pytest.approx(smallest_budget(200))

    @pytest.mark.parametrize("method", ["hoeffding-bentkus", "betting"])
    def test_promise_holds_on_fresh_draws(self, method):
        """An image changes its output under a setting with a probability of its own; streams add up."""
        budget, delta = 0.1, 0.05
        # One of each stream alone is a hair above the budget, where certificates are easiest to get wrongly.
        true_risk = {"image": [0.0, 0.03, 0.08, 0.1001], "decoder": [0.02, 0.05, 0.1001, 0.3]}
        savings = [0.05, 0.15, 0.25, 0.35]
        wrong = some = lucky = 0
        for draw in range(200):
            rng = np.random.default_rng(draw)

            def losses(options, images, rng=rng):
                kept = math.prod(1 - true_risk[stream][setting] for stream, setting in options.items())
                return (rng.random(images) > kept).astype(float)

            streams = [
                [
                    Candidate({stream: setting}, 1 - saving, losses({stream: setting}, 100).mean())
                    for setting, saving in enumerate(savings)
                ]
                for stream in true_risk
            ]
            path = thinned(pareto_path(streams), 2 * budget, 8)
            tested, certified = certify(
                path, lambda options, losses=losses: Outcome(losses(options, 300), 1, 1, 1), budget, delta, method
            )
            risks = [1 - math.prod(1 - true_risk[s][setting] for s, setting in one.options.items()) for one in tested]
            wrong += any(risk > budget for risk in risks[:certified])
            some += certified > 0
            lucky += any(risk > budget >= one.loss for risk, one in zip(risks, tested, strict=True))
        # Were the promise kept with probability .95 exactly, 21 or more would have probability .001.
        assert wrong <= 20
        assert some >= 150
        # Whoever trusted the mean of the sample would break it often.
        assert lucky > 20

    @pytest.mark.parametrize("noise", [0.0, 0.3], ids=["monotone", "not monotone"])
    def test_expectation_holds_over_draws(self, noise):
        """True risk of what conformal risk control chooses, on average over calibrations: within the budget, and near
        it where losses are monotone. A candidate's risk is its number; some changed outputs change back by chance."""
        budget, images, draws = 0.1, 40, 3000
        risks = np.linspace(0.0, 0.4, 101)
        path = [Candidate({"risk": risk}, 1 - risk, risk) for risk in risks]
        chosen = []
        for draw in range(draws):
            rng = np.random.default_rng(draw)
            fragile = rng.random(images)

            def measure(options, rng=rng, fragile=fragile):
                changed = (fragile < options["risk"]) & (rng.random(images) >= noise)
                return Outcome(changed.astype(float), 1, 1, 1)

            tested, kept = control(path, measure, budget)
            assert len(tested) == kept + 1 and tested[kept].bound > budget
            # nothing else than full depth was kept, or the last one
            chosen.append((1 - noise) * risks[kept - 1] if kept else 0.0)
        error = np.std(chosen) / math.sqrt(draws)
        # Without the image more, a fifth change would be allowed, and .122 on average.
        assert np.mean(chosen) <= budget + 3 * error
        assert noise or np.mean(chosen) > 0.09

    def test_an_image_keeps_its_largest_loss(self):
        """Else losses that move from image to image would look like none that grow."""
        losses = {1: [1.0, 0.0, 0.0], 2: [0.0, 1.0, 0.0], 3: [0.0, 0.0, 1.0]}
        path = [Candidate({"setting": setting}, 0.5, 0.0) for setting in losses]

        def measure(options):
            return Outcome(np.array(losses[options["setting"]] + [0.0] * 6), 0.5, 0.5, 0.5)

        tested, kept = control(path, measure, 0.3)
        assert [one.bound for one in tested] == pytest.approx([0.2, 0.3, 0.4]) and kept == 2
        assert {one.loss for one in tested} == {1 / 9} and {one.pvalue for one in tested} == {None}


class TestCalibrate:
    @pytest.mark.parametrize(
        ("task", "risk", "options"),
        [
            ("captioning", "disagreement", {"per_layer": True, "options": {"num_beams": 2, "exit_kv": "copy"}}),
            ("captioning", "metric", {"betas": (1.0, 0.9)}),
            ("entailment", "disagreement", {"prompt_type": "none", "objective": "time"}),
            ("entailment", "metric", {"per_layer": True, "method": "betting"}),
            ("captioning", "disagreement", {"criteria": ("confidence",), "betas": (1.0, 0.8)}),
            ("entailment", "disagreement", {"criteria": ("entropy", "patience", "margin"), "objective": "calls"}),
            ("captioning", "metric", {"criteria": ("fixed",), "options": {"num_beams": 2, "exit_min_layers": 2}}),
        ],
        ids=["captions", "CIDEr", "answers", "accuracy", "confidence", "several", "fixed"],
    )
    def test_preset_is_certified_and_keeps_its_loss_in_real_runs(
        self, task, risk, options, parts, scenes, statements, monkeypatch
    ):
        def by_layers(*args, **kwargs):
            """What each row takes, without the noise of a clock."""
            found = predict(*args, **kwargs)
            layers = [one.image_exit_layers + one.text_exit_layers + sum(one.decoder_exit_layers) for one in found]
            return [replace(one, seconds=float(count)) for one, count in zip(found, layers, strict=True)]

        monkeypatch.setattr("mue_hf.calibration.runner.predict", by_layers)
        model, processor = parts
        rows = scenes if task == "captioning" else statements
        found = calibrated(parts, rows, task, budget=0.9, risk=risk, num_thresholds=2, candidates=3, **options)
        preset = found.preset
        assert preset is not None
        assert preset["n"] == IMAGES - round(0.3 * IMAGES)
        assert (preset["budget"], preset["delta"], preset["risk"]) == (0.9, 0.05, risk)
        assert preset["loss"] <= preset["bound"] <= 0.9
        assert preset["flops"] < 1
        assert preset["weights_fingerprint"] == weights_fingerprint(model)
        assert json.loads(json.dumps(preset)) == preset
        # By name, on a model with other options saved, it runs what was tested.
        saved = {"exit_presets": {"mine": preset}, "image_exit_threshold": 0.1, "exit_kv": "exact", "exit_warmup": 0.5}
        exits = {name: value for name, value in preset.items() if "exit" in name}
        assert resolve_options({"exit_preset": "mine"}, {}, saved, model.config) == resolve_options(
            exits, {}, {}, model.config
        )
        others = {name: value for name, value in options.get("options", {}).items() if "exit" not in name}
        prompt = {"prompt_type": options.get("prompt_type", "prev_output")}
        full, real = (
            predict(model, processor, rows, task, others | some, progress=False, **prompt)
            for some in ({"exit_criterion": "never"}, exits)
        )
        _, test = split_images([row["image_id"] for row in rows], 0.3, 0)
        if risk == "disagreement":
            changed = [np.mean([full[row].output != real[row].output for row in image]) for image in test]
            assert np.mean(changed) == pytest.approx(preset["loss"])

    @pytest.mark.parametrize("task", ["captioning", "entailment"])
    def test_calls_are_those_of_a_row_alone(self, task, parts, scenes, statements):
        """Counted by hooks, at batch 1, with keys and values of full depth."""
        rows, calls = (scenes if task == "captioning" else statements)[:6], []
        options = {"exit_criterion": "confidence", "decoder_exit_threshold": 0.02, "image_exit_threshold": 0.5}
        options |= {"exit_kv": "exact"}
        model, processor = parts
        goal = Goal(task, "disagreement", 0.5, None, "calls", 0.05, "betting")
        runner = Runner(model, processor, describe_rows(rows), goal, {}, 1, "prev_output")
        layers = [*model.get_encoder().layers, *model.get_decoder().layers]
        hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
        counts = []
        for exits in (options, {"exit_criterion": "never"}):
            calls.clear()
            found = predict(model, processor, rows, task, exits, batch_size=1, progress=False)
            counts.append(len(calls))
            assert runner._calls(found) == len(calls)
        for hook in hooks:
            hook.remove()
        assert counts[0] < counts[1]

    def test_streams_that_may_not_exit_run_whole(self, parts, scenes):
        how = {"budget": 0.9, "candidates": 3, "criteria": ("fixed",)}
        for streams in (["decoder"], ["image", "text"]):
            tested = calibrated(parts, scenes, "captioning", streams=streams, **how).tested
            exits = {name for one in tested for name in one.options} - {"exit_criterion"}
            assert exits and exits <= {f"{stream}_exit_layer" for stream in streams}

    @pytest.mark.parametrize("decomposed", [True, False], ids=["streams", "joint"])
    def test_encoder_depths_are_tried_beside_a_criterion_of_the_decoder(self, decomposed, statements):
        parts, stream = make_parts(modality_decomposition=decomposed), "image" if decomposed else "encoder"
        option, depths = f"{stream}_exit_threshold", (2, 1)
        how = {"budget": 0.95, "num_thresholds": 1, "candidates": 9, "criteria": ("confidence",), "streams": [stream]}
        tried = [
            [one.options[option] for one in calibrated(parts, statements, "entailment", **how, **more).tested]
            for more in ({}, {"encoder_depths": True})
        ]
        fixed = [depth_thresholds(depth, 3) for depth in depths]
        assert not any(one in fixed for one in tried[0])
        assert any(one in fixed for one in tried[1])
        for depth, thresholds in zip(depths, fixed, strict=True):
            found = predict(*parts, statements[:6], "entailment", {option: thresholds}, progress=False)
            assert {one.image_exit_layers for one in found} == {depth}

    def test_a_preset_notes_what_it_holds_for(self, parts, scenes, statements):
        """The settings in force, the model's own among them, and which guarantee it is."""
        model, processor = make_parts()
        model.generation_config.no_repeat_ngram_size = 4
        options = {"num_beams": 2, "repetition_penalty": 1.5, "max_new_tokens": 5}
        how = {"budget": 0.9, "num_thresholds": 1, "candidates": 1, "batch_size": 5}
        preset = calibrated((model, processor), scenes, "captioning", options=options, **how).preset
        settings = {"do_sample": False, "no_repeat_ngram_size": 4, "length_penalty": 1.0}
        assert preset["certified_for"] == options | settings | {"batch_size": 5, "dtype": "float32"}
        assert preset["guarantee"] == "confidence"
        how["guarantee"] = "expectation"
        preset = calibrated((model, processor), statements, "entailment", **how).preset
        assert preset["certified_for"] == {"batch_size": 5, "dtype": "float32"}
        assert preset["guarantee"] == "expectation" and not {"delta", "method"} & preset.keys()
        n = preset["n"]
        assert (n * preset["loss"] + 1) / (n + 1) - 1e-9 <= preset["bound"] <= 0.9

    @pytest.mark.parametrize(
        "saved",
        [
            {
                "image_exit_threshold": -1.01,
                "decoder_exit_threshold": -1.01,
                "exit_warmup": 0.5,
                "exit_decay_beta": 0.5,
            },
            {"exit_criterion": "fixed", "image_exit_layer": 1, "text_exit_layer": 1, "decoder_exit_layer": 1},
            {"exit_criterion": "patience", "exit_patience": 1, "text_exit_threshold": -1.01, "exit_min_layers": 2},
        ],
        ids=["thresholds", "depths", "patience"],
    )
    @pytest.mark.parametrize("criterion", ["similarity", "entropy", "patience", "fixed"])
    def test_saved_exits_do_not_reach_the_runs(self, criterion, saved, scenes):
        options = {"budget": 0.9, "num_thresholds": 2, "candidates": 2, "criteria": criterion}
        model, processor = make_parts()
        expected = calibrated((model, processor), scenes, "captioning", **options)
        for name, value in saved.items():
            setattr(model.generation_config, name, value)
        assert model.generation_config.to_dict().items() >= saved.items()
        found = calibrated((model, processor), scenes, "captioning", **options)
        assert [replace(one, seconds=0.0) for one in found.tested] == [
            replace(one, seconds=0.0) for one in expected.tested
        ]

    @pytest.mark.parametrize("criterion", ["confidence", "entropy", "patience", "fixed"])
    def test_looks_at_the_head_are_paid(self, criterion, parts, scenes, monkeypatch):
        tried, real = [], Runner.outcome

        def outcome(runner, part, full, exits):
            tried.append((exits, real(runner, part, full, exits)))
            return tried[-1][1]

        monkeypatch.setattr(Runner, "outcome", outcome)
        calibrated(parts, scenes, "captioning", budget=0.9, num_thresholds=3, candidates=2, criteria=[criterion])
        exits, found = next(one for one in tried if one[0].get("exit_criterion") == criterion)
        images, _ = split_images([row["image_id"] for row in scenes], 0.3, 0)
        rows = [scenes[row] for image in images for row in image]
        meter = Meter(*parts, "captioning", rows, {})
        ran, everything = (
            meter.flops(predict(*parts, rows, "captioning", some, progress=False), some)["mean"]
            for some in (exits, {"exit_criterion": "never"})
        )
        assert found.flops == pytest.approx(ran / everything)

    def test_the_better_criterion_is_taken(self, parts, scenes):
        options = {"budget": None, "compute": 0.9, "num_thresholds": 4}
        similarity, fixed, both = (
            calibrated(parts, scenes, "captioning", criteria=names, **options).preset | {"seconds": None}
            for names in (["similarity"], ["fixed"], ["similarity", "fixed"])
        )
        assert (fixed["exit_criterion"], similarity["exit_criterion"]) == ("fixed", "similarity")
        assert both in (similarity, fixed)

    def test_joint_encoder(self, scenes):
        found = calibrated(
            make_parts(modality_decomposition=False), scenes, "captioning", budget=0.9, num_thresholds=2
        )
        assert {"encoder_exit_threshold", "decoder_exit_threshold"} & found.preset.keys()

    def test_compute_budget_gives_the_bound_of_its_loss(self, parts, scenes):
        found = calibrated(parts, scenes, "captioning", budget=None, compute=0.9, num_thresholds=3)
        assert len(found.tested) == 1
        assert found.preset["compute"] == 0.9
        assert "budget" not in found.preset
        assert found.preset["loss"] < found.preset["bound"]
        assert found.preset["flops"] < 1
        with pytest.raises(ValueError, match=r"`compute` must be reachable, got 0.001, .* reach 0\.\d+ of the flops"):
            calibrated(parts, scenes, "captioning", budget=None, compute=0.001, num_thresholds=1)

    @pytest.mark.parametrize("task", ["captioning", "entailment"])
    def test_interrupted_calibration_goes_on(self, task, parts, scenes, statements, tmp_path, monkeypatch):
        rows = scenes if task == "captioning" else statements
        options = {"budget": 0.9, "num_thresholds": 2, "candidates": 2, "folder": tmp_path / "runs"}
        real, calls = predict, []

        def interrupted(*args, **kwargs):
            calls.append(args[4])
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr("mue_hf.calibration.runner.predict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrated(parts, rows, task, **options)
        found = calibrated(parts, rows, task, **options)
        # The first three runs were not repeated.
        assert calls[3] == calls[4]
        count = len(calls)
        again = calibrated(parts, rows, task, **options)
        assert len(calls) == count
        assert again == found
        expected = calibrated(parts, rows, task, **options | {"folder": None})
        timeless = [replace(one, seconds=0.0) for one in found.tested]
        assert timeless == [replace(one, seconds=0.0) for one in expected.tested]
        assert not list((tmp_path / "runs").glob("*.part"))
        # Other weights are another matter, and so are pictures of another size, and features in their place.
        model, processor = make_parts()
        other_size = MuEProcessor(MuEImageProcessor(size={"height": 32, "width": 32}), processor.tokenizer)
        for others in (make_parts(seed=1), (model, other_size)):
            count = len(calls)
            calibrated(others, rows, task, **options)
            assert len(calls) > count + 3
        count = len(calls)
        features = cache_trunk_features(model, processor, rows, tmp_path / "features", dtype=torch.float32)
        data = replace(describe_rows(rows), rows=features)
        calibrate(model, processor, data, task, progress=False, **options)
        assert len(calls) > count + 3

    def test_answers_are_decided_among_the_same_tokens_as_in_evaluation(
        self, parts, checkpoint, statements, monkeypatch, tmp_path
    ):
        seen = []

        class Watched(SignalRecorder):
            def __init__(self, model, tokens=None):
                seen.append(list(tokens))
                super().__init__(model, tokens)

        monkeypatch.setattr("mue_hf.calibration.runner.SignalRecorder", Watched)
        monkeypatch.setattr("mue_hf.evaluation.run.SignalRecorder", Watched)
        calibrated(parts, statements, "entailment", budget=0.9, num_thresholds=1)
        arguments = ["--model", str(checkpoint), "--data", "scenes:1:1", "--output", str(tmp_path / "points.jsonl")]
        arguments += ["--sweep", "similarity-decoder", "--thresholds-split", "dev", "--thresholds-rows", "2"]
        assert cli.main(["evaluate", "entailment", *arguments, "--time-rows", "0"]) == 0
        assert seen[0] == seen[1] == answer_tokens(parts[1])

    def test_tokens_of_answers_are_those_of_branching_nodes(self, parts, monkeypatch):
        _, processor = parts
        first = [ids[1] for ids in processor.encode_answers(["yes", "no", "maybe"])]
        assert answer_tokens(processor) == sorted(first)
        # "no" ends where "not" goes on
        monkeypatch.setattr(processor, "entailment_answers", {"a": "no", "b": "not"})
        end = processor.encode_answers(["not"])[0][-1]
        assert answer_tokens(processor) == sorted([end, processor.tokenizer.eos_token_id])

    def test_old_name_of_num_thresholds(self, parts, scenes):
        options = {"budget": 0.9, "candidates": 1, "criteria": "confidence"}
        expected = calibrated(parts, scenes, "captioning", num_thresholds=1, **options)
        with pytest.warns(FutureWarning, match="`levels` of `calibrate` is now `num_thresholds`"):
            found = calibrated(parts, scenes, "captioning", levels=1, **options)
        assert [one.options for one in found.tested] == [one.options for one in expected.tested]

    def test_nothing_is_promised_where_nothing_holds(self, parts, scenes, monkeypatch):
        everything = Outcome(np.ones(IMAGES), 0.5, 0.5, 0.5)
        monkeypatch.setattr("mue_hf.calibration.runner.Runner.outcome", lambda *_: everything)
        found = calibrated(parts, scenes, "captioning", budget=0.7, num_thresholds=1)
        assert found.preset is None
        assert [one.pvalue for one in found.tested] == [1.0]

    def test_too_few_images_say_what_would_do(self, parts, scenes, monkeypatch):
        monkeypatch.setattr("mue_hf.calibration.runner.predict", None)
        smallest = smallest_budget(IMAGES - round(0.3 * IMAGES))
        with pytest.raises(ValueError, match=rf"at least {math.ceil(smallest * 1000) / 1000} for the 17 images"):
            calibrated(parts, scenes, "captioning", budget=0.05)
        goal = Goal("captioning", "disagreement", 0.05, None, "flops", 0.05, "hoeffding-bentkus")
        check_size(59, goal)
        with pytest.raises(ValueError, match=r"at least 0\.0504 for the 58 images .*about 59"):
            check_size(58, goal)
        expected = replace(goal, guarantee="expectation")
        check_size(19, expected)
        with pytest.raises(ValueError, match=r"at least 0\.0527 for the 18 images .* in expectation.*about 19"):
            check_size(18, expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"budget": 0.0}, "`budget` must be above 0 and below 1, got 0.0"),
            ({"compute": 0.5}, "`budget` or `compute` must be given, got 0.9 and 0.5"),
            ({"delta": 1.0}, "`delta` must be above 0"),
            ({"search_share": 1.0}, "`search_share` must be above 0"),
            ({"risk": "regret"}, "`risk` must be one of .*, got 'regret'"),
            ({"objective": "energy"}, "`objective` must be one of"),
            ({"method": "hope"}, "`method` must be one of"),
            ({"guarantee": "surely"}, "`guarantee` must be one of .*, got 'surely'"),
            (
                {"guarantee": "expectation", "budget": None, "compute": 0.5},
                "must go with a `budget`, got `compute=0.5`",
            ),
            ({"streams": ()}, r"`streams` must be one or more of \['image', 'text', 'decoder'\].*, got \[\]"),
            ({"streams": ["encoder"]}, r"`streams` must be .*, got \['encoder'\]"),
            ({"betas": ()}, "`betas` must be at least 1"),
            ({"criteria": ()}, "`criteria` must be at least 1"),
            ({"criteria": ("never",)}, "`criteria` must be one of .*, got 'never'"),
            ({"betas": (0.0,)}, "`betas` must be above 0 and at most 1"),
            ({"num_thresholds": 0}, "`num_thresholds` must be at least 1"),
            ({"options": {"decoder_exit_threshold": 0.5}}, "`options` may hold .* got \\['decoder_exit_threshold'"),
            ({"options": {"do_sample": True}}, "`do_sample` must be False"),
            ({"task": "translation"}, "`task` must be one of"),
            ({"rows": 1}, "at least two images"),
            ({"risk": "metric", "task": "entailment", "labels": False}, "`data` must have `label`"),
        ],
    )
    def test_bad_input_is_refused_before_the_first_run(self, arguments, message, parts, scenes, monkeypatch):
        monkeypatch.setattr("mue_hf.calibration.runner.predict", None)
        given = {"task": "captioning", "budget": 0.9, "rows": IMAGES, "labels": True} | arguments
        rows = scenes[: given.pop("rows")]
        if not given.pop("labels"):
            rows = [{name: value for name, value in row.items() if name != "label"} for row in rows]
        with pytest.raises(ValueError, match=message):
            calibrated(parts, rows, given.pop("task"), **given)

    def test_losses_of_the_test_do_not_depend_on_each_others_references(self, parts, scenes, monkeypatch):
        """The bounds hold for independent losses: document frequencies must come from the images of the search."""
        seen = []

        class Watched(CiderDReward):
            def __init__(self, references):
                seen.append(len(references))
                super().__init__(references)

        monkeypatch.setattr("mue_hf.calibration.procedure.CiderDReward", Watched)
        options = {"budget": 0.9, "risk": "metric", "criteria": ("fixed",), "candidates": 1}
        calibrated(parts, scenes, "captioning", **options)
        assert seen == [round(0.3 * IMAGES)]


class TestPresets:
    PRESET = {"decoder_exit_threshold": [0.1, None, 0.3, None], "budget": 0.05, "weights_fingerprint": "none of these"}

    def test_other_presets_and_settings_stay(self, checkpoint):
        path = checkpoint / "generation_config.json"
        before = json.loads(path.read_text())
        write_preset(checkpoint, "first", {"decoder_exit_threshold": 0.5})
        write_preset(checkpoint, "second", self.PRESET)
        write_preset(checkpoint, "first", {"decoder_exit_threshold": 0.7})
        after = json.loads(path.read_text())
        assert after.pop("exit_presets") == {"first": {"decoder_exit_threshold": 0.7}, "second": self.PRESET}
        assert after == before
        assert not list(checkpoint.glob("*.part"))
        loaded = MuEForConditionalGeneration.from_pretrained(checkpoint)
        assert loaded.generation_config.exit_presets["second"] == self.PRESET

    def test_a_failed_write_leaves_the_file(self, checkpoint, monkeypatch):
        path = checkpoint / "generation_config.json"
        before = path.read_text()
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            write_preset(checkpoint, "mine", self.PRESET)
        assert path.read_text() == before
        assert not list(checkpoint.glob("*.part"))

    @pytest.mark.parametrize("name", [" ", "paper-captioning"])
    def test_names_that_are_not_ours(self, name, checkpoint):
        with pytest.raises(ValueError, match="`preset` must be a name of its own"):
            write_preset(checkpoint, name, self.PRESET)

    def test_damaged_file(self, checkpoint):
        (checkpoint / "generation_config.json").write_text("{")
        with pytest.raises(ValueError, match="whole generation_config.json"):
            write_preset(checkpoint, "mine", self.PRESET)

    def test_fingerprint_survives_saving_and_tells_dtypes_apart(self, parts, checkpoint):
        model = MuEForConditionalGeneration.from_pretrained(checkpoint)
        expected = weights_fingerprint(parts[0])
        assert weights_fingerprint(model) == expected
        assert weights_fingerprint(model.bfloat16()) != expected
        assert weights_fingerprint(model.to("meta")) is None


class TestCommand:
    ARGUMENTS = ("--task", "captioning", "--num-thresholds", "2", "--candidates", "2")

    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        """Runs are kept in the folder where the command is given."""
        monkeypatch.chdir(tmp_path)

    def test_preset_works_in_generate(self, checkpoint, data, scenes, tmp_path, capsys):
        features = tmp_path / "features"
        arguments = ["--data", str(data), "--budget", "0.9", "--preset", "fast", "--features", str(features)]
        assert cli.main(["calibrate", str(checkpoint), *self.ARGUMENTS, *arguments]) == 0
        output = capsys.readouterr().out
        assert "fast: mean loss (disagreement) of at most 0.9 with confidence 0.95, from 17 images" in output
        model = MuEForConditionalGeneration.from_pretrained(checkpoint)
        preset = model.generation_config.exit_presets["fast"]
        assert preset["n"] == 17
        assert list(features.glob("*/*.safetensors"))
        inputs = MuEProcessor.from_pretrained(checkpoint)(images=scenes[0]["image"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = model.generate(**inputs, exit_preset="fast", return_dict_in_generate=True)
        layers = model.config.encoder_layers, model.config.decoder_layers
        depths = output.image_exit_layers.tolist() + output.text_exit_layers.tolist()
        assert min(depths) < layers[0] or output.decoder_exit_layers.max() < layers[1]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
        with pytest.warns(UserWarning, match="calibrated on other weights"):
            model.save_pretrained(checkpoint)
        tuned = MuEForConditionalGeneration.from_pretrained(checkpoint)
        with pytest.warns(UserWarning, match="calibrated on other weights"):
            tuned.generate(**inputs, exit_preset="fast")

    def test_settings_to_try(self, checkpoint, data):
        arguments = ["--data", str(data), "--compute", "0.95", "--num-thresholds", "2", "--preset", "fast"]
        names = ["--criterion", "confidence", "patience", "--per-layer", "--beta", "1", "0.9"]
        assert cli.main(["calibrate", str(checkpoint), *self.ARGUMENTS, *arguments, *names]) == 0
        runs = [path.read_text() for path in Path("runs/calibration").glob("run-*.jsonl")]
        # at full depth on the held-out split; two thresholds of each encoder stream, two of confidence for each beta,
        # two of patience
        assert len(runs) >= 1 + 4 + 4 + 2

    def test_dry_run_writes_nothing(self, checkpoint, data, capsys):
        path = checkpoint / "generation_config.json"
        before = path.read_text()
        arguments = ["--data", str(data), "--compute", "0.95", "--dry-run", "--num-beams", "2"]
        assert cli.main(["calibrate", str(checkpoint), *self.ARGUMENTS, *arguments]) == 0
        assert "Nothing was written" in capsys.readouterr().out
        assert path.read_text() == before
        assert list(Path("runs/calibration").glob("run-*.jsonl"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--budget", "0.05"], "must be at least 0.162 for the 17 images"),
            (["--preset", "paper-captioning"], "must be a name of its own"),
            (["--generate", "image_exit_threshold=0.5", "--budget", "0.9"], "may hold the exit options"),
            (["--split", "nowhere"], "must hold rows of the split 'nowhere'"),
        ],
        ids=["too few", "name", "threshold", "split"],
    )
    def test_bad_input(self, arguments, message, checkpoint, data, capsys):
        before = (checkpoint / "generation_config.json").read_text()
        command = ["calibrate", str(checkpoint), *self.ARGUMENTS, "--data", str(data), *arguments]
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err
        assert (checkpoint / "generation_config.json").read_text() == before

    def test_checkpoint_must_be_a_folder(self, data, capsys):
        assert cli.main(["calibrate", "nobody/nothing", *self.ARGUMENTS, "--data", str(data)]) == 2
        assert "must be a local folder" in capsys.readouterr().err
