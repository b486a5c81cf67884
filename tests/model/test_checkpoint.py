"""The checkpoints in the repository: small, whole, in step with the code, able to caption and to answer."""

import re
from itertools import pairwise
from pathlib import Path

import doors
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mue_hf import MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.data.scenes import COLORS, FORMS, SHAPES, SceneDataset, make_scene

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "mue-photos-small"
SCENES = ROOT / "checkpoints" / "mue-scenes-small"
FOLDERS = sorted(path for path in (ROOT / "checkpoints").iterdir() if path.is_dir())
# Bytes of a folder; a repository keeps every version.
LIMITS = {"mue-photos-small": 40e6, "mue-scenes-small": 8e6}


@pytest.fixture(scope="module")
def model() -> MuEForConditionalGeneration:
    return MuEForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_size_and_dtype(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LIMITS[folder.name]
    with safe_open(folder / "model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}
    assert torch.float16 in dtypes and torch.float32 not in dtypes
    # half precision on disk, single precision at work
    model = MuEForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert (model.config.encoder_layers, model.config.decoder_layers) == (6, 6)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_code_is_tracked(folder):
    assert not list(folder.glob("*.py"))
    for path in folder.glob("*.json"):
        assert not {"auto_map", "custom_pipelines"} & set(re.findall(r"\w+", path.read_text())), path.name


def test_published_it_loads_without_the_package(tmp_path):
    photo, published = str(tmp_path / "photo.png"), tmp_path / "published"
    SceneDataset(1, split="dev")[0]["image"].save(photo)
    assert cli.main(["publish", str(SCENES), "--to", str(published)]) == 0
    alone = doors.run("alone", published, photo, tmp_path)["seen"]
    doors.assert_same_remotely(alone, doors.record(str(published), photo))


def test_captions_with_and_without_exits(model):
    processor = MuEProcessor.from_pretrained(CHECKPOINT)
    with Image.open(ROOT / "examples" / "photos" / "cat.jpg") as image:
        inputs = processor(images=image)
    plain = model.generate(**inputs, return_dict_in_generate=True)
    assert plain.image_exit_layers.tolist() == [6]
    words = processor.decode(plain.sequences[0], skip_special_tokens=True).split()
    assert 4 <= len(words) <= 20
    for preset in ("quality", "balanced", "fast"):
        output = model.generate(**inputs, exit_preset=preset, return_dict_in_generate=True)
        assert output.executed_layers["decoder"] < plain.executed_layers["decoder"] or output.image_exit_layers < 6


@pytest.mark.parametrize("options", [{}, {"exit_preset": "balanced"}, {"exit_preset": "fast"}], ids=str)
def test_judges_scenes_with_and_without_exits(options):
    model, processor = MuEForConditionalGeneration.from_pretrained(SCENES).eval(), MuEProcessor.from_pretrained(SCENES)
    labels = list(processor.entailment_answers)
    answers = processor.encode_answers(list(processor.entailment_answers.values()))
    right, depths = [], {kind: [] for kind in FORMS}
    for row in SceneDataset(20, split="dev", captions=False):
        inputs = processor(images=row["image"], task="entailment", hypothesis=row["hypothesis"])
        with torch.no_grad():
            output = model.score_answers(answers, **inputs, **options, return_dict=True)
        best = [labels[index] for index in output.scores.argmax(1).tolist()]
        right += [answer == label for answer, label in zip(best, row["label"], strict=True)]
        for kind, depth in zip(row["kind"], output.decoder_exit_layers[:, 0].tolist(), strict=True):
            depths[kind].append(depth)
    # 160 statements, of which about nine in ten are judged rightly; a guess gets half of them
    assert sum(right) >= 136
    mean = {kind: sum(some) / len(some) for kind, some in depths.items()}
    if options.get("exit_preset") == "fast":
        assert mean["existence"] + 1 < mean["two_relations"] < 6
    elif not options:
        assert set(mean.values()) == {6}


@pytest.mark.parametrize("options", [{}, {"exit_preset": "balanced"}], ids=str)
def test_captions_of_scenes_name_what_is_there(options):
    model, processor = MuEForConditionalGeneration.from_pretrained(SCENES).eval(), MuEProcessor.from_pretrained(SCENES)
    count, right = 20, []
    rows = SceneDataset(count, split="dev", statements=0)
    inputs = processor(images=[rows[index]["image"] for index in range(count)])
    captions = processor.post_process_captions(model.generate(**inputs, **options))
    for index, caption in enumerate(captions):
        there = {(one.color, one.shape) for one in make_scene(index, split="dev").visible}
        named = [pair for pair in pairwise(caption.split()) if pair[0] in COLORS and pair[1] in SHAPES]
        assert named, caption
        right += [pair in there for pair in named]
    # a pair at random is there about one time in five
    assert sum(right) >= 0.9 * len(right)
