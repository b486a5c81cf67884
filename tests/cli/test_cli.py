"""The command line: dispatch, and `mue-hf caption` on a tiny checkpoint and real image files."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec

import pytest
import torch
from bulk_fixtures import PHOTO_SIZE
from PIL import Image

from mue_hf import MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.cli.options import setting
from mue_hf.inference.loading import check_not_replaced, load_checkpoint

# A checkpoint that left with 0.3.0.
OLD = "checkpoints/mue-flickr8k-small"


@pytest.fixture
def caption_json(checkpoint, tmp_path, capsys):
    """Runs `mue-hf caption --json` and returns the exit code and the records."""

    def run(*arguments):
        fixed = ["--model", str(checkpoint), "--repeats", "1", "--json", "--png", str(tmp_path / "out")]
        code = cli.main(["caption", *map(str, arguments), *fixed])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.parametrize("command", ["answer", "caption", "convert", "trim"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"mue-hf {command} " in capsys.readouterr().out.split("example", 1)[1]


def test_general_help_imports_no_command_and_has_them_in_order(monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: pytest.fail(f"imported {name}"))
    shown = cli.build_parser().format_help()
    names = ["caption", "app", "answer", "convert", "export", "evaluate", "calibrate", "bench", "trim", "publish"]
    places = [shown.index(f"\n  {name} ") for name in names]
    assert places == sorted(places) and names == list(cli.COMMANDS)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_takes_debug(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert "--debug" in capsys.readouterr().out


def test_debug_shows_where_an_error_came_from(checkpoint, photos, capsys, monkeypatch):
    command = ["caption", photos[0], "--model", str(checkpoint)]
    hint = "--debug shows where this came from."
    # an error of this package says what to do
    assert cli.main([*command, "--preset", "nosuch"]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and hint not in message
    assert cli.main([*command, "--preset", "nosuch", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith(message.splitlines()[-1] + "\n")
    # that of another one does not
    monkeypatch.setattr("mue_hf.cli.caption.load_model", lambda args: json.loads("{"))
    assert cli.main(command) == 2
    error, last = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("mue-hf caption: Expecting property name") and last == hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: command"), (["dance"], "invalid choice"), (["caption"], "IMAGE")],
    ids=["none", "unknown", "no image"],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "`--model` must be a checkpoint folder that exists, or a Hub id such as"),
        (["--model", "/no/such"], "ORG/NAME, got '/no/such'; check the path."),
        ([], "`--model` is needed"),
        (["--device", "nowhere"], "`--device` must be"),
        (["--preset", "nosuch"], "`exit_preset` must name a preset"),
        (["--decoder-threshold", "nan"], "`decoder_exit_threshold` must be a finite number"),
        (["--encoder-threshold", "0.9"], "`encoder_exit_threshold` needs"),
        (["--generate", "exit_criterian=never"], "did you mean `exit_criterion`"),
        (["--generate", "num_beams=zero"], "`num_beams` must be a whole number, got 'zero'"),
        (["--generate", "num_beams=1.5"], "`num_beams` must be a whole number, got 1.5"),
        (["--generate", "max_new_tokens=0"], "`max_new_tokens` must be at least 1, got 0"),
        (["--generate", "length_penalty=long"], "`length_penalty` must be a number, got 'long'"),
    ],
    ids=[
        *("missing folder", "missing path", "no model", "device", "preset", "nan", "other mode", "misspelt"),
        *("word", "fraction", "zero", "no number"),
    ],
)
def test_bad_input_is_a_message_and_code_2(arguments, message, checkpoint, photos, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = [] if not arguments or arguments[0] == "--model" else ["--model", str(checkpoint)]
    assert cli.main(["caption", photos[0], *model, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "mue-captions").exists()


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--batch-size", "x"], ["--generate", "novalue"]])
def test_bad_values_are_usage_errors(arguments, photos):
    with pytest.raises(SystemExit) as stop:
        cli.main(["caption", photos[0], *arguments])
    assert stop.value.code == 2


def test_other_checkpoints_are_refused(photos, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert cli.main(["caption", photos[0], "--model", str(tmp_path)]) == 2
    assert "model_type \"mue\", got 'bert'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        f"caption a.png --model {OLD}",
        f"caption a.png --model {OLD} --out captions.jsonl",
        f"answer pairs.jsonl --answers yes,no --model {OLD} --out answers.jsonl",
        pytest.param(
            f"app --model {OLD} --photos .",
            marks=pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra app"),
        ),
        f"evaluate captioning --model {OLD} --data scenes:0:4 --output records.jsonl",
        f"evaluate entailment --model {OLD} --data nowhere.jsonl --output records.jsonl",
        f"calibrate {OLD} --task captioning --data nowhere.jsonl --preset mine",
        f"bench --model {OLD} --output bench.json",
        f"publish {OLD} my-name/mine --about gone.toml --evaluation gone.jsonl --dry-run",
        f"publish {OLD} --to published",
        f"publish {OLD} my-name/mine --card card.md",
    ],
    ids=lambda command: command.replace(OLD, "OLD"),
)
def test_a_checkpoint_that_was_replaced_names_the_new_one(command, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "hypothesis": "a cat"}\n')
    there = sorted(tmp_path.rglob("*"))
    assert cli.main(command.split()) == 2
    captured = capsys.readouterr()
    assert f"the checkpoint '{OLD}' left with version 0.3.0; use 'checkpoints/mue-photos-small'" in captured.err
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == there


def test_names_of_replaced_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (OLD, f"{OLD}/", "mue-flickr8k-small", str(tmp_path / OLD)):
        with pytest.raises(ValueError, match="use '.*mue-photos-small'"):
            load_checkpoint(name)
    # somebody's on the Hub, and one that was kept
    check_not_replaced("my-name/mue-flickr8k-small")
    (tmp_path / OLD).mkdir(parents=True)
    check_not_replaced(OLD)


def test_damaged_weights_are_refused(checkpoint, photos, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9000])
    assert cli.main(["caption", photos[0], "--model", str(folder)]) == 2
    assert "`--model` must be a whole checkpoint" in capsys.readouterr().err


def test_records_say_what_generate_says(caption_json, checkpoint, photos):
    code, (record,) = caption_json(photos[0], "--image-threshold", "0.5,2,2", "--decoder-threshold", "0.9")
    assert code == 0

    model = MuEForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = MuEProcessor.from_pretrained(checkpoint)
    inputs = processor(images=photos[0], return_tensors="pt")
    exits = {"image_exit_threshold": [0.5, 2.0, 2.0], "decoder_exit_threshold": 0.9}
    output = model.generate(**inputs, **exits, return_dict_in_generate=True)
    full = model.generate(**inputs)
    assert [token["layers"] for token in record["tokens"]] == output.decoder_exit_layers[0].tolist()
    assert record["image_exit_layers"] == output.image_exit_layers[0]
    assert record["text_exit_layers"] == output.text_exit_layers[0] == 3
    assert record["caption"] == processor.decode(output.sequences[0], skip_special_tokens=True).strip()
    assert record["full_depth_caption"] == processor.decode(full[0], skip_special_tokens=True).strip()
    assert record["exits"] == exits
    assert record["seconds"] > 0 and record["full_depth_seconds"] > 0


def test_the_balanced_preset_is_the_default(caption_json, photos):
    _, (record,) = caption_json(photos[0])
    assert record["exits"] == {"exit_preset": "balanced"}
    assert (record["image_exit_layers"], record["text_exit_layers"]) == (1, 3)
    assert {token["layers"] for token in record["tokens"]} == {1}
    # Both stacks of three: image 1, text 3, tokens 1.
    assert record["layers_skipped"] == pytest.approx(1 - (2 + 1) / 6)
    assert 0 < record["flops_skipped"] < record["flops_skipped_without_trunk"] < 1


def test_exits_off_skip_nothing(caption_json, photos):
    _, (record,) = caption_json(photos[0], "--generate", "exit_criterion=never")
    assert record["caption"] == record["full_depth_caption"]
    assert record["layers_skipped"] == record["flops_skipped"] == 0


@pytest.mark.parametrize("beams", [1, 2])
def test_batches_and_pictures(beams, caption_json, photos, tmp_path):
    _, alone = caption_json(*photos, "--num-beams", beams)
    code, together = caption_json(*photos, "--num-beams", beams, "--batch-size", 2)
    assert code == 0
    for one, other in zip(alone, together, strict=True):
        assert (one["image"], one["caption"], one["tokens"]) == (other["image"], other["caption"], other["tokens"])
    assert [record["batch_size"] for record in together] == [2, 2, 1]
    # Two images of one name do not share a picture.
    pictures = [tmp_path / "out" / name for name in ("a.png", "b.png", "a-2.png")]
    assert [record["png"] for record in together] == [str(path) for path in pictures]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > PHOTO_SIZE[0]
            assert len(picture.getcolors(1 << 20)) > 10
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in pictures)


def test_one_caption_for_each_image(caption_json, checkpoint, photos, capsys):
    _, expected = caption_json(*photos, "--num-beams", 2, "--batch-size", 2)
    path = checkpoint / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"num_beams": 2, "num_return_sequences": 2}))
    try:
        _, records = caption_json(*photos, "--batch-size", 2)
    finally:
        path.write_text(before)
    for name in ("caption", "full_depth_caption", "tokens"):
        assert [record[name] for record in records] == [record[name] for record in expected]
    command = ["caption", photos[0], "--model", str(checkpoint), "--generate", "num_return_sequences=2"]
    assert cli.main(command) == 2
    assert "`num_return_sequences` must be 1, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument", ["--overwrite", "--columns=seconds", "--keep=id", "--image-column=url", "--image-root=.", "--ray"]
)
def test_options_of_files_need_one(argument, checkpoint, photos, capsys):
    assert cli.main(["caption", photos[0], "--model", str(checkpoint), argument]) == 2
    assert f"`--out` must be given with `{argument.partition('=')[0]}`" in capsys.readouterr().err


def test_unreadable_images_do_not_stop_the_others(caption_json, photos, tmp_path):
    code, records = caption_json(tmp_path / "broken.jpg", photos[0], tmp_path / "absent.jpg", photos[1])
    assert code == 1
    assert [record["image"] for record in records] == photos[:2]


def test_names_that_are_no_text(checkpoint, photos, capsys, tmp_path):
    name = os.fsdecode(b"\xff.png")
    shutil.copyfile(photos[0], tmp_path / name)
    command = ["caption", str(tmp_path / name), "--model", str(checkpoint), "--repeats", "1", "--png", str(tmp_path)]
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as out:
        assert cli.main(command) == 0
        out.flush()
    assert b"udcff.png" in out.buffer.getvalue()


def test_text_for_a_person(checkpoint, photos, capsys, tmp_path):
    code = cli.main(["caption", photos[0], "--model", str(checkpoint), "--repeats", "1", "--no-png"])
    out = capsys.readouterr().out
    assert code == 0
    for part in (photos[0], "with exits", "at full depth", "image stream   1 of 3", "% of FLOPs", " ms "):
        assert part in out
    assert "picture" not in out


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a=1", ("a", 1)), ("a=never", ("a", "never")), ("a=[1, null]", ("a", [1, None])), ("a=b=c", ("a", "b=c"))],
    ids=["number", "word", "list", "second equals sign"],
)
def test_settings(text, expected):
    assert setting(text) == expected


def test_the_module_is_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "mue_hf.cli", "--version"], check=True, capture_output=True, text=True
    )
    assert result.stdout.startswith("mue-hf ")
