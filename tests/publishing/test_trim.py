"""`mue-hf trim`: a checkpoint of the layers that fixed depths run says what the whole one says at these depths."""

import json
import re
from copy import deepcopy
from itertools import product

import pytest
import torch
from conftest import byte_checkpoint, tiny_inputs, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stack import generate
from transformers import pipeline

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.evaluation.signals import SignalRecorder
from mue_hf.inference.depths import Depths, layers_skipped
from mue_hf.inference.flops import FlopCount
from mue_hf.publishing import trim
from mue_hf.publishing.trim import fixed_depths, trim_checkpoint, trim_model

ANSWERS = [[5], [6, 7], [6, 8]]
DEPTHS = {"image_exit_layer": 1, "text_exit_layer": 2, "decoder_exit_layer": 2}
PRESETS = {
    "shallow": {"exit_criterion": "fixed", **DEPTHS},
    "image": {"exit_criterion": "fixed", "image_exit_layer": 2},
    "similar": {"image_exit_threshold": 0.5},
    "late": {"exit_criterion": "fixed", **DEPTHS, "exit_warmup": 0.5},
    "rescored": {"exit_criterion": "fixed", **DEPTHS, "exit_rescore": True},
}
GENERATION = {
    "num_beams": 2,
    "suppress_tokens": [0, 1, 2, 3],
    "exit_presets": PRESETS,
    "exit_preset": "similar",
    "exit_candidates": [4, 5, 6],
    "exit_kv": "copy",
}
WHOLE = {joint: tiny_model(std=0.3, modality_decomposition=not joint) for joint in (False, True)}


def trimmed(joint=False, **depths):
    model = deepcopy(WHOLE[joint])
    trim_model(model, fixed_depths(model, depths))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights in several files, with presets and other exit options."""
    folder = tmp_path_factory.mktemp("whole") / "captioner"
    return byte_checkpoint(folder, max_shard_size="150KB", generation=GENERATION)


class TestOutputs:
    @pytest.mark.parametrize("joint", [False, True])
    @given(image=st.integers(1, 3), text=st.integers(1, 3), decoder=st.integers(1, 4), seed=st.integers(0, 99))
    @settings(max_examples=12, deadline=None)
    def test_are_those_of_the_fixed_depths(self, joint, image, text, decoder, seed):
        encoder = {"encoder_exit_layer": image} if joint else {"image_exit_layer": image, "text_exit_layer": text}
        depths = encoder | {"decoder_exit_layer": decoder}
        if image == 3 and (joint or text == 3) and decoder == 4:
            return
        model, inputs = trimmed(joint, **depths), tiny_inputs(seed=seed)
        inputs["patch_mask"] = torch.tensor([True, seed % 2 == 0, True])
        for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            expected = generate(WHOLE[joint], inputs, exit_criterion="fixed", **depths, output_scores=True, **options)
            output = generate(model, inputs, output_scores=True, **options)
            assert torch.equal(output.sequences, expected.sequences)
            for name in ("image_exit_layers", "text_exit_layers", "decoder_exit_layers"):
                assert torch.equal(getattr(output, name), getattr(expected, name))
            assert output.executed_layers == expected.executed_layers
            torch.testing.assert_close(output.scores, expected.scores)
        expected = WHOLE[joint].score_answers(ANSWERS, **inputs, exit_criterion="fixed", **depths)
        torch.testing.assert_close(model.score_answers(ANSWERS, **inputs), expected)

    @pytest.mark.parametrize(("image", "text", "decoder"), [(1, 3, 2), (3, 1, 3), (2, 2, 4)])
    def test_exits_are_those_of_a_sure_exit_at_the_depth(self, image, text, decoder):
        model, inputs = (
            trimmed(image_exit_layer=image, text_exit_layer=text, decoder_exit_layer=decoder),
            tiny_inputs(),
        )
        thresholds = {
            "image_exit_threshold": [0.6, 0.9, 2.0],
            "text_exit_threshold": [0.3, 0.8, 2.0],
            "decoder_exit_threshold": [0.5, 0.7, 0.8, 2.0],
        }
        depths = dict(zip(thresholds, (image, text, decoder), strict=True))
        cut = {name: thresholds[name][:depth] for name, depth in depths.items()}
        sure = {name: [*cut[name][:-1], *[-2.0] * (len(thresholds[name]) - len(cut[name]) + 1)] for name in cut}
        expected, output = generate(WHOLE[False], inputs, **sure), generate(model, inputs, **cut)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.decoder_exit_layers, expected.decoder_exit_layers)
        assert output.executed_layers == expected.executed_layers
        assert len(set(output.decoder_exit_layers.flatten().tolist()) - {0}) > 1, "all tokens exit at one depth"

    def test_hidden_states_and_attentions_of_streams_of_two_depths(self):
        model, inputs = trimmed(**DEPTHS), tiny_inputs()
        model.set_attn_implementation("eager")
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert len(output.encoder_hidden_states) == 3 and len(output.encoder_attentions) == 2
        assert not output.encoder_attentions[1][:, :, :16].any() and output.encoder_attentions[1][:, :, 16:].any()


class TestDepthsAreFullDepth:
    def test_of_thresholds_and_depths(self):
        config = trimmed(**DEPTHS).config
        assert [config.layers_of(stream) for stream in ("image", "text", "encoder", "decoder")] == [1, 2, 2, 2]
        model, inputs = trimmed(**DEPTHS), tiny_inputs()
        for options, message in (
            ({"image_exit_threshold": [0.5, 0.5]}, "each of the 1 layers"),
            ({"text_exit_threshold": [0.5, 0.5, 0.5]}, "each of the 2 layers"),
            ({"exit_criterion": "fixed", "image_exit_layer": 2}, "`image_exit_layer` must be a number .* from 1 to 1"),
        ):
            with pytest.raises(ValueError, match=message):
                generate(model, inputs, **options)

    @pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "never", "patience", "similarity"])
    def test_of_every_criterion(self, criterion):
        option = {"exit_patience": 2} if criterion == "patience" else {"decoder_exit_threshold": None}
        options = {} if criterion == "never" else {"exit_criterion": criterion} | option
        output = generate(trimmed(**DEPTHS), tiny_inputs(), **options)
        assert output.image_exit_layers.tolist() == [1] * 3 and output.text_exit_layers.tolist() == [2] * 3
        assert set(output.decoder_exit_layers.flatten().tolist()) <= {0, 2}

    def test_of_layers_and_flops_skipped(self):
        model, depths = trimmed(**DEPTHS), Depths(1, 2, (2, 2, 2))
        assert layers_skipped(model.config, depths) == 0
        ran, full = FlopCount(model, {})((3, 64, 64), 7, depths)
        assert ran == full
        at_depth, _ = FlopCount(WHOLE[False], {"exit_criterion": "fixed", **DEPTHS})((3, 64, 64), 7, depths)
        assert ran == at_depth

    def test_of_recorded_signals(self):
        model, inputs = trimmed(image_exit_layer=1, decoder_exit_layer=2), tiny_inputs()
        with SignalRecorder(model) as recorder:
            generate(model, inputs)
        signals = recorder.signals
        shapes = {name: values.shape[1] for name, values in signals.encoder.items()} | {
            "decoder": signals.decoder.shape[1]
        }
        assert shapes == {"image": 1, "text": 3, "decoder": 2}


class TestFolder:
    def test_says_what_it_is_and_loads_by_every_door(self, checkpoint, tmp_path, photo, capsys):
        arguments = ["trim", str(checkpoint), str(tmp_path / "small"), "--image", "1", "--text", "2", "--decoder", "2"]
        assert cli.main([*arguments, "--json"]) == 0
        summary, folder = json.loads(capsys.readouterr().out), tmp_path / "small"
        assert (summary["image_layers"], summary["text_layers"], summary["decoder_layers"]) == (1, 2, 2)
        sizes = [sum(path.stat().st_size for path in of.glob("*.safetensors*")) for of in (checkpoint, folder)]
        assert [summary["bytes_before"], summary["bytes_after"]] == sizes and sizes[1] < sizes[0]

        model = MuEForConditionalGeneration.from_pretrained(folder)
        assert model.config.trimmed_from == {"checkpoint": "captioner", "encoder_layers": 3, "decoder_layers": 4}
        assert "from `captioner`, which has 3\nencoder and 4 decoder layers" in (folder / "README.md").read_text()
        assert "of 1 and 2 layers" in (folder / "README.md").read_text()
        saved = json.loads((folder / "generation_config.json").read_text())
        assert not [name for name in saved if "exit" in name]
        assert (saved["num_beams"], saved["suppress_tokens"], saved["max_new_tokens"]) == (2, [0, 1, 2, 3], 4)

        whole = pipeline("image-text-to-text", model=str(checkpoint))
        expected = whole(photo, exit_preset="shallow")[0]["generated_text"]
        assert whole(photo, exit_criterion="never")[0]["generated_text"] != expected
        assert pipeline("image-text-to-text", model=str(folder))(photo)[0]["generated_text"] == expected
        png = ["--png", str(tmp_path / "png")]
        assert cli.main(["caption", photo, "--model", str(folder), "--repeats", "1", "--json", *png]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["caption"] == expected and record["layers_skipped"] == record["flops_skipped"] == 0
        assert [record[f"{stream}_layers"] for stream in ("image", "text", "decoder")] == [1, 2, 2]
        assert cli.main(["caption", photo, "--model", str(folder), "--repeats", "1", *png]) == 0
        assert "image stream   1 of 1 layers\n  text stream    2 of 2 layers" in capsys.readouterr().out

    def test_of_a_preset_and_its_summary_line(self, checkpoint, tmp_path, capsys):
        assert cli.main(["trim", str(checkpoint), str(tmp_path / "small"), "--preset", "image"]) == 0
        line = capsys.readouterr().out
        assert f"{tmp_path / 'small'}: image 2, text 3, decoder 4 layers, weights of " in line
        config = MuEConfig.from_pretrained(tmp_path / "small")
        assert (config.encoder_layers, config.image_layers, config.text_layers, config.decoder_layers) == (3, 2, 3, 4)

    def test_of_a_joint_model(self, tmp_path):
        whole = byte_checkpoint(tmp_path / "whole", modality_decomposition=False)
        trim_checkpoint(whole, tmp_path / "small", {"encoder_exit_layer": 2})
        model, inputs = (
            MuEForConditionalGeneration.from_pretrained(tmp_path / "small"),
            tiny_inputs(dtype=torch.float32),
        )
        assert (model.config.encoder_layers, model.config.image_layers, model.config.decoder_layers) == (2, None, 4)
        expected = MuEForConditionalGeneration.from_pretrained(whole)
        expected = generate(expected, inputs, exit_criterion="fixed", encoder_exit_layer=2)
        assert torch.equal(generate(model, inputs).sequences, expected.sequences)

    def test_keeps_tensors_as_they_are_stored(self, tmp_path):
        """Weights may be stored in half precision for a model in single."""
        folder = byte_checkpoint(tmp_path / "whole")
        stored = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        trim_checkpoint(folder, tmp_path / "small", DEPTHS)
        kept = load_file(tmp_path / "small" / "model.safetensors")
        assert all(
            torch.equal(tensor, stored[name]) and tensor.dtype == stored[name].dtype for name, tensor in kept.items()
        )
        gone = stored.keys() - kept.keys()
        for stack, tables in product(("encoder", "decoder"), ("layers", "token_rel_pos_table_list")):
            assert any(name.startswith(f"model.{stack}.{tables}.2.") for name in gone)
        assert all(".layers." in name or "_table_list." in name for name in gone)

    def test_of_what_was_trimmed_already(self, checkpoint, tmp_path):
        trim_checkpoint(checkpoint, tmp_path / "first", {"image_exit_layer": 2})
        summary = trim_checkpoint(tmp_path / "first", tmp_path / "second", {"decoder_exit_layer": 1})
        assert (summary["image_layers"], summary["text_layers"], summary["decoder_layers"]) == (2, 3, 1)

    def test_is_whole_or_not_there(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr(trim, "render_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trim_checkpoint(checkpoint, tmp_path / "small", DEPTHS)
        assert not list(tmp_path.iterdir())

    def test_of_damaged_weights(self, checkpoint, tmp_path, monkeypatch):
        kept = trim._kept_tensors
        monkeypatch.setattr(trim, "_kept_tensors", lambda *args: {k: t + 1 for k, t in kept(*args).items()})
        with pytest.raises(ValueError, match="is not what was cut"):
            trim_checkpoint(checkpoint, tmp_path / "small", DEPTHS)
        assert not list(tmp_path.iterdir())


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "either a preset or the depth of at least one stream must be given"),
            (["--image", "0"], "`image_exit_layer` must be a number of layers from 1 to 3, got 0"),
            (["--text", "4"], "`text_exit_layer` must be a number of layers from 1 to 3, got 4"),
            (["--decoder", "5"], "`decoder_exit_layer` must be a number of layers from 1 to 4, got 5"),
            (["--encoder", "2"], "`encoder_exit_layer` needs `modality_decomposition=False`"),
            (["--encoder", "2", "--image", "2"], "`encoder_exit_layer` needs `modality_decomposition=False`"),
            (["--image", "3", "--decoder", "4"], "must be below that of the model"),
            (["--preset", "shallow", "--image", "2"], "either a preset or the depth"),
            (["--preset", "similar"], "the preset 'similar' must be of fixed depths alone.*'similarity'"),
            (["--preset", "late"], "the preset 'late' must be of fixed depths alone.*exit_warmup=0.5"),
            (["--preset", "rescored"], "the preset 'rescored' must be of fixed depths alone.*exit_rescore=True"),
            (["--preset", "none"], "`exit_preset` must name a preset of this model"),
        ],
    )
    def test_depths(self, checkpoint, tmp_path, capsys, arguments, message):
        assert cli.main(["trim", str(checkpoint), str(tmp_path / "small"), *arguments]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert not list(tmp_path.iterdir())

    def test_depths_of_rows(self, checkpoint, tmp_path):
        with pytest.raises(ValueError, match="a depth for each row"):
            trim_checkpoint(checkpoint, tmp_path / "small", {"image_exit_layer": torch.tensor([1, 2])})

    def test_other_options(self, checkpoint, tmp_path):
        with pytest.raises(ValueError, match=r"`exits` must be depths or a preset, got \['exit_kv'\]"):
            trim_checkpoint(checkpoint, tmp_path / "small", DEPTHS | {"exit_kv": "exact"})

    def test_image_depth_of_a_joint_model(self):
        with pytest.raises(ValueError, match="`image_exit_layer` needs `modality_decomposition=True`"):
            fixed_depths(WHOLE[True], {"image_exit_layer": 2})

    def test_folders(self, checkpoint, tmp_path):
        (tmp_path / "file").touch()
        for target, message in ((tmp_path, "must be empty or new"), (tmp_path / "file", "must be a folder")):
            with pytest.raises(ValueError, match=message):
                trim_checkpoint(checkpoint, target, DEPTHS)
        with pytest.raises(ValueError, match="must be another folder than the checkpoint"):
            trim_checkpoint(checkpoint, checkpoint, DEPTHS, overwrite=True)
        with pytest.raises(ValueError, match="the checkpoint must be a folder"):
            trim_checkpoint(tmp_path / "none", tmp_path / "small", DEPTHS)

    def test_overwrite(self, checkpoint, tmp_path):
        for depth in (1, 2):
            trim_checkpoint(checkpoint, tmp_path / "small", {"decoder_exit_layer": depth}, overwrite=depth == 2)
        assert MuEProcessor.from_pretrained(tmp_path / "small")
        assert MuEConfig.from_pretrained(tmp_path / "small").decoder_layers == 2
