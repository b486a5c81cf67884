"""Module paths of version 0.1 keep working, with a warning that names the new one."""

import subprocess
import sys
from importlib import import_module

import pytest

from mue_hf._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_old_paths(old):
    sys.modules.pop(f"mue_hf.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"`mue_hf.{old}` is now `mue_hf.{MOVED[old]}`") as caught:
        # as the statement does: the warning is shown where that stands
        __import__(f"mue_hf.{old}")
    assert caught[0].filename == __file__
    new = import_module(f"mue_hf.{MOVED[old]}")
    assert sys.modules[f"mue_hf.{old}"] is new and new.__spec__.name == new.__name__ == f"mue_hf.{MOVED[old]}"


def test_what_readers_of_the_documentation_of_0_1_wrote():
    code = """
import warnings; warnings.simplefilter("ignore")
from mue_hf.scenes import SceneDataset, write_scenes
from mue_hf.bulk import bulk_rows
from mue_hf.metrics import CAPTION_MODULE, ENTAILMENT_MODULE, caption_scores
from mue_hf.data import CaptionPairs, MuEDataCollator, load_captioning, load_entailment
from mue_hf.features import cache_trunk_features
from mue_hf.trainer import MuETrainer
from mue_hf.training_args import MuETrainingArguments
from mue_hf.costs import measure_costs
import mue_hf.evaluate, mue_hf.calibrate, mue_hf.publish, mue_hf.app
print(SceneDataset.__module__, measure_costs())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mue_hf.data.scenes", "{}"]


def test_a_name_that_never_was():
    with pytest.raises(ModuleNotFoundError, match="No module named 'mue_hf.scene'"):
        import_module("mue_hf.scene")


def test_the_command_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mue_hf.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("mue-hf ")
