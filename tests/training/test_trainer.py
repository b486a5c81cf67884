"""MuETrainer on tiny models: one big batch, small ones, two processes and a resumed run end with the same weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import byte_parts, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install mue-hf[train]")

from accelerate.state import AcceleratorState

from mue_hf.data import Mixture, MuEDataCollator
from mue_hf.data.scenes import SceneDataset
from mue_hf.evaluation.processes import finish_processes
from mue_hf.inference.predict import predict
from mue_hf.metrics import entailment_metrics
from mue_hf.training.arguments import MuETrainingArguments
from mue_hf.training.trainer import MuETrainer, WeightAverage, encoder_disagreement, freeze, scst_advantages

LAYERS = 4
OPTIONS = {
    "distillation": {"self_distillation": 1.0, "label_smoothing_factor": 0.1},
    "random-depth": {"random_exit_depth": True},
    "token-share": {"intermediate_token_share": 0.5},
    "layer-weights": {"layer_weights": [0.1, 0.2, 0.3, 1.0]},
    "last-layer": {"layer_weights": [0.0, 0.0, 0.0, 1.0]},
    "average": {"ema_decay": 0.9},
    "agreement": {"encoder_agreement": 1.0, "random_exit_depth": True},
}


def samples(count: int = 8) -> list[dict[str, Tensor]]:
    """Pictures, texts, and labels of different lengths, so that small batches differ in their number of tokens."""
    inputs = tiny_inputs(count)
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(4, 99, (count, 6), generator=generator)
    for row in range(count):
        labels[row, 1 + row % 6 :] = -100
    return [{name: values[row] for name, values in inputs.items()} | {"labels": labels[row]} for row in range(count)]


def collate(items: list[dict]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def trainer(folder: Path, model: torch.nn.Module | None = None, data: list | None = None, **options) -> MuETrainer:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    extras = {name: options.pop(name) for name in ("reward", "answers") if name in options}
    return MuETrainer(
        model or tiny_model(),
        MuETrainingArguments(**defaults | options),
        train_dataset=data or samples(),
        eval_dataset=samples(5),
        data_collator=collate,
        **extras,
    )


def trained(folder: Path, **options) -> dict[str, Tensor]:
    run = trainer(folder, **options)
    run.train()
    return run.model.state_dict()


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-9) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        # batch statistics are those of the batch at hand, whatever the loss
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: name + text)


def curve(run: MuETrainer) -> list[dict[str, float]]:
    """The losses and accuracies that the run has logged."""
    return [
        {name: value for name, value in entry.items() if name.startswith(("loss", "accuracy"))}
        for entry in run.state.log_history
        if "loss" in entry
    ]


def evaluated(run: MuETrainer, folder: Path) -> dict[str, list]:
    """Losses and generated tokens of five samples, two at a time in each process."""
    checking = trainer(folder, run.model, predict_with_generate=True, per_device_eval_batch_size=2)
    output = checking.predict(samples(5), max_length=6)
    means = {name: value for name, value in output.metrics.items() if "loss" in name or "accuracy" in name}
    return {"means": means, "tokens": output.predictions.tolist(), "labels": output.label_ids.tolist()}


def assert_same_curve(ours: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(ours) == len(expected) > 0
    for one, other in zip(ours, expected, strict=True):
        # losses are sums over tokens in float32
        assert one == pytest.approx(other, rel=1e-5)


@pytest.fixture(scope="module")
def big_run(tmp_path_factory) -> MuETrainer:
    run = trainer(tmp_path_factory.mktemp("big"), label_smoothing_factor=0.1, freeze_batch_norm=True)
    run.train()
    return run


@pytest.fixture(scope="module")
def big_batch(big_run) -> dict[str, Tensor]:
    return big_run.model.state_dict()


class TestSameGradients:
    def test_accumulation(self, big_run, big_batch, tmp_path):
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        run = trainer(tmp_path, label_smoothing_factor=0.1, freeze_batch_norm=True, **options)
        run.train()
        assert_same(run.model.state_dict(), big_batch)
        assert_same_curve(curve(run), curve(big_run))

    def test_accumulation_of_agreement(self, tmp_path):
        options = {"encoder_agreement": 5.0, "freeze_batch_norm": True, "max_steps": 2}
        expected = trainer(tmp_path, **options)
        expected.train()
        small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        run = trainer(tmp_path, **options, **small)
        run.train()
        assert_same(run.model.state_dict(), expected.model.state_dict())
        assert_same_curve(
            [{"loss": one["loss"]} for one in curve(run)], [{"loss": one["loss"]} for one in curve(expected)]
        )
        without = trained(tmp_path, **options | {"encoder_agreement": 0.0})
        name = "model.encoder.layers.0.fc1.weight"
        assert not torch.allclose(without[name], expected.model.state_dict()[name], atol=1e-5)

    def test_activation_checkpointing(self, big_batch, tmp_path):
        options = {"activation_checkpointing": True, "label_smoothing_factor": 0.1, "freeze_batch_norm": True}
        assert_same(trained(tmp_path, **options), big_batch)

    def test_two_processes(self, big_run, big_batch, tmp_path):
        in_two_processes("train", tmp_path)
        result = load_file(tmp_path / "weights.safetensors")
        assert_same(result, {name: big_batch[name] for name in result})
        found = json.loads((tmp_path / "found.json").read_text())
        assert_same_curve(found["curve"], curve(big_run))
        # five samples do not fill the batches of two processes
        expected = evaluated(big_run, tmp_path)
        assert found["means"] == pytest.approx(expected["means"], rel=1e-5)
        assert (found["tokens"], found["labels"]) == (expected["tokens"], expected["labels"])

    @pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on CPUs")
    def test_fully_sharded(self, tmp_path):
        model, batch = tiny_model().train(), collate(samples(4))
        run = trainer(tmp_path, model, self_distillation=1.0, freeze_batch_norm=True)
        loss = run.compute_loss(model, batch, num_items_in_batch=batch["labels"].numel())
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        in_two_processes("shard", tmp_path)
        found = load_file(tmp_path / "gradients.safetensors")
        assert_same(found, expected)
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert metrics["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-6)

    @pytest.mark.parametrize("step", [2, 3], ids=["between epochs", "within an epoch"])
    def test_resumed_run(self, step, tmp_path):
        options = {"save_strategy": "steps", "save_steps": step, "ema_decay": 0.9, "random_exit_depth": True}
        model = tiny_model(dropout=0.1)
        expected = trained(tmp_path, model=model, **options)
        run = trainer(tmp_path, model=tiny_model(dropout=0.1), **options)
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert run.state.global_step == 4
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name

    def test_resumed_run_on_images_and_texts_in_turn(self, tmp_path):
        texts = [{name: values for name, values in item.items() if name != "pixel_values"} for item in samples(3)]

        def run() -> MuETrainer:
            mixture = Mixture([samples(5), texts], [0.5, 0.5], batch_size=2, num_batches=8)
            options = {
                "train_sampling_strategy": "sequential",
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "save_steps": 3,
                "random_exit_depth": True,
                "encoder_agreement": 0.5,
                "freeze_trunk": True,
                "trainable_trunk": ["encoder.stages.2"],
                "muon_learning_rate": 1e-3,
                "trunk_learning_rate": 1e-4,
            }
            return trainer(tmp_path, tiny_model(dropout=0.1), mixture, **options)

        whole, resumed = run(), run()
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert resumed.state.global_step == 4
        for name, tensor in resumed.model.state_dict().items():
            assert torch.equal(tensor, whole.model.state_dict()[name]), name


class TestAgreement:
    def states(self) -> list[Tensor]:
        """The embedding and four layers of three samples with five tokens of eight channels."""
        generator = torch.Generator().manual_seed(3)
        return [
            (torch.randn(3, 5, 8, generator=generator, dtype=torch.float64) * (1 + layer) + layer).requires_grad_()
            for layer in range(5)
        ]

    def test_it_is_the_weighted_mean(self):
        states = self.states()

        def normal(values: Tensor) -> list[float]:
            values = values.tolist()
            mean = sum(values) / 8
            variance = sum((value - mean) ** 2 for value in values) / 8
            return [(value - mean) / (variance + 1e-5) ** 0.5 for value in values]

        expected = 0.0
        for layer in (1, 2, 3):
            for sample in range(3):
                for token in range(5):
                    ours, last = normal(states[layer][sample, token]), normal(states[4][sample, token])
                    squares = [(one - other) ** 2 for one, other in zip(ours, last, strict=True)]
                    expected += layer / 4 * sum(squares) / 8 / 15 / 3
        assert encoder_disagreement(states).item() == pytest.approx(expected, rel=1e-9)

    def test_gradients_go_to_both_sides(self):
        states = self.states()
        encoder_disagreement(states).backward()
        assert states[0].grad is None
        assert all(state.grad.abs().max() > 1e-4 for state in states[1:])

    def test_samples_agree_with_their_exit(self):
        """After its exit a sample repeats its state: layers that it did not run teach nothing."""
        first, second, third = self.states(), self.states(), self.states()
        for layer in range(2, 5):
            # the first sample leaves after layer 1, the second after layer 2
            second[layer] = torch.cat([second[1][:1], second[min(layer, 2)][1:2], second[layer][2:]])
        encoder_disagreement(second).backward()
        assert second[1].grad[0].abs().max() == 0 < second[1].grad[1].abs().max()
        one = [state[:1] for state in second]
        assert encoder_disagreement(one).item() == 0
        pair = (F.layer_norm(third[1][1], [8]) - F.layer_norm(third[2][1], [8])).square().mean()
        two = [state[1:2] for state in second]
        torch.testing.assert_close(encoder_disagreement(two), pair / 4 / 3)
        rest = encoder_disagreement([state[2:] for state in first])
        torch.testing.assert_close(encoder_disagreement(second), (pair / 4 / 3 + rest) / 3)

    def test_bounds(self):
        state = self.states()[1]
        assert encoder_disagreement([state, state]).item() == 0
        assert encoder_disagreement([state, 3 * state + 7, state]).item() == pytest.approx(0, abs=1e-4)
        assert encoder_disagreement([state, -state, state]).item() == pytest.approx(4 / 2, rel=1e-4)

    def test_training_adds_it_and_evaluation_does_not(self, tmp_path):
        batch = collate(samples(4))
        losses = {}
        for weight in (0.0, 0.7):
            run = trainer(tmp_path, encoder_agreement=weight, freeze_batch_norm=True)
            for module in run.frozen:
                module.eval()
            for training in (True, False):
                run.model.train(training)
                losses[weight, training] = run.compute_loss(run.model, batch).item()
        assert losses[0.7, False] == losses[0.0, False]
        batch.pop("labels")
        with torch.no_grad():
            states = run.model.eval()(**batch, decoder_input_ids=torch.zeros(4, 1).long(), output_hidden_states=True)
        added = 0.7 * encoder_disagreement(states.encoder_hidden_states).item()
        assert added > 0.05
        assert losses[0.7, True] - losses[0.0, True] == pytest.approx(added, rel=1e-6)

    def test_those_that_leave_first_agree(self, tmp_path, monkeypatch):
        batch = collate(samples(4))
        depths = {f"{name}_exit_layer": torch.ones(4).long() for name in ("image", "text")}
        losses = []
        for weight in (0.0, 0.7):
            run = trainer(tmp_path, encoder_agreement=weight, random_exit_depth=True, freeze_batch_norm=True)
            drawn = run._random_depths(batch)
            assert drawn.keys() == {"exit_criterion", *depths}
            monkeypatch.setattr(run, "_random_depths", lambda inputs: {"exit_criterion": "fixed"} | depths)
            run.model.train()
            losses.append(run.compute_loss(run.model, batch).item())
        assert losses[0] == losses[1]


class TestTrainableTrunk:
    @pytest.mark.parametrize("rate", [None, 1e-2], ids=["AdamW", "Muon"])
    def test_these_modules_alone_train(self, rate, tmp_path):
        run = trainer(tmp_path, freeze_trunk=True, trainable_trunk=["encoder.stages.2"], muon_learning_rate=rate)
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.train()
        prefix = "model.encoder.embed_images."
        after = {name: t for name, t in run.model.state_dict().items() if name.startswith(prefix)}
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        named = {name for name, _ in run.model.named_parameters() if name.startswith(f"{prefix}encoder.stages.2.")}
        # statistics of batch norms are buffers
        assert changed == named and any("normalization" in name for name in named)
        trained = {name for name, p in run.model.named_parameters() if name.startswith(prefix) and p.requires_grad}
        assert trained == named

    def test_several_modules_without_their_batch_norms(self, tmp_path):
        names = ["encoder.stages.2", "embedder.embedder.convolution"]
        run = trainer(tmp_path, freeze_trunk=True, freeze_batch_norm=True, trainable_trunk=names)
        trunk = run.model.model.encoder.embed_images
        trains = {name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
        assert trains == {
            name
            for name, _ in trunk.named_parameters()
            if name.startswith(tuple(names)) and "normalization" not in name
        }

    def test_unknown_module(self):
        model = tiny_model()
        before = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(ValueError, match="must name modules of the trunk, got 'stages.2'; there are .*'embedder'"):
            freeze(model, trunk=True, trainable=["encoder.stages.2", "stages.2"])
        assert [parameter.requires_grad for parameter in model.parameters()] == before

    def test_the_trunk_has_a_rate_of_its_own(self, tmp_path):
        model = tiny_model()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        options = {"learning_rate": 1e-9, "muon_learning_rate": 1e-9, "lr_scheduler_type": "constant", "max_steps": 1}
        options |= {"freeze_trunk": True, "trainable_trunk": ["encoder.stages.2"], "weight_decay": 0.5}
        run = trainer(tmp_path, model, samples(2), trunk_learning_rate=1e-2, **options)
        run.train()
        moved = {name: (p - before[name]).abs().max() for name, p in model.named_parameters()}
        prefix = "model.encoder.embed_images.encoder.stages.2."
        assert {name for name, step in moved.items() if step > 1e-4} == {n for n in moved if n.startswith(prefix)}
        # the first step of AdamW is its rate, or less where a gradient is near 0
        assert all(step <= 2e-2 for step in moved.values())
        groups = run.optimizer.optimizer.param_groups
        assert [group["lr"] for group in groups] == [1e-9, 1e-9, 1e-2]
        assert groups[2]["use_fallback"] and groups[2]["weight_decay"] == 0
        trained = [parameter for group in groups for parameter in group["params"]]
        assert len(trained) == len(set(trained)) == sum(p.requires_grad for p in model.parameters())

    def test_a_whole_trunk_may_have_it_too(self, tmp_path):
        run = trainer(tmp_path, muon_learning_rate=1e-3, trunk_learning_rate=1e-4)
        group = run.create_optimizer().param_groups[2]
        assert set(group["params"]) == set(run.model.model.encoder.embed_images.parameters())


class TestTraining:
    def test_every_trained_parameter_changes(self, tmp_path):
        run = trainer(tmp_path, max_steps=8)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        unused = set()
        for name, parameter in run.model.named_parameters():
            changed = not torch.equal(parameter, before[name])
            if parameter.requires_grad != changed:
                unused.add(name)
        assert unused == set()

    def test_frozen_parts_stay(self, tmp_path):
        run = trainer(tmp_path, freeze_trunk=True)
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.train()
        for name, tensor in run.model.state_dict().items():
            if "embed_images." in name:
                assert torch.equal(tensor, before[name]), name
        assert not torch.equal(run.model.lm_head.weight, before["lm_head.weight"])

    def test_frozen_parts_stay_where_a_subclass_runs_them(self, tmp_path):
        modes = []

        class Subclass(MuETrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                modes.append((model.training, self.model.model.encoder.embed_images.training))
                return super().compute_loss(model, inputs, *args, **kwargs)

        run = trainer(tmp_path, freeze_trunk=True, max_steps=2)
        run.__class__ = Subclass
        run.train()
        assert modes == [(True, False)] * 2

    def test_frozen_batch_norms_stay_and_the_trunk_learns(self, tmp_path):
        model = tiny_model()
        norms = freeze(model, batch_norm=True)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        after = trained(tmp_path, model=model, freeze_batch_norm=True)
        assert len(norms) > 3
        changed = {name for name in after if "embed_images." in name and not torch.equal(after[name], before[name])}
        assert changed
        assert not any("normalization" in name for name in changed)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_options(self, options, big_batch, tmp_path):
        run = trainer(
            tmp_path, logging_steps=1, **{"label_smoothing_factor": 0.1, "freeze_batch_norm": True} | options
        )
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert losses[0] > losses[-1] > 0
        assert not torch.equal(run.model.lm_head.weight, big_batch["lm_head.weight"])

    @pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "joint"])
    def test_random_depth_with_missing_parts(self, decomposed, tmp_path):
        data = samples()
        for index, item in enumerate(data):
            item["patch_mask"] = torch.tensor(index % 4 != 0)
        run = trainer(tmp_path, tiny_model(modality_decomposition=decomposed), data, random_exit_depth=True)
        run.train()
        assert all(torch.isfinite(p).all() for p in run.model.parameters())

    def test_mixed_precision(self, tmp_path):
        data = [
            {name: value.float() if value.is_floating_point() else value for name, value in item.items()}
            for item in samples()
        ]
        results = {}
        for bf16 in (False, True):
            run = trainer(tmp_path, tiny_model(dtype=torch.float32), data, bf16=bf16, max_steps=2)
            run.train()
            results[bf16] = run.state.log_history[0]["loss"]
            assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        assert results[True] == pytest.approx(results[False], rel=0.02)
        assert results[True] != results[False]


class TestLogs:
    def test_training_and_evaluation_log_every_layer(self, tmp_path):
        run = trainer(tmp_path, max_steps=1, logging_steps=1, label_smoothing_factor=0.1)
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        metrics = run.evaluate()
        run.train()
        logged = next(entry for entry in run.state.log_history if "loss" in entry)
        names = [f"{name}_layer_{layer}" for name in ("loss", "accuracy") for layer in range(1, LAYERS + 1)]
        assert {*names} < logged.keys()
        assert sum(logged[f"loss_layer_{layer}"] for layer in range(1, LAYERS + 1)) == pytest.approx(
            logged["loss"], rel=1e-5
        )
        assert {f"eval_{name}" for name in names} < metrics.keys()
        run.model.eval().load_state_dict(before)
        batch = collate(samples(5))
        labels = batch.pop("labels")
        states = run.model(
            **batch,
            decoder_input_ids=run.model.prepare_decoder_input_ids_from_labels(labels),
            output_hidden_states=True,
        ).decoder_hidden_states
        for layer in range(1, LAYERS + 1):
            logits = run.model.lm_head(run.model.model.decoder.layer_norm(states[layer]))[labels != -100]
            loss = F.cross_entropy(logits, labels[labels != -100]).item()
            assert metrics[f"eval_loss_layer_{layer}"] == pytest.approx(loss, rel=1e-5)
        assert metrics["eval_loss"] == metrics[f"eval_loss_layer_{LAYERS}"]

    def test_generation_logs_every_layer_too(self, tmp_path):
        run = trainer(tmp_path, predict_with_generate=True, generation_max_length=5, per_device_eval_batch_size=2)
        output = run.predict(samples(5))
        assert output.predictions.shape[0] == len(output.label_ids) == 5
        assert set(output.label_ids[0][1:].tolist()) == {-100}
        assert {"test_loss", "test_accuracy_layer_4"} < output.metrics.keys()
        loss = run.evaluate(samples(5), max_length=4)["eval_loss"]
        assert output.metrics["test_loss"] == pytest.approx(loss)

    def test_logits_for_metrics(self, tmp_path):
        run = trainer(tmp_path)
        run.compute_metrics = lambda prediction: {"shape": list(prediction.predictions.shape)}
        assert run.evaluate()["eval_shape"] == [5, 6, 99]


@pytest.fixture(scope="module")
def parts():
    """A model whose tokens are bytes, and whose answers differ."""
    # exits that are saved with the model hold for both
    return byte_parts(std=0.3, seed=2, generation={"max_new_tokens": 5, "image_exit_threshold": 0.9})


@pytest.fixture(scope="module")
def rows():
    """Three statements on each of four scenes."""
    return [
        {name: scene[name] for name in ("image", "image_id")} | {"hypothesis": text, "label": label}
        for scene in (SceneDataset(4, seed=2, statements=3)[index] for index in range(4))
        for text, label in zip(scene["hypothesis"], scene["label"], strict=True)
    ]


class TestAnswers:
    """What the trainer predicts on entailment is what `predict` gives."""

    @pytest.mark.parametrize("prompt_type", ["prev_output", "none"])
    def test_answers_are_those_of_predict(self, prompt_type, parts, rows, tmp_path):
        model, processor = parts
        names = list(processor.entailment_answers.values())
        options = {"predict_with_generate": True, "answers": processor.encode_answers(names)}
        run = trainer(tmp_path, model, rows, per_device_eval_batch_size=5, **options)
        collator = MuEDataCollator(processor, prompt_type=prompt_type)
        run.data_collator = lambda items: {
            name: value.double() if value.is_floating_point() else value for name, value in collator(items).items()
        }
        run.compute_metrics = entailment_metrics(processor)
        exits = {"decoder_exit_threshold": 0.8}
        output = run.predict(rows, **exits)
        expected = predict(model, processor, rows, "entailment", exits, prompt_type=prompt_type, progress=False)
        answers = [one.output for one in expected]
        ids = np.where(output.predictions < 0, 1, output.predictions)
        assert [text.strip() for text in processor.post_process_captions(ids)] == answers
        assert len(set(answers)) > 1
        true = [processor.entailment_answers[row["label"]] for row in rows]
        right = sum(one == other for one, other in zip(answers, true, strict=True))
        assert output.metrics["test_accuracy"] == pytest.approx(right / len(rows))
        assert sum(output.metrics[f"test_support_{label}"] for label in processor.entailment_answers) == len(rows)

    def test_prompts_reach_free_generation_too(self, parts, rows, tmp_path):
        model, processor = parts
        run = trainer(tmp_path, model, rows, predict_with_generate=True, per_device_eval_batch_size=3)
        collator = MuEDataCollator(processor)
        batch = collator(rows[:3])
        batch["pixel_values"] = batch["pixel_values"].double()
        _, tokens, labels = run.prediction_step(model, batch, False)
        inputs = processor(
            images=[row["image"] for row in rows[:3]],
            task="entailment",
            hypothesis=[row["hypothesis"] for row in rows[:3]],
        )
        expected = model.generate(**inputs | {"pixel_values": inputs["pixel_values"].double()})
        assert tokens[:, : expected.shape[1]].tolist() == expected.tolist()
        assert labels.tolist() == batch["labels"].tolist()

    def test_several_references_of_an_image(self, parts, tmp_path):
        model, processor = parts
        scenes = [SceneDataset(3, statements=0)[index] for index in range(3)]
        run = trainer(tmp_path, model, scenes, predict_with_generate=True, per_device_eval_batch_size=2)
        collator = MuEDataCollator(processor, captions_per_image=2, random_captions=False)
        run.data_collator = lambda items: (batch := collator(items)) | {"pixel_values": batch["pixel_values"].double()}
        output = run.predict(scenes)
        firsts = processor.post_process_captions(np.where(output.label_ids < 0, 1, output.label_ids))
        assert len(output.predictions) == 3
        words = processor.encode_captions([scene["references"][0] for scene in scenes])
        assert firsts == processor.post_process_captions(words)

    def test_several_texts_of_an_image_in_several_processes(self, parts, rows, tmp_path, monkeypatch):
        model, processor = parts
        run = trainer(tmp_path, model, rows, predict_with_generate=True)
        batch = MuEDataCollator(processor)([SceneDataset(1, captions=False, statements=2)[0]])
        batch["pixel_values"] = batch["pixel_values"].double()
        run.prediction_step(model, batch, False)
        monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
        with pytest.raises(ValueError, match="needs one text for each image, got 2 for 1; give each text a row"):
            run.prediction_step(model, batch, False)


class TestAverage:
    def test_average_takes_the_place_of_the_weights(self):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(1.0)
        average = WeightAverage(model, 0.5)
        average.on_train_begin(None, None, None)
        for step, value in ((1, 3.0), (50, 5.0)):
            model.weight.data.fill_(value)
            average.on_step_end(None, SimpleNamespace(global_step=step), None)
        expected = 0.5 * (2 / 11 * 1.0 + 9 / 11 * 3.0) + 0.5 * 5.0
        with average.applied():
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == 5.0
        average.on_train_end(None, None, None)
        assert model.weight.item() == pytest.approx(expected)
        with average.applied():
            assert model.weight.item() == pytest.approx(expected)

    def test_evaluation_uses_it(self, tmp_path):
        run = trainer(tmp_path, ema_decay=0.999, eval_strategy="steps", eval_steps=4)
        run.train()
        during = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        assert run.evaluate()["eval_loss"] == pytest.approx(during[-1])

    def test_checkpoint_without_an_average_is_refused(self, tmp_path):
        trainer(tmp_path, save_strategy="steps", save_steps=2).train()
        run = trainer(tmp_path, ema_decay=0.9)
        with pytest.raises(ValueError, match="`ema_decay` needs the average that a checkpoint of such a run has"):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    def test_average_of_other_parameters_is_refused(self, tmp_path):
        trainer(tmp_path, save_strategy="steps", save_steps=2, ema_decay=0.9).train()
        run = trainer(tmp_path, ema_decay=0.9, freeze_trunk=True)
        with pytest.raises(ValueError, match="must average the parameters that are trained"):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def share_of_favourite(captions: list[list[int]], references: list[list[list[int]]]) -> list[float]:
    """How much of a caption is the first token of the image's last reference."""
    return [caption.count(truths[-1][0]) / 3 for caption, truths in zip(captions, references, strict=True)]


class TestMuon:
    def test_matrices_have_a_rate_of_their_own(self, tmp_path):
        model = tiny_model()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        options = {"learning_rate": 1e-9, "muon_learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 1}
        trainer(tmp_path, model, samples(2), weight_decay=0.0, freeze_trunk=True, **options).train()
        moved = {name for name, p in model.named_parameters() if (p - before[name]).abs().max() > 1e-4}
        assert "model.decoder.layers.0.fc1.weight" in moved
        assert "model.encoder.image_proj.weight" in moved
        assert not [name for name in moved if before[name].ndim < 2 or "shared" in name or "table" in name]

    @pytest.mark.parametrize("native", [True, False])
    def test_no_bfloat16_where_it_is_emulated(self, native, tmp_path, monkeypatch):
        monkeypatch.setattr("mue_hf.training.trainer.cpu_has_bf16", lambda: native)
        optimizer = trainer(tmp_path, muon_learning_rate=0.1).create_optimizer()
        assert optimizer.dtype == (torch.bfloat16 if native else torch.float32)

    def test_timm_is_not_touched(self, tmp_path, monkeypatch):
        """It was, for the time of a step, where bfloat16 is emulated."""
        muon = pytest.importorskip("timm.optim.muon", reason="a look at timm's module: pip install mue-hf[timm]")
        monkeypatch.setattr("mue_hf.training.trainer.cpu_has_bf16", lambda: False)
        optimizer = trainer(tmp_path, muon_learning_rate=0.1).create_optimizer()
        usual, seen = muon.zeropower_via_newtonschulz, []

        def closure():
            seen.append(muon.zeropower_via_newtonschulz)

        optimizer.step(closure)
        assert seen == [usual]


class TestScst:
    def test_advantages_are_over_the_other_samples(self):
        advantages = scst_advantages(torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]]))
        assert advantages.tolist() == [[-3.0, 0.0, 3.0], [0.0, 0.0, 0.0]]

    def test_reward_rises(self, tmp_path):
        model = tiny_model(std=0.05)
        model.generation_config.max_new_tokens = 3
        # options that suit the final decoding must not bend the samples
        model.generation_config.num_beams, model.generation_config.decoder_exit_threshold = 3, 0.1
        run = trainer(
            tmp_path,
            model,
            samples(2),
            scst_samples=16,
            per_device_train_batch_size=2,
            max_steps=12,
            learning_rate=3e-2,
            lr_scheduler_type="constant",
            logging_steps=4,
            reward=share_of_favourite,
        )
        # two references for each image
        favourites = torch.tensor([[9, 8], [7, -100]] * 2)
        run.data_collator = lambda items: collate(items) | {"labels": favourites}
        run.train()
        rewards = [entry["reward"] for entry in run.state.log_history if "reward" in entry]
        assert rewards[-1] > 2 * rewards[0]

    def test_gradient_is_that_of_the_weighted_samples(self, tmp_path):
        model = tiny_model()
        model.generation_config.max_new_tokens = 4
        seen = []

        def reward(captions, references):
            seen.append(references)
            return [0.0, 1.0, 4.0, 9.0, 16.0, 25.0]

        run = trainer(tmp_path, model, scst_samples=3, reward=reward, freeze_batch_norm=True)
        inputs = tiny_inputs(2)
        model.train()
        torch.manual_seed(0)
        loss = run.compute_loss(model, inputs | {"labels": torch.tensor([[5, 6], [7, -100], [8, 9], [4, 4]])})
        assert seen == [[[[5, 6], [7]]] * 3 + [[[8, 9], [4, 4]]] * 3]
        torch.manual_seed(0)
        sequences, labels = run._sample(inputs)
        states = model.eval()(
            **inputs, decoder_input_ids=sequences[:, :-1], output_hidden_states=True
        ).decoder_hidden_states
        advantages = scst_advantages(torch.tensor([[0.0, 1.0, 4.0], [9.0, 16.0, 25.0]])).flatten()
        expected = 0.0
        for state in states[1:]:
            logits = model.lm_head(model.model.decoder.layer_norm(state))
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
            expected = expected + (advantages.unsqueeze(1) * losses).sum() / (labels != -100).sum()
        torch.testing.assert_close(loss, expected)

    def test_answers_train_on_their_labels(self, tmp_path):
        inputs = tiny_inputs(2) | {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 8]])}
        inputs["labels"] = torch.tensor([[-100, -100, 9], [-100, -100, 10]])
        losses = []
        for options in ({}, {"scst_samples": 2, "reward": share_of_favourite}):
            model = tiny_model()
            run = trainer(tmp_path, model, freeze_batch_norm=True, **options)
            model.train()
            losses.append(run.compute_loss(model, dict(inputs)))
            assert not run._rewards
        assert losses[0] > 0 and losses[0] == losses[1]

    def test_beam_search_gives_the_samples(self, tmp_path):
        model = tiny_model()
        model.generation_config.max_new_tokens = 4
        run = trainer(tmp_path, model, scst_samples=3, scst_beam_search=True, reward=share_of_favourite)
        sequences, _ = run._sample(tiny_inputs(2))
        expected = model.eval().generate(**tiny_inputs(2), num_beams=3, num_return_sequences=3)
        assert sequences.equal(expected)

    def test_layers_before_the_last_may_follow_it_alone(self, tmp_path):
        options = {"layer_weights": [0.0, 0.0, 0.0, 1.0], "self_distillation": 0.5}
        model = tiny_model()
        model.generation_config.max_new_tokens = 4
        # equal rewards teach the last layer nothing
        run = trainer(tmp_path, model, scst_samples=2, reward=lambda captions, _: [1.0] * len(captions), **options)
        layers = model.model.decoder.layers
        for module in run.frozen:
            module.eval()
        model.train()
        run.compute_loss(model, tiny_inputs(2) | {"labels": torch.tensor([[5, 6], [7, 8]])}).backward()
        assert layers[-1].fc2.weight.grad.abs().max() < 1e-7
        assert layers[-2].fc2.weight.grad.abs().max() > 1e-5

    def test_tokens_after_the_end_do_not_count(self, tmp_path, monkeypatch):
        run = trainer(tmp_path, scst_samples=2, reward=share_of_favourite)
        drawn = torch.tensor([[0, 5, 2, 1, 1], [0, 5, 6, 7, 8]])
        monkeypatch.setattr(run.model, "generate", lambda **kwargs: drawn)
        assert run._sample({})[1].tolist() == [[5, 2, -100, -100], [5, 6, 7, 8]]

    @pytest.mark.parametrize("beams", [False, True], ids=["samples", "beams"])
    def test_without_an_end_token_all_tokens_count(self, beams, tmp_path):
        model = tiny_model()
        model.generation_config.max_new_tokens, model.generation_config.eos_token_id = 4, None
        run = trainer(tmp_path, model, scst_samples=3, scst_beam_search=beams, reward=share_of_favourite)
        sequences, labels = run._sample(tiny_inputs(2))
        assert labels.shape == (6, 4) and labels.equal(sequences[:, 1:])


class TestOwnCaptions:
    OPTIONS = {"own_captions": 3, "self_distillation": 0.5, "freeze_batch_norm": True}

    def test_loss_is_that_of_the_captions(self, tmp_path):
        model = tiny_model()
        model.generation_config.max_new_tokens, model.generation_config.num_beams = 4, 3
        model.generation_config.decoder_exit_threshold = 0.1
        inputs = tiny_inputs(2)
        captions = model.eval().generate(**inputs, exit_criterion="never")[:, 1:]
        assert captions.shape == (2, 4) and not (captions == model.config.eos_token_id).any()
        own = trainer(tmp_path, model, **self.OPTIONS)
        # the teacher is the model that training began with
        model.lm_head.weight.data.mul_(0.5)
        plain = trainer(tmp_path, model, **self.OPTIONS | {"own_captions": 0})
        model.train()
        # in the place of the first of two references of an image
        labels = torch.tensor([[5, 6], [7, -100], [8, 9], [4, 4]])
        expected = torch.stack(
            [captions[0], torch.tensor([7, *[-100] * 3]), captions[1], torch.tensor([4, 4, -100, -100])]
        )
        loss = own.compute_loss(model, inputs | {"labels": labels}, num_items_in_batch=7)
        torch.testing.assert_close(loss, plain.compute_loss(model, inputs | {"labels": expected}))
        assert model.training

    def test_answers_train_on_their_labels(self, tmp_path):
        model = tiny_model()
        inputs = tiny_inputs(2) | {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 8]])}
        inputs["labels"] = torch.tensor([[-100, -100, 9], [-100, -100, 10]])
        runs = [trainer(tmp_path, model, **self.OPTIONS | {"own_captions": own}) for own in (3, 0)]
        model.train()
        # the training loop divides by the batches of a step, so that the tokens of all of them must not
        losses = [
            runs[0].compute_loss(model, dict(inputs), num_items_in_batch=20),
            runs[1].compute_loss(model, dict(inputs)),
        ]
        assert losses[0] > 0 and losses[0] == losses[1]

    def test_shallow_layers_come_to_say_what_the_last_one_says(self, tmp_path):
        model = tiny_model(std=0.05)
        model.generation_config.max_new_tokens = 4
        inputs = {name: value for name, value in collate(samples(4)).items() if name != "labels"}

        def agreement():
            deep, shallow = (
                model.eval().generate(**inputs, exit_criterion="fixed", decoder_exit_layer=layer)[:, 1:]
                for layer in (LAYERS, 1)
            )
            return (deep == shallow).float().mean()

        before = agreement()
        options = {"max_steps": 20, "learning_rate": 1e-2, "self_distillation": 1.0, "freeze_batch_norm": True}
        trainer(tmp_path, model, samples(4), own_captions=1, **options).train()
        assert before < 0.5 and agreement() > 0.9


class TestCard:
    def test_presets_promise_nothing_about_new_weights(self, tmp_path):
        model = tiny_model()
        calibrated = {"decoder_exit_threshold": 0.9, "risk": "metric", "budget": 0.01, "delta": 0.05, "n": 100}
        model.generation_config.exit_presets = {"fast": calibrated, "mine": {"decoder_exit_threshold": 0.8}}
        trainer(tmp_path, model).create_model_card(finetuned_from="org/base")
        card = (tmp_path / "README.md").read_text()
        assert "base_model:\n- org/base" in card and "* seed: 42" in card
        assert "| `fast` | `decoder_exit_threshold=0.9` | none: calibrated before this training |" in card
        assert "| `mine` | `decoder_exit_threshold=0.8` | none: chosen by hand |" in card


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"label_smoothing_factor": 1.0}, r"`label_smoothing_factor` must be a share in \[0, 1\), got 1.0"),
            ({"intermediate_token_share": 0.0}, r"`intermediate_token_share` must be a share in \(0, 1\], got 0.0"),
            ({"ema_decay": 1.0}, r"`ema_decay` must be in \(0, 1\), or None"),
            ({"self_distillation": float("nan")}, "`self_distillation` must be a finite number"),
            ({"scst_samples": 1}, "`scst_samples` must be at least 2, or 0"),
            ({"layer_weights": [0.0, 0.0]}, "`layer_weights` must be finite numbers of at least 0, not all of them 0"),
            ({"layer_weights": [1.0, -1.0]}, "`layer_weights` must be finite numbers"),
            (
                {"ema_decay": 0.9, "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
                "drop one of them",
            ),
            (
                {"scst_samples": 2, "label_smoothing_factor": 0.1},
                "`label_smoothing_factor` .got 0.1. is about training",
            ),
            ({"muon_learning_rate": 0.0}, "`muon_learning_rate` must be above 0, or None"),
            ({"own_captions": -1}, "`own_captions` must be at least 1, or 0 to train on labels, got -1"),
            ({"own_captions": 1, "scst_samples": 2}, "`own_captions` .* both say what captions to train on"),
            ({"scst_beam_search": True}, "`scst_beam_search` is about `scst_samples`, which is 0"),
            ({"encoder_agreement": -1.0}, "`encoder_agreement` must be a finite number of at least 0 .0 is off., got"),
            ({"encoder_agreement": float("inf")}, "`encoder_agreement` must be a finite number"),
            (
                {"encoder_agreement": 0.1, "scst_samples": 2},
                "`encoder_agreement` .got 0.1. is about training on labels",
            ),
            (
                {"trainable_trunk": ["a"]},
                r"`trainable_trunk` .got \['a'\]. is about a frozen trunk; set `freeze_trunk`",
            ),
            ({"trunk_learning_rate": 0.1}, "`trunk_learning_rate` must be above 0 beside a `muon_learning_rate`, or"),
            ({"trunk_learning_rate": 0.0, "muon_learning_rate": 0.1}, "`trunk_learning_rate` must be above 0"),
            (
                {"trunk_learning_rate": 0.1, "muon_learning_rate": 0.1, "freeze_trunk": True},
                "`trunk_learning_rate` .got 0.1. is about a trunk that trains; name its modules",
            ),
        ],
    )
    def test_arguments(self, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            MuETrainingArguments(str(tmp_path), use_cpu=True, **options)

    @pytest.mark.parametrize(
        ("options", "extras", "message"),
        [
            ({"layer_weights": [1.0]}, {}, "one factor for each of the 4 decoder layers"),
            ({"scst_samples": 2}, {}, "`scst_samples` needs `reward`"),
            ({}, {"reward": share_of_favourite}, "`reward` is used by `scst_samples` only"),
            ({}, {"compute_loss_func": max}, "`compute_loss_func` would replace the layer-wise loss"),
            ({}, {"model": None}, "`model` must be given"),
            ({}, {"model": torch.nn.Linear(1, 1)}, "`model` must be a MuEForConditionalGeneration, got Linear"),
        ],
        ids=["layer-weights", "no-reward", "stray-reward", "loss-function", "no-model", "other-model"],
    )
    def test_trainer(self, options, extras, message, tmp_path):
        args = MuETrainingArguments(str(tmp_path), use_cpu=True, **options)
        with pytest.raises(ValueError, match=message):
            MuETrainer(**{"model": tiny_model(), "args": args} | extras)

    def test_other_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="`args` must be MuETrainingArguments, got Seq2SeqTrainingArguments"):
            MuETrainer(tiny_model(), Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True))

    def test_model_without_batch_norms(self):
        model = tiny_model()
        model.model.encoder.embed_images = torch.nn.Identity()
        with pytest.raises(ValueError, match="the model has no batch norm"):
            freeze(model, batch_norm=True)

    def test_batch_without_labels(self, tmp_path):
        run = trainer(tmp_path, data=[{k: v for k, v in item.items() if k != "labels"} for item in samples()])
        with pytest.raises(ValueError, match="the batch must hold `labels`"):
            run.train()

    def test_command_line(self, tmp_path):
        parser = HfArgumentParser((MuETrainingArguments,))
        line = f"--output_dir {tmp_path} --use_cpu --layer_weights 0 0 1 --random_exit_depth --ema_decay 0.9 "
        line += "--freeze_trunk --trainable_trunk encoder.stages.1 encoder.stages.2 --encoder_agreement 0.5"
        (args,) = parser.parse_args_into_dataclasses(line.split())
        assert args.layer_weights == [0.0, 0.0, 1.0]
        assert args.random_exit_depth
        assert args.trainable_trunk == ["encoder.stages.1", "encoder.stages.2"] and args.encoder_agreement == 0.5
        assert args.ddp_find_unused_parameters
        assert not args.remove_unused_columns
        assert "layer_weights" in parser.format_help()


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        (1, {}, "`fsdp_version` must be 2, got 1"),
        (2, {"ema_decay": 0.9}, "`ema_decay` .got 0.9. averages whole weights"),
        (2, {"muon_learning_rate": 0.1}, "`muon_learning_rate` .* needs whole matrices"),
        (2, {"random_exit_depth": True}, "`random_exit_depth` .* leaves out layers"),
        (2, {"scst_samples": 2, "reward": share_of_favourite}, "`scst_samples` .* generates with whole weights"),
        (2, {"predict_with_generate": True}, "pass `--predict_with_generate False` and score the saved model"),
    ],
)
def test_what_fsdp_cannot_do(version, options, message, tmp_path, monkeypatch):
    # what accelerate makes of a configuration file, on GPUs alone
    plugin = SimpleNamespace(fsdp_version=version, activation_checkpointing=False)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def in_two_processes(part: str, folder: Path) -> None:
    """Runs a part of this file, see its end, in two processes that know of each other."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": "2"}
    paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, part, str(folder)],
            env=os.environ | shared | paths | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def train_in_one_of_two_processes(folder: Path) -> None:
    """What `test_two_processes` starts twice."""
    options = {"per_device_train_batch_size": 2, "label_smoothing_factor": 0.1, "freeze_batch_norm": True}
    run = trainer(folder, ddp_backend="gloo", **options)
    run.train()
    found = {"curve": curve(run)} | evaluated(run, folder)
    if os.environ["RANK"] == "0":
        tied = {"lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"}
        weights = {name: t for name, t in run.model.state_dict().items() if name not in tied}
        save_file(weights, folder / "weights.safetensors")
        (folder / "found.json").write_text(json.dumps(found))
    finish_processes()


def shard_in_one_of_two_processes(folder: Path) -> None:
    """What `test_fully_sharded` starts twice. accelerate shards on GPUs alone, so it is done here as it does it."""
    model, batch = tiny_model(), collate(samples(4))
    run = trainer(folder, model, self_distillation=1.0, freeze_batch_norm=True, ddp_backend="gloo")
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    rank = int(os.environ["RANK"])
    part = {name: values[2 * rank : 2 * rank + 2] for name, values in batch.items()}
    metrics = run.evaluate()
    model.train()
    # the processes' gradients are averaged
    run.compute_loss(model, part, num_items_in_batch=batch["labels"].numel()).backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        save_file(gradients, folder / "gradients.safetensors")
        (folder / "metrics.json").write_text(json.dumps(metrics))
    finish_processes()


if __name__ == "__main__":
    {"train": train_in_one_of_two_processes, "shard": shard_in_one_of_two_processes}[sys.argv[1]](Path(sys.argv[2]))
