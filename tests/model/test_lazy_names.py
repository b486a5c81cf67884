"""What `import mue_hf` gives: the model at once, what training takes when it is asked for."""

import subprocess
import sys

import pytest

import mue_hf

TRAINING = sorted(mue_hf._TRAINING)


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", TRAINING)
def test_names_are_there(name):
    pytest.importorskip("accelerate", reason="the names of training need the extra: pip install mue-hf[train]")
    assert name in dir(mue_hf)
    assert getattr(mue_hf, name).__name__ == name


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'mue_hf' has no attribute 'MuETrainr'"):
        _ = mue_hf.MuETrainr


def test_the_import_is_light():
    modules = ("datasets", "mue_hf.data", "mue_hf.training.trainer", "transformers.trainer")
    assert run(f"import sys, mue_hf; print([name for name in {modules} if name in sys.modules])").strip() == "[]"


def test_without_the_extra_it_is_named():
    code = """
import sys
sys.modules["accelerate"] = sys.modules["datasets"] = None
import mue_hf
assert mue_hf.MuEForConditionalGeneration
for name in mue_hf._TRAINING:
    try:
        getattr(mue_hf, name)
    except ImportError as error:
        print(error)
"""
    messages = run(code).splitlines()
    assert len(messages) == len(TRAINING)
    for name, message in zip(TRAINING, messages, strict=True):
        assert message.startswith(f"`{name}` needs the extra `train`")
        assert message.endswith("pip install 'mue-hf[train]'")
