"""Training on generated scenes: the example script for a few steps, and the comparison of two tiny variants."""

import json
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from random import Random
from shutil import which

import pytest
import torch
from safetensors.torch import load_file

from mue_hf import MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.data.scenes import COLORS, FORMS, RADIUS, SHAPES, SceneDataset, make_scene

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install mue-hf[train]")

ROOT = Path(__file__).parents[2]
TRAINING = """--use_cpu --per_device_train_batch_size 2 --statements 2 --captions_per_image 1 --dev_scenes 2
--report_to none --muon_learning_rate 1e-3 --ema_decay 0.9 --disable_tqdm True --random_exit_depth
--self_distillation 1""".split()
SIZES = "--d_model 16 --ffn_dim 16 --heads 2 --layers 2".split()


@pytest.fixture(scope="module")
def example():
    """The script as a module. While the tests run, modules are looked for in these folders too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.syspath_prepend(ROOT / "examples")
        yield import_module("train_scenes")


@pytest.fixture
def compare(example):
    """The comparison as a module."""
    return import_module("compare_training")


@pytest.fixture(scope="module")
def captioned(example, tmp_path_factory) -> Path:
    """Four steps of captioning, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("captioned")
    options = ["--stage=captioning", "--max_steps", "4", "--save_steps", "2", "--bf16"]
    example.main([f"--output_dir={folder}", *options, *TRAINING, *SIZES])
    return folder


def test_checkpoint_answers_and_captions(captioned):
    weights = load_file(captioned / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    model, processor = MuEForConditionalGeneration.from_pretrained(captioned), MuEProcessor.from_pretrained(captioned)
    assert model.dtype == torch.float32
    row = SceneDataset(1, split="test")[0]
    inputs = processor(images=row["image"], task="entailment", hypothesis=row["hypothesis"])
    scores = model.eval().score_answers(processor.encode_answers(["yes", "no", "maybe"]), **inputs)
    assert scores.shape == (8, 3)
    assert model.generate(**processor(images=row["image"])).shape[0] == 1


def test_report_has_every_kind(captioned):
    report = json.loads((captioned / "report.json").read_text())
    assert report["steps"] == 4 and report["seconds"] > 0 and report["bf16"]
    assert report["accuracy"].keys() == {*FORMS, "captions"}
    assert all(0 <= share <= 1 for share in report["accuracy"].values())


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_only_where_it_is_native(native, example, monkeypatch, tmp_path, caplog):
    for module in ("train_scenes", "mue_hf.training.arguments"):
        monkeypatch.setattr(f"{module}.cpu_has_bf16", lambda: native)

    def arguments(**options):
        return example.SceneTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)

    assert arguments(native_bf16=True).bf16 == native
    assert not arguments().bf16 and "bf16" not in caplog.text
    assert arguments(bf16=True).bf16 and ("steps can take ten times as long" in caplog.text) != native


def test_resumed_run_ends_with_the_same_weights(example, captioned, tmp_path):
    options = ["--stage=captioning", "--max_steps", "4", "--save_steps", "2", "--bf16"]
    options += [f"--resume_from_checkpoint={captioned / 'checkpoint-2'}"]
    example.main([f"--output_dir={tmp_path}", *options, *TRAINING, *SIZES])
    first, second = (load_file(folder / "model.safetensors") for folder in (captioned, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_grown_model_is_the_same_function(example, captioned):
    small = MuEForConditionalGeneration.from_pretrained(captioned).eval()
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    processor = MuEProcessor.from_pretrained(captioned)
    rows = [SceneDataset(1, split="test")[0]]
    batch = example.SceneCollator(processor)(rows)
    grown = example.grow(small, 5).eval()
    assert (grown.config.encoder_layers, grown.config.decoder_layers) == (5, 5)
    with torch.no_grad():
        torch.testing.assert_close(grown(**batch).logits, small(**batch).logits)


def test_entailment_goes_on_from_captioning(example, captioned, tmp_path):
    options = [f"--start_from={captioned}", "--layers=4", "--max_steps=1", "--first_scene=100"]
    still = ["--learning_rate=0", "--muon_learning_rate=1e-12"]
    example.main([f"--output_dir={tmp_path}", *TRAINING, *options, *still])
    first, second = (load_file(folder / "model.safetensors") for folder in (captioned, tmp_path))
    assert torch.equal(first["model.shared.weight"], second["model.shared.weight"])
    assert torch.equal(second["model.decoder.layers.2.fc1.weight"], first["model.decoder.layers.1.fc1.weight"])


def test_stage_about_some_relations_has_no_others(example):
    data = example.DataArguments(kinds=["existence", "relation", "two_relations"], relations=["left of", "above"])
    rows = [example.Scenes(data, count=40, batch=4)[index] for index in range(40)]
    texts = [text for row in rows for text in row["hypothesis"]]
    assert all(
        len(row[name]) == data.statements for row in rows for name in ("hypothesis", "label", "kind", "captions")
    )
    for relation, expected in {"left of": True, "above": True, "right of": False, "below": False}.items():
        assert any(relation in text for text in texts) == expected
    whole = SceneDataset(40, statements=32, kinds=["relation", "two_relations"])
    labels, drawn = (
        {
            (row["image_id"], text): label
            for row in some
            for text, label in zip(row["hypothesis"], row["label"], strict=True)
        }
        for some in (rows, whole)
    )
    shared = labels.keys() & drawn.keys()
    assert len(shared) > 50 and all(labels[key] == drawn[key] for key in shared)
    with pytest.raises(SystemExit):
        example.main(["--output_dir=none", "--max_steps=1", "--relations", "beside"])


def test_captioning_learns_words_of_true_statements_and_places_of_objects(example, captioned):
    processor = MuEProcessor.from_pretrained(captioned)
    row = example.Scenes(example.DataArguments(caption_share=0.5), count=20, batch=1)[3]
    batch = example.SceneCollator(processor, captioning=True)([row])
    assert batch["input_ids"].shape[0] == 1
    caption, *learnt = [processor.decode(ids[ids != -100]).split() for ids in batch["labels"]]
    assert " ".join(caption) in [f"{text}</s>" for text in row["references"]]
    for index, (text, label) in enumerate(zip(row["hypothesis"], row["label"], strict=True)):
        words, bins = text.split(), row["places"][index]
        following = [bins.get(place, word) for place, word in enumerate([*words[1:], '"?'])]
        whole = row["captions"][index] and label == "entailment"
        learnt_words = [words[0], *following] if whole else list(bins.values())
        expected = " ".join([*learnt_words, f"{processor.entailment_answers[label]}</s>"])
        # bins are added tokens, decoded without a space
        assert "".join(learnt[index]) == expected.replace(" ", "")


def test_places_are_those_of_the_named_objects(example):
    for index in range(40):
        scene = make_scene(index)
        shown = {one.name: (one.x // 4, 16 + one.y // 4) for one in scene.visible}
        for text in (f"there is a {name}" for name in shown):
            if [one.name for one in scene.visible].count(text[11:]) == 1:
                bins = example.places(scene, text, Random(index))
                assert bins in [{4: f"<bin_{line}>"} for line in shown[text[11:]]]
        assert example.places(scene, "there are at least two circles", Random(0)) == {}
    absent = next(f"{color} circle" for color in COLORS if f"{color} circle" not in shown)
    assert example.places(scene, f"there is a {absent}", Random(0)) == {4: "<bin_32>"}


def test_classification_changes_the_trunk_alone(example, captioned, tmp_path):
    options = [f"--start_from={captioned}", "--layers=2", "--stage=classification", "--max_steps=2"]
    report = example.main([f"--output_dir={tmp_path}", *options, *TRAINING])
    assert report["accuracy"] == {}
    first, second = (load_file(folder / "model.safetensors") for folder in (captioned, tmp_path))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all(name.startswith("model.encoder.embed_images.") for name in changed)


def test_cells_hold_what_is_drawn_there(example, captioned):
    processor = MuEProcessor.from_pretrained(captioned)
    for index in range(20):
        scene, cells = make_scene(index, 3), example.Cells(0, 20, 3, "train", processor)[index]
        assert int((cells["kinds"][0] > 1).sum()) == len(scene.visible)
        assert int((cells["kinds"][0] == 1).sum()) == 16 * (scene.panel is not None)
        for one in scene.visible:
            color, shape, size = (int(kind[one.y // 8, one.x // 8]) - 2 for kind in cells["kinds"])
            names = [tuple(COLORS)[color], SHAPES[shape], tuple(RADIUS)[size]]
            assert names == [one.color, one.shape, one.size]
            assert (32 * (cells["places"][:, one.y // 8, one.x // 8] + 1)).tolist() == [one.x, one.y]


def test_batches_are_short_or_long(example):
    scenes = example.Scenes(example.DataArguments(first_scene=7, statements=3), count=8, batch=2)
    assert ["references" in scenes[index] for index in range(8)] == [False, False, True, True] * 2
    assert {kind for index in (0, 1, 4, 5) for kind in scenes[index]["kind"]} <= set(example.SHORT)
    assert [scenes[index]["image_id"] for index in (0, 7)] == ["train-0-0000007", "train-0-0000014"]


def test_words_are_single_tokens(captioned):
    tokenizer = MuEProcessor.from_pretrained(captioned).tokenizer
    row = SceneDataset(400, split="test")[399]
    for text in (*row["references"], *row["hypothesis"]):
        assert len(tokenizer(f" {text}", add_special_tokens=False)["input_ids"]) == len(text.split())


def test_old_names_are_accepted_and_warned_of(example, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main([f"--output_dir={tmp_path}", "--lesson", "seeing"])
    said = capsys.readouterr().err
    assert said.startswith("--lesson is now --stage\nseeing is now classification\n")
    assert "--max_steps must be given" in said
    # a folder may be called like a stage
    words = ["--output_dir", "telling", "--told_share", "0.5", "--stage=judging"]
    expected = ["--output_dir", "telling", "--caption_share", "0.5", "--stage", "entailment"]
    assert example.current_names(words) == expected and example.current_names(expected) == expected
    parser = example.HfArgumentParser(example.DataArguments)
    (data,) = parser.parse_args_into_dataclasses(expected[2:])
    assert (data.stage, data.caption_share) == ("entailment", 0.5)
    assert capsys.readouterr().err == "--told_share is now --caption_share\njudging is now entailment\n"


@pytest.mark.skipif(which("make") is None, reason="make is not installed")
def test_commands_of_make_reproduce_parse(example, tmp_path):
    command = ["make", "--dry-run", "reproduce", f"REPRODUCED={tmp_path}", "LESSON_ARGS=--joint"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", "")
    stages, commands = [], []
    for line in lines.splitlines():
        # what the shell would put in place, and what it does where a command fails
        words = shlex.split(re.sub(r"\$\(.*\)|\|\|.*", "", line))
        if "examples/train_scenes.py" in words:
            parser = example.HfArgumentParser((example.ModelArguments, example.DataArguments))
            sizes, data, _ = parser.parse_args_into_dataclasses(words[3:], return_remaining_strings=True)
            assert sizes.joint == (data.stage == "captioning")
            parser = example.HfArgumentParser(example.SceneTrainingArguments)
            assert parser.parse_args_into_dataclasses(words[3:], return_remaining_strings=True)[0].max_steps > 0
            stages.append(data.stage)
        elif words and words[0].endswith("/mue-hf"):
            commands.append(cli.build_parser(words[1]).parse_args(words[1:]).command)
    assert stages == ["classification", *["captioning"] * 6, "entailment"]
    assert commands == ["calibrate", "calibrate", "evaluate"]


def test_time_limit_saves_and_stops(example, tmp_path):
    options = ["--max_steps", "50", "--max_minutes", "0"]
    report = example.main([f"--output_dir={tmp_path}", *options, *TRAINING, *SIZES])
    assert report["steps"] == 1
    assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--max_steps must be given"),
        (["--max_steps", "1", "--kinds", "existance"], "`kinds` must be a list of some of"),
        (["--max_steps", "1", "--statements", "-1"], "`statements` must be at least 0"),
        (["--max_steps", "1", "--start_from", "no/such/folder"], "no/such/folder"),
    ],
    ids=["steps", "kind", "statements", "folder"],
)
def test_bad_options_are_refused_before_training(options, message, example, tmp_path, capsys):
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        example.main([f"--output_dir={tmp_path / 'run'}", *TRAINING, *options])
    assert message in f"{error.value}{capsys.readouterr().err}"
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_comparison_of_two_variants(compare, captioned, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the comparison draws: pip install mue-hf[eval]")
    monkeypatch.setattr(compare, "TRAINING", TRAINING)
    monkeypatch.setattr(compare, "LAYERS", 3)
    options = "--steps 2 --captioning_share 0.5 --timing_steps 1 --scenes 2 --time_rows 1".split()
    arguments = [
        f"--output_dir={tmp_path}",
        f"--start_from={captioned}",
        *options,
        "--variants",
        "joint-encoder",
        "layers-2",
    ]
    compare.main(arguments)
    records = {name: json.loads((tmp_path / name / "record.json").read_text()) for name in arguments[-2:]}
    assert records["joint-encoder"]["steps"] == 2 <= records["layers-2"]["steps"]
    assert [record["layers"] for record in records.values()] == [{"encoder": n, "decoder": n} for n in (3, 2)]
    criteria = [{point["criterion"] for point in record["points"]} for record in records.values()]
    assert criteria[0] >= {"full", "similarity", "fixed", "fixed encoder", "fixed decoder"}
    assert criteria[1] >= {"full", "similarity", "fixed", "fixed image", "fixed decoder"}
    table = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.endswith(f"{table}\n") and table.count("\n|") == 3
    assert "\n\n16 test statements about 2 scenes; trained in float32; " in table
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    # what is finished is not made again, nor what version 0.1 finished
    monkeypatch.setattr(compare, "train", None)
    record = tmp_path / "layers-2" / "record.json"
    record.write_text(record.read_text().replace('"captioning_share"', '"telling_share"'))
    compare.main([*arguments, f"--table={tmp_path / 'other' / 'variants.md'}"])
    assert (tmp_path / "other" / "variants.md").read_text() == table
    with pytest.raises(ValueError, match="`--output_dir` must hold runs of these options"):
        compare.main([*arguments, "--steps=3"])


def test_comparison_starts_from_what_can_grow(compare, captioned, tmp_path, capsys):
    config = MuEForConditionalGeneration.from_pretrained(captioned).config
    config.encoder_layers = config.decoder_layers = 3
    config.save_pretrained(tmp_path / "deep")
    with pytest.raises(SystemExit):
        compare.main([f"--output_dir={tmp_path / 'out'}", f"--start_from={tmp_path / 'deep'}"])
    assert "--start_from must have at most 2 layers, as the smallest variant, got 3" in capsys.readouterr().err


def test_joint_and_decomposed_start_from_either(example, captioned, tmp_path):
    still = ["--layers=2", "--max_steps=1", "--learning_rate=0", "--muon_learning_rate=1e-12"]
    example.main([f"--output_dir={tmp_path / 'joint'}", f"--start_from={captioned}", *TRAINING, *still, "--joint"])
    assert not MuEForConditionalGeneration.from_pretrained(tmp_path / "joint").config.modality_decomposition
    example.main([f"--output_dir={tmp_path / 'apart'}", f"--start_from={tmp_path / 'joint'}", *TRAINING, *still])
    assert MuEForConditionalGeneration.from_pretrained(tmp_path / "apart").config.modality_decomposition


def test_comparison_needs_steps_for_entailment(compare, captioned, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([f"--output_dir={tmp_path}", f"--start_from={captioned}", "--captioning_share", "1"])
    assert "must leave steps for entailment" in capsys.readouterr().err
