"""`mue-hf publish`, `push_to_hub` and the model card: into folders, and on a Hub in memory with clients of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import MagicMock

import hub_client
import pytest
from conftest import FIRST_PRESET, byte_checkpoint, tiny_model
from hub_standin import HubStandIn
from huggingface_hub import ModelCard
from huggingface_hub.utils import httpx
from safetensors.torch import load_file, save_file
from transformers import pipeline

import mue_hf
from mue_hf import MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.calibration import write_preset
from mue_hf.model.generation_mue import weights_fingerprint
from mue_hf.publishing.model_card import About, public_record, read_about, read_evaluation
from mue_hf.publishing.upload import upload
from mue_hf.training.arguments import MuETrainingArguments
from mue_hf.training.card import fill_card
from mue_hf.training.trainer import MuETrainer

pytest.importorskip("datasets", reason="evaluations need the extra train: pip install mue-hf[train]")
pytest.importorskip("matplotlib", reason="plots need the extra eval: pip install mue-hf[eval]")

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "model_cards").glob("*.toml"))
SOURCES = {path.name: path.read_bytes() for path in Path(mue_hf.__file__).parent.glob("model/*_mue.py")}
ABOUT = """
summary = "A model of a test."
language = "en"
base_model = ["org/base"]
datasets = ["org/scenes"]
license = "apache-2.0"
limits = ["It knows bytes alone."]
commands = "mue-hf evaluate captioning --data scenes:0:6"

[data_names]
"scenes:0:6" = "Scenes"
"""
# What `mue-hf calibrate` notes beside the options.
CALIBRATED = {
    "decoder_exit_threshold": 0.5,
    "task": "captioning",
    "risk": "disagreement",
    "budget": 0.05,
    "delta": 0.1,
    "method": "hoeffding-bentkus",
    "n": 300,
    "bound": 0.04,
    "generation": {"num_beams": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as a trainer leaves it: a tiny random model in three files whose tokens are bytes, and other things."""
    folder = tmp_path_factory.mktemp("checkpoint")
    byte_checkpoint(folder, max_shard_size="150KB", generation=FIRST_PRESET)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    model = MuEForConditionalGeneration.from_pretrained(folder)
    write_preset(folder, "certified", CALIBRATED | {"weights_fingerprint": weights_fingerprint(model)})
    (folder / "optimizer.pt").write_bytes(b"not for others")
    # an old copy of the code, which must not go out
    (folder / "modeling_mue.py").write_text("stale = True\n")
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The same checkpoint in one file."""
    folder = tmp_path_factory.mktemp("whole")
    MuEForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(folder)
    MuEProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def about(tmp_path_factory):
    path = tmp_path_factory.mktemp("about") / "about.toml"
    path.write_text(ABOUT)
    return path


@pytest.fixture(scope="module")
def evaluation(checkpoint, tmp_path_factory):
    """Real records: six scenes at full depth and with both presets."""
    path = tmp_path_factory.mktemp("evaluation") / "scenes.jsonl"
    command = ["evaluate", "captioning", "--model", str(checkpoint), "--data", "scenes:0:6", "--split", "test"]
    command += ["--preset", "first", "--preset", "certified", "--metrics", "cider", "--tokenizer", "plain"]
    assert cli.main([*command, "--time-rows", "2", "--time-repeats", "1", "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def hub():
    with HubStandIn({"owner": ("org",), "reader": ("elsewhere",)}) as server:
        yield server


def start(hub: HubStandIn, home: Path, *command: str, token: str | None = None) -> subprocess.Popen:
    """A process of a machine that has nothing of the Hub yet."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    # Xet is a protocol of its own with servers of its own; without it huggingface_hub speaks LFS.
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **streams)


def take_steps(hub: HubStandIn, place: Path, door: str, steps: list[list]) -> list:
    """The results of a `hub_client.py`."""
    given, output = place / "steps.json", place / "results.json"
    given.write_text(json.dumps(steps))
    process = start(hub, place / "home", hub_client.__file__, door, given, output)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return json.loads(output.read_text())


def files(hub: HubStandIn, name: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repositories[name].branches[revision]


def weight_names(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("model") and ".safetensors" in name}


@pytest.fixture(scope="module")
def inside(hub, checkpoint, whole, about, evaluation, photo, tmp_path_factory):
    """By name, what a machine with the package saw and did, one after the other in one process."""
    place = tmp_path_factory.mktemp("inside")
    hub.add("someone/taken")
    hub.failures["/api/models/org/down/branch"] = 503
    call = ["publish", str(checkpoint)]
    steps = {
        "publish": ["command", "owner", *call, "org/mue-ofa", "--about", str(about), "--evaluation", str(evaluation)],
        "load": ["load", "org/mue-ofa", photo],
        "task": ["inferred_task", "org/mue-ofa"],
        "push": ["push", str(checkpoint), str(place / "run")],
        "branch": ["command", "owner", *call, "org/mue-ofa", "--revision", "v2"],
        "branch again": ["command", "owner", "publish", str(whole), "org/mue-ofa", "--revision", "v2"],
        "private": ["command", "owner", *call, "org/hidden", "--private"],
        "private too late": ["command", "owner", *call, "org/mue-ofa", "--private"],
        "proposal": ["command", "reader", *call, "org/mue-ofa", "--create-pr"],
        "taken": ["command", "owner", *call, "someone/taken"],
        "not mine": ["command", "owner", *call, "someone/new"],
        "read only": ["command", "reader", *call, "org/mue-ofa"],
        "wrong token": ["command", "owner", *call, "org/mue-ofa", "--token", "wrong"],
        "no token": ["command", "", *call, "org/mue-ofa"],
        "down": ["command", "owner", *call, "org/down", "--revision", "v2"],
    }
    return dict(zip(steps, take_steps(hub, place, "with", list(steps.values())), strict=True))


def assert_loads_alone(found: dict[str, bytes]) -> None:
    """All that `trust_remote_code=True` needs is there, and is the installed code."""
    assert {name: found.get(name) for name in SOURCES} == SOURCES
    config = json.loads(found["config.json"])
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_mue.MuEForConditionalGeneration"
    assert config["custom_pipelines"]["image-to-text"]["impl"] == "pipeline_mue.MuEImageToTextPipeline"
    assert json.loads(found["processor_config.json"])["auto_map"] == {"AutoProcessor": "processing_mue.MuEProcessor"}
    assert "AutoTokenizer" in json.loads(found["tokenizer_config.json"])["auto_map"]
    assert set(json.loads(found["generation_config.json"])["exit_presets"]) == {"certified", "first"}


class TestPublished:
    def test_files(self, hub, checkpoint, inside):
        assert inside["publish"]["code"] == 0, inside["publish"]
        found = files(hub, "org/mue-ofa")
        assert_loads_alone(found)
        kept = {name: (checkpoint / name).read_bytes() for name in weight_names(os.listdir(checkpoint))}
        kept["generation_config.json"] = (checkpoint / "generation_config.json").read_bytes()
        assert {name: found.get(name) for name in kept} == kept
        assert "optimizer.pt" not in found
        repository = hub.repositories["org/mue-ofa"]
        assert repository.commits["main"] == 1
        *listed, address = inside["publish"]["out"].splitlines()
        assert address == f"{hub.endpoint}/org/mue-ofa/commit/{repository.sha('main')}"
        assert {line.split()[1] for line in listed[:-1]} == set(found)

    def test_card(self, hub, inside):
        found = files(hub, "org/mue-ofa")
        card = ModelCard(found["README.md"].decode())
        data = card.data
        assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
        assert (data.base_model, data.datasets) == (["org/base"], ["org/scenes"])
        assert (data.license, data.language) == ("apache-2.0", "en")
        records = [json.loads(line) for line in found["evaluation.jsonl"].decode().splitlines()]
        cider = {record["name"]: record["quality"]["cider_plain"] for record in records}
        assert set(cider) == {"full depth", "first", "certified"}
        results = {result.metric_name: result for result in data.eval_results}
        for name, value in cider.items():
            assert results[f"CIDEr-D, {name}"].metric_value == round(value, 4)
        one = results["CIDEr-D, full depth"]
        assert (one.dataset_name, one.dataset_split, one.metric_type) == ("Scenes", "test", "cider")
        for text in (
            "### Captioning on Scenes",
            "| full depth | ",
            "![Captioning on Scenes: quality against FLOPs skipped](evaluation-1.png)",
            "| `first` | `decoder_exit_threshold=-2.0, image_exit_threshold=-2.0` | none: chosen by hand |",
            "| `certified` | `decoder_exit_threshold=0.5` | about outputs: at most 5% of the captions are others than "
            "without exits, with confidence 90% (hoeffding-bentkus); tested on 300 images that the search had not seen"
            ', under `{"num_beams": 2}`, in float32 |',
            "* It knows bytes alone.",
            "```\nmue-hf evaluate captioning --data scenes:0:6\n```",
            'pipeline("image-text-to-text", model="org/mue-ofa", trust_remote_code=True)',
            "@inproceedings{tang2023mue",
        ):
            assert text in card.text, text
        assert found["evaluation-1.png"].startswith(b"\x89PNG")

    def test_records_name_no_folder(self, hub, inside, checkpoint):
        assert str(checkpoint) not in files(hub, "org/mue-ofa")["evaluation.jsonl"].decode()

    def test_loads_with_the_package(self, inside, checkpoint, photo):
        seen = inside["load"]
        assert seen["packages"] == ["mue_hf"]
        head = "MuEForConditionalGeneration"
        assert seen["classes"] == ["MuEModel", head, "MuEProcessor", "MuEImageTextToTextPipeline"]
        here = pipeline("image-text-to-text", model=str(checkpoint), device="cpu")
        assert seen["caption"] == here(photo) and seen["preset"] == here(photo, exit_preset="first")
        assert inside["task"] == "image-text-to-text"

    def test_loads_without_the_package(self, inside, hub, checkpoint, photo, tmp_path):
        names = ["org/mue-ofa", "org/pushed", "org/trained"]
        here = pipeline("image-text-to-text", model=str(checkpoint), device="cpu")
        for seen in take_steps(hub, tmp_path, "without", [["load", name, photo, "owner"] for name in names]):
            assert seen["packages"] == ["transformers_modules"]
            assert seen["caption"] == here(photo) and seen["preset"] == here(photo, exit_preset="first")


def test_pushed_by_model_processor_and_trainer(hub, inside):
    for name in ("org/pushed", "org/trained"):
        assert_loads_alone(files(hub, name))
    assert hub.repositories["org/pushed"].private and not hub.repositories["org/trained"].private
    # what loads a processor, where there is no model
    assert {"processing_mue.py", "scoring_mue.py", "processor_config.json"} <= set(files(hub, "org/processor"))
    card = ModelCard(files(hub, "org/trained")["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("apache-2.0", ["org/data"])
    assert card.data.library_name == "transformers"
    assert "Trained with `MuETrainer`" in card.text and "* learning_rate: 5e-05" in card.text
    assert 'model="org/trained"' in card.text


class TestWhereTo:
    def test_branch(self, hub, inside):
        assert (inside["branch"]["code"], inside["branch again"]["code"]) == (0, 0), inside
        found = files(hub, "org/mue-ofa", "v2")
        assert_loads_alone(found)
        # what is left of an older state would be taken for a part of the new one
        assert weight_names(found) == {"model.safetensors"}
        assert not {"evaluation.jsonl", "evaluation-1.png"} & set(found)

    def test_private(self, hub, inside):
        assert inside["private"]["code"] == 0, inside["private"]
        assert hub.repositories["org/hidden"].private
        assert inside["private too late"]["code"] == 2
        assert "make it private in its settings" in inside["private too late"]["err"]

    def test_pull_request(self, hub, inside):
        assert inside["proposal"]["code"] == 0, inside["proposal"]
        assert inside["proposal"]["out"].endswith("/org/mue-ofa/discussions/1\n")
        assert_loads_alone(files(hub, "org/mue-ofa", "refs/pr/1"))

    def test_nothing_else_was_written(self, hub, inside):
        assert hub.repositories["org/mue-ofa"].commits == {"main": 1, "v2": 2, "refs/pr/1": 1}
        assert files(hub, "someone/taken") == {} and "someone/new" not in hub.repositories
        assert files(hub, "org/down") == {}


@pytest.mark.parametrize(
    ("step", "texts"),
    [
        ("taken", ["someone/taken cannot be written with this token (403", "choose a name of your own"]),
        (
            "not mine",
            ["someone/new cannot be written with this token (403: You don't have the rights", "choose a name"],
        ),
        ("read only", ["org/mue-ofa cannot be written with this token (403", "a token with write access"]),
        ("wrong token", ["(401: ", "hf auth login"]),
        ("no token", ["(401: ", "hf auth login"]),
        ("down", ["did not finish", "503", "Run the same command again"]),
    ],
)
def test_refusals(inside, step, texts):
    assert inside[step]["code"] == 2 and "Traceback" not in inside[step]["err"]
    message = inside[step]["err"].splitlines()[-1]
    assert message.startswith("mue-hf publish: ") and all(text in message for text in texts), message


def test_interrupted_and_resumed(checkpoint, tmp_path):
    command = ["-m", "mue_hf.cli", "publish", str(checkpoint), "org/interrupted"]
    with HubStandIn({"owner": ("org",)}) as hub:
        hub.most_files = 1
        process = start(hub, tmp_path / "home", *command, token="owner")
        assert hub.blocked.wait(300), process.poll()
        process.kill()
        process.communicate()
        assert files(hub, "org/interrupted") == {} and sum(hub.sent.values()) == 1
        hub.most_files = None
        hub.released.set()
        process = start(hub, tmp_path / "home", *command, token="owner")
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        names = weight_names(os.listdir(checkpoint)) - {"model.safetensors.index.json"}
        found = files(hub, "org/interrupted")
        assert {name: found[name] for name in names} == {name: (checkpoint / name).read_bytes() for name in names}
        # none was sent twice
        assert set(hub.sent.values()) == {1} and len(hub.sent) == len(names)


def write_other_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = {name: value + 1 if value.is_floating_point() else value for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "generation_config.json").read_text())
    del config["exit_presets"]["certified"]
    (folder / "generation_config.json").write_text(json.dumps(config))


class TestBadInput:
    """Found before anything is sent; the address of these tests' Hub is nowhere."""

    @pytest.fixture
    def copy(self, checkpoint, tmp_path):
        return Path(shutil.copytree(checkpoint, tmp_path / "copy"))

    @pytest.fixture
    def refused(self, capsys):
        def call(*arguments):
            assert cli.main(["publish", *map(str, arguments), "--dry-run"]) == 2
            return capsys.readouterr().err

        return call

    @pytest.mark.parametrize(
        "name", ["config.json", "generation_config.json", "processor_config.json", "tokenizer.json"]
    )
    def test_missing_file(self, copy, refused, name):
        (copy / name).unlink()
        assert f"lacks {name}; save the model and its processor there" in refused(copy, "org/name")

    def test_missing_shard(self, copy, refused):
        path = sorted(copy.glob("*.safetensors"))[1]
        path.unlink()
        assert f"lacks ['{path.name}']" in refused(copy, "org/name")

    def test_pickled_weights(self, copy, refused):
        for path in copy.glob("model*.safetensors*"):
            path.unlink()
        (copy / "pytorch_model.bin").write_bytes(b"")
        assert "must hold safetensors weights" in refused(copy, "org/name")

    def test_cut_weights(self, copy, refused):
        path = sorted(copy.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-100])
        assert "cannot be loaded" in refused(copy, "org/name")

    def test_missing_tensors(self, copy, refused):
        path = sorted(copy.glob("*.safetensors"))[0]
        tensors = load_file(path)
        del tensors[next(name for name in tensors if "layers" in name)]
        save_file(tensors, path, metadata={"format": "pt"})
        assert "lack 1 tensors" in refused(copy, "org/name")

    def test_other_model(self, copy, refused):
        (copy / "config.json").write_text('{"model_type": "bert"}')
        assert "got 'bert'" in refused(copy, "org/name")

    def test_no_folder(self, refused):
        assert "must be a folder" in refused("org/elsewhere", "org/name")

    def test_name(self, checkpoint, refused):
        assert "must be given, got none; name it, or pass `--to DIR`" in refused(checkpoint)
        assert "must be named ORG/NAME" in refused(checkpoint, "name")
        assert "Repo id must" in refused(checkpoint, "org/na me")

    def test_preset_of_other_weights(self, copy, refused):
        write_preset(copy, "stale", CALIBRATED | {"weights_fingerprint": "0" * 64})
        assert "'stale' was calibrated on other weights" in refused(copy, "org/name")

    def test_records_of_other_weights(self, copy, refused, evaluation):
        write_other_weights(copy)
        assert "must hold records of the weights" in refused(copy, "org/name", "--evaluation", evaluation)

    def test_costs_of_old_checkpoints_are_no_thresholds(self, copy, evaluation):
        path = copy / "generation_config.json"
        costs = {"cpu": {"text": {"fixed": 0.0, "per_row": 1.0, "shrink": 1.0}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"exit_costs": costs}))
        assert cli.main(["publish", str(copy), "org/name", "--evaluation", str(evaluation), "--dry-run"]) == 0

    def test_records_of_other_thresholds(self, copy, refused, evaluation):
        write_preset(copy, "first", {"image_exit_threshold": 0.5})
        assert "'first' was evaluated with other thresholds" in refused(copy, "org/name", "--evaluation", evaluation)

    def test_missing_extra(self, checkpoint, refused, evaluation, monkeypatch):
        monkeypatch.setattr("mue_hf.evaluation.plots.find_spec", lambda name: None)
        assert "pip install 'mue-hf[eval]'" in refused(checkpoint, "org/name", "--evaluation", evaluation)

    @pytest.mark.parametrize(
        "content", ["", "{}", "no json", '["a list"]'], ids=["empty", "no-record", "text", "list"]
    )
    def test_no_records(self, checkpoint, refused, tmp_path, content):
        path = tmp_path / "evaluation.jsonl"
        path.write_text(content)
        assert "`--evaluation` must" in refused(checkpoint, "org/name", "--evaluation", path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("licence = 'mit'", "['licence']"),
            ("limits = 'none'", "`limits` must be"),
            ("datasets = [1]", "`datasets` must be"),
            ("summary = ", "must be a TOML file"),
        ],
        ids=["unknown", "text-for-list", "number-for-text", "no-toml"],
    )
    def test_about(self, checkpoint, refused, tmp_path, content, message):
        path = tmp_path / "about.toml"
        path.write_text(content)
        assert message in refused(checkpoint, "org/name", "--about", path)


def in_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def published(checkpoint, about, evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "new" / "mue-ofa"
    command = ["publish", str(checkpoint), "org/mue-ofa", "--to", str(folder), "--about", str(about)]
    assert cli.main([*command, "--evaluation", str(evaluation)]) == 0
    return folder


class TestToFolder:
    """`--to DIR` writes what the Hub would get."""

    def test_files(self, published, hub, inside):
        assert not any(path.is_symlink() for path in published.iterdir())
        assert [path.name for path in published.parent.iterdir()] == ["mue-ofa"]
        assert in_folder(published) == files(hub, "org/mue-ofa")

    def test_loads_without_the_package(self, published, hub, checkpoint, photo, tmp_path):
        (seen,) = take_steps(hub, tmp_path, "without", [["load", str(published), photo]])
        here = pipeline("image-text-to-text", model=str(checkpoint), device="cpu")
        assert seen["packages"] == ["transformers_modules"]
        assert seen["caption"] == here(photo) and seen["preset"] == here(photo, exit_preset="first")

    def test_without_a_name_the_card_names_the_folder(self, whole, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert cli.main(["publish", str(whole), "--to", "here"]) == 0
        assert 'model="here", trust_remote_code=True)' in (tmp_path / "here" / "README.md").read_text()

    def test_overwrites_checkpoints_that_it_is_told_to(self, whole, tmp_path, capsys):
        command = ["publish", str(whole), "--to", str(tmp_path / "here")]
        assert cli.main(command) == 0
        (tmp_path / "here" / "memo_mue.py").touch()
        before = in_folder(tmp_path / "here")
        assert cli.main(command) == 2
        assert "must be empty or new, got" in capsys.readouterr().err and in_folder(tmp_path / "here") == before
        assert cli.main([*command, "--overwrite"]) == 0
        before.pop("memo_mue.py")
        assert in_folder(tmp_path / "here") == before and os.listdir(tmp_path) == ["here"]

    def test_other_folders_are_kept(self, whole, tmp_path, capsys):
        (tmp_path / "thesis.txt").write_text("precious")
        assert cli.main(["publish", str(whole), "--to", str(tmp_path), "--overwrite"]) == 2
        assert "has no config.json" in capsys.readouterr().err and os.listdir(tmp_path) == ["thesis.txt"]

    @pytest.mark.parametrize("target", [".", ".."])
    def test_the_checkpoint_is_kept(self, whole, tmp_path, capsys, target):
        (tmp_path / "config.json").write_text("{}")
        copy = Path(shutil.copytree(whole, tmp_path / "copy"))
        assert cli.main(["publish", str(copy), "--to", str(copy / target), "--overwrite"]) == 2
        assert "must be another folder" in capsys.readouterr().err and in_folder(copy) == in_folder(whole)

    def test_all_or_nothing(self, whole, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("mue_hf.publishing.upload.MuEProcessor.save_pretrained", MagicMock(side_effect=OSError))
        assert cli.main(["publish", str(whole), "--to", str(tmp_path / "here")]) == 2
        assert os.listdir(tmp_path) == []


def test_dry_run_lists_and_sends_nothing(checkpoint, capsys):
    assert cli.main(["publish", str(checkpoint), "org/name", "--dry-run"]) == 0
    out = capsys.readouterr().out
    listed = {line.split()[1] for line in out.splitlines() if line.startswith("  ")}
    weights = {path.name for path in checkpoint.glob("model*.safetensors*")}
    assert weights | set(SOURCES) | {"README.md", "config.json", "generation_config.json", "tokenizer.json"} <= listed
    assert out.endswith("Nothing was sent.\n")


def test_tables_need_no_package_of_evaluations(checkpoint, evaluation):
    script = (
        "import sys\n"
        "for name in ('datasets', 'evaluate', 'pycocoevalcap'):\n"
        "    sys.modules[name] = None\n"
        "from mue_hf import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = ["publish", str(checkpoint), "org/name", "--evaluation", str(evaluation), "--dry-run"]
    subprocess.run([sys.executable, "-c", script, *command], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), RuntimeError("lost"), ConnectionError("Xet")],
    ids=lambda error: type(error).__name__,
)
def test_interruptions_by_the_network_say_what_to_do(error, monkeypatch, tmp_path):
    monkeypatch.setattr("mue_hf.publishing.upload.HfApi.create_repo", lambda *args, **options: None)
    monkeypatch.setattr("mue_hf.publishing.upload.HfApi.upload_folder", MagicMock(side_effect=error))
    with pytest.raises(OSError, match=f"{error}.*Run the same command again"):
        upload(tmp_path, "org/name")


def test_trainer_writes_its_card(tmp_path):
    trainer = MuETrainer(tiny_model(), MuETrainingArguments(str(tmp_path / "run"), use_cpu=True))
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer.create_model_card(finetuned_from="org/base")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == ["org/base"] and "# run\n" in card.text and "* seed: 42" in card.text


def test_the_example_of_captions_names_no_preset_for_answers():
    model = tiny_model()
    presets = {"answers": {"exit_fit": {"answers": "hash"}}, "captions": {"decoder_exit_threshold": 0.9}}
    for names, shown in ((["answers", "captions"], ', exit_preset="captions")'), (["answers"], '"photo.jpg")')):
        model.generation_config.exit_presets = {name: presets[name] for name in names}
        assert shown in fill_card(model, "org/x", About(), dict.fromkeys(names, "none"))


def test_points_of_one_name_count_once(evaluation, tmp_path):
    path = tmp_path / "twice.jsonl"
    first = json.loads(evaluation.read_text().splitlines()[0])
    again = first | {"rows": 7}
    path.write_text("".join(json.dumps(one) + "\n" for one in (first, again)))
    assert read_evaluation(path) == [again]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/someone/captions.jsonl", "captions.jsonl"),
        ("../data/captions.jsonl", "captions.jsonl"),
        ("~/captions.jsonl", "captions.jsonl"),
        ("images/cat.jpg", "images/cat.jpg"),
        ("org/data", "org/data"),
        ("scenes:0:6", "scenes:0:6"),
    ],
)
def test_public_records_have_no_folders(path, shown):
    record = {"model": path, "source": {"data": path, "split": "test"}, "easiest": [{"image_id": path, "depth": 2.0}]}
    record["words_from"] = [[path], "train"]
    record["samples"] = {"best": {"image_id": path, "output": "a cat", "cider": 2.0}}
    public = public_record(record | {"hardest": []}, "org/name")
    assert public["words_from"] == [[shown], "train"]
    assert public["samples"] == {"best": {"image_id": shown, "output": "a cat", "cider": 2.0}}
    assert public["model"] == "org/name" and public["source"] == {"data": shown, "split": "test"}
    assert public["easiest"] == [{"image_id": shown, "depth": 2.0}]


@pytest.mark.parametrize("has_code", [True, False])
def test_a_checkpoints_own_card_knows_whether_code_is_there(whole, tmp_path, monkeypatch, has_code):
    copy = Path(shutil.copytree(whole, tmp_path / "org" / "copy"))
    if not has_code:
        for path in copy.glob("*_mue.py"):
            path.unlink()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["publish", "org/copy", "org/copy", "--card", "card.md"]) == 0
    card = (tmp_path / "card.md").read_text()
    assert ('model="org/copy", trust_remote_code=True)' in card) == has_code
    assert ("on the Hub or into a folder with `--to`" in card) != has_code
    assert bool(list(copy.glob("*_mue.py"))) == has_code


@pytest.mark.parametrize("about", CARDS, ids=lambda path: path.stem)
class TestRepositoryCards:
    def test_rendered(self, about, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(ROOT)
        checkpoint = f"checkpoints/{about.stem}"
        card = tmp_path / f"{about.stem}.md"
        command = ["publish", checkpoint, checkpoint, "--about", str(about), "--card", str(card)]
        evaluation = about.with_suffix(".evaluation.jsonl")
        if evaluation.exists():
            command += ["--evaluation", str(evaluation)]
        assert cli.main(command) == 0, capsys.readouterr().err
        # pictures differ with the version of matplotlib
        for path in tmp_path.iterdir():
            here = about.with_name(path.name)
            assert here.exists(), "run `make cards`"
            if path.suffix != ".png":
                assert here.read_text() == path.read_text(), "run `make cards`"
        assert {path.name for path in tmp_path.iterdir()} == {
            path.name for path in about.parent.glob(f"{about.stem}.*") if path != about
        }

    def test_states_what_a_card_needs(self, about):
        content = read_about(about)
        assert all([content.summary, content.training, content.license, content.license_note, content.limits])
        assert content != About()


def test_every_checkpoint_has_a_card():
    assert {path.stem for path in CARDS} == {path.name for path in (ROOT / "checkpoints").iterdir() if path.is_dir()}
