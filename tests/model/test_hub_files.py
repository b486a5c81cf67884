"""The two doors of a checkpoint: `import mue_hf`, or the source files in the folder; both open on the same model."""

import ast
import json
import shutil
import sys
from pathlib import Path

import doors
import numpy as np
import pytest
import torch
from conftest import character_tokenizer, tiny_model
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    pipeline,
)
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

import mue_hf
from mue_hf import MuEConfig, MuEImageProcessorPil, MuEProcessor, MuETokenizer

SOURCES = sorted(Path(mue_hf.__file__).parent.glob("model/*_mue.py"))
# Beside the standard library: torch, transformers, and what transformers itself cannot work without.
ALLOWED = {"PIL", "huggingface_hub", "numpy", "tokenizers", "torch", "torchvision", "transformers"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
class TestImportRule:
    """Without it, files go missing when transformers copies the source, or two copies of a class meet."""

    def test_imports(self, source):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                assert names <= ALLOWED | sys.stdlib_module_names, f"line {node.lineno}"
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in ALLOWED | sys.stdlib_module_names, f"line {node.lineno}"
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module, f"line {node.lineno}: from .name_mue import ..."
                assert (source.parent / f"{node.module}.py") in SOURCES, f"line {node.lineno}"

    def test_no_class_identity_and_no_global_state(self, source):
        for node in ast.walk(ast.parse(source.read_text())):
            assert not isinstance(node, ast.Global), f"line {node.lineno}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                names = {getattr(name, "id", getattr(name, "attr", "")) for name in ast.walk(node.args[1])}
                assert not names & {"MuEConfig", "MuEModel", "MuEForConditionalGeneration"}, f"line {node.lineno}"

    def test_config_reaches_it(self, source):
        reached = get_relative_import_files(source.with_name("configuration_mue.py"))
        assert str(source) in reached


class TestPublicApi:
    def test_names(self):
        assert mue_hf.__all__ == [
            "Criterion",
            "ExitOptions",
            "MuECache",
            "MuEConfig",
            "MuEForConditionalGeneration",
            "MuEImageProcessor",
            "MuEImageProcessorPil",
            "MuEImageTextToTextPipeline",
            "MuEImageToTextPipeline",
            "MuEModel",
            "MuEPreTrainedModel",
            "MuEProcessor",
            "MuETokenizer",
            "register_criterion",
        ]
        assert all(hasattr(mue_hf, name) for name in mue_hf.__all__)
        assert mue_hf.__version__.count(".") == 2

    def test_what_is_registered_is_exported(self):
        image_processors = IMAGE_PROCESSOR_MAPPING[MuEConfig]
        registered = {
            "MuEConfig": CONFIG_MAPPING["mue"],
            "MuEForConditionalGeneration": AutoModelForImageTextToText._model_mapping[MuEConfig],
            "MuEImageProcessor": image_processors["torchvision"],
            "MuEImageProcessorPil": image_processors["pil"],
            "MuEModel": AutoModel._model_mapping[MuEConfig],
            "MuEProcessor": PROCESSOR_MAPPING[MuEConfig],
        }
        assert registered == {name: getattr(mue_hf, name) for name in registered}
        assert AutoModelForSeq2SeqLM._model_mapping[MuEConfig] is mue_hf.MuEForConditionalGeneration
        assert TOKENIZER_MAPPING[MuEConfig] is MuETokenizer


@pytest.fixture(scope="module")
def model():
    model = tiny_model(vocab_size=100, dtype=torch.float32)
    options = model.generation_config
    options.max_new_tokens = 8
    options.image_exit_threshold = 0.6
    options.text_exit_threshold = [None, 0.5, 0.5]
    options.decoder_exit_threshold = 0.5
    options.exit_decay_beta = 0.9
    options.exit_presets = {"first": {"decoder_exit_threshold": -2.0}}
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    MuEProcessor(MuEImageProcessorPil(size={"height": 64, "width": 48}), character_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder, photo):
    return doors.record(str(folder), photo)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def remote(folder, photo, place):
    return doors.run("remote", folder, photo, place)


class TestPackage:
    def test_loads_what_was_saved(self, seen, model, folder, photo):
        assert set(seen["modules"]) == {f"mue_hf.model.{name}_mue" for name in ("modeling", "pipeline", "processing")}
        inputs = MuEProcessor.from_pretrained(folder)(images=[photo, None], text=[" what is it?", " and this?"])
        with torch.no_grad():
            # products of tensors that lie elsewhere in memory may differ in the last bit
            torch.testing.assert_close(seen["logits"], model(**inputs).logits, rtol=0, atol=1e-5)
            torch.testing.assert_close(seen["states"], model.model(**inputs).last_hidden_state, rtol=0, atol=1e-5)
        assert torch.equal(seen["text logits"], seen["logits"])
        for beams in (1, 3):
            output = model.generate(**inputs, num_beams=beams, return_dict_in_generate=True)
            for name, value in output.items():
                if f"beams {beams} {name}" in seen:
                    assert np.array_equal(seen[f"beams {beams} {name}"], value), name
        assert seen["generation config"] == model.generation_config.to_dict()
        assert seen["config"] == model.config.to_dict() | {"_name_or_path": str(folder)}

    def test_rows_really_exit_early(self, seen, model):
        for beams in (1, 3):
            for stream in ("image", "text"):
                assert 0 < seen[f"beams {beams} {stream}_exit_layers"][0] < model.config.encoder_layers
            depths = seen[f"beams {beams} decoder_exit_layers"]
            assert depths.unique().numel() > 1 and depths.max() < model.config.decoder_layers
        assert set(seen["preset"].unique().tolist()) == {1}

    def test_classes(self, seen):
        # transformers picks the image processor by what is installed, not by what was saved
        head, processors = "MuEForConditionalGeneration", ["MuEProcessor", "MuEImageProcessor"]
        tokenizers, pipe = ["MuETokenizer"] * 2, ["MuEImageTextToTextPipeline", head, "MuEProcessor"]
        images = ["MuEImageProcessor", "MuEImageProcessorPil"]
        assert seen["classes"] == [*processors, *tokenizers, head, head, "MuEModel", *pipe, *pipe, *images]

    def test_both_tasks_caption(self, seen):
        assert seen["image-to-text"] == seen["image-text-to-text"]
        assert all(set(one) == {"generated_text"} for (one,) in seen["image-to-text"])

    def test_trust_changes_nothing(self, seen, folder, photo, tmp_path):
        both = doors.run("both", folder, photo, tmp_path)["seen"]
        pairs = zip(both["classes"], both["modules"], strict=True)
        # the only one for which transformers 5.24 prefers the folder's copy to a registered class
        assert {name for name, module in pairs if not module.startswith("mue_hf.")} <= {"MuETokenizer"}
        doors.assert_same(both, seen)


class TestFolderAlone:
    @pytest.mark.parametrize("source", ["seen", "hub"], ids=["folder", "hub repository"])
    def test_equals_the_package(self, seen, remote, source):
        doors.assert_same_remotely(remote[source], seen)

    def test_needs_trust(self, remote):
        assert len(remote["refusals"]) == 3
        for answer in remote["refusals"]:
            assert "Please pass the argument `trust_remote_code=True`" in answer

    @pytest.mark.parametrize("name", ["result-again", "result-hub-again"], ids=["folder", "hub repository"])
    def test_saved_again(self, remote, place, folder, seen, photo, name):
        again = place / name
        assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
        for source in SOURCES:
            assert (again / source.name).read_bytes() == source.read_bytes(), source.name
        found = doors.record(str(again), photo)
        # loading fills in the path and the trunk's dtype
        found["config"] = seen["config"]
        doors.assert_same(found, seen)


def test_copies_of_another_version_are_left_alone(folder, seen, photo, tmp_path):
    """With the package, a folder of 0.1.0 loads as any: its source files have other names and are not run."""
    old = tmp_path / "old"
    shutil.copytree(folder, old, ignore=shutil.ignore_patterns("*_mue.py"))
    for name in ("answers", "configuration", "costs", "generation", "memo", "modeling", "pipeline", "processing"):
        (old / f"{name}_mue.py").write_text("raise RuntimeError('code of another version was run')\n")
    options = json.loads((old / "generation_config.json").read_text())
    costs = {"cpu": {"text": {"fixed": 0.0, "per_row": 1.0, "shrink": 1.0}}}
    (old / "generation_config.json").write_text(json.dumps(options | {"exit_costs": costs}))
    with pytest.warns(FutureWarning, match="`exit_costs` has no effect any more"):
        found = doors.record(str(old), photo)
    found["config"]["_name_or_path"] = str(folder)
    assert found["generation config"].pop("exit_costs", None) in (None, costs)
    doors.assert_same(found, seen)


def test_saved_pipeline_loads(folder, photo, tmp_path):
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    pipe.save_pretrained(tmp_path)
    assert pipeline("image-text-to-text", model=str(tmp_path), device="cpu")(photo) == pipe(photo)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == pipe.tokenizer.get_vocab()
