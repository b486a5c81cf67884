"""transformers' own common tests of models and configurations, run on both model classes and in both encoder modes.

transformers ships them in its source distribution only. It is fetched from PyPI once, in the installed version, into
the user's cache; without network or pip the tests are skipped.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from conftest import tiny_config
from filelock import FileLock
from transformers.models.auto import modeling_auto

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEModel

PACKAGE = "sdist_common_tests"
NEEDED = ("test_modeling_common.py", "test_configuration_common.py")
# What these two import from folders of transformers' repository that its source distribution leaves out.
STUBS = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def fetch_common_tests(version: str) -> Path:
    """Folder with the package of common tests, downloaded unless it is there.

    Raises:
        OSError: if pip cannot download the source distribution.
        KeyError: if it holds no common tests.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mue-hf-tests"
    folder = cache / f"transformers-{version}"
    cache.mkdir(parents=True, exist_ok=True)
    # test processes that run side by side must collect the same tests
    with FileLock(cache / "lock"), tempfile.TemporaryDirectory(dir=cache) as scratch:
        if folder.is_dir():
            return folder
        download(version, Path(scratch))
        package = Path(scratch) / "new" / PACKAGE
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for name in NEEDED:
                content = archive.extractfile(f"transformers-{version}/tests/{name}").read()
                write(package / name, content.decode())
        for name, content in STUBS.items():
            write(package / name, content)
        package.parent.rename(folder)
    return folder


def download(version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
    command += ["--no-build-isolation", "--retries", "1", "--timeout", "15", "--disable-pip-version-check"]
    command += ["--dest", str(folder), f"transformers=={version}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise OSError(result.stderr.strip().splitlines()[-1])


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def common_tests() -> tuple[ModuleType, ModuleType]:
    """The modules of model tests and of configuration tests."""
    try:
        folder = fetch_common_tests(transformers.__version__)
    except (OSError, KeyError) as error:
        pytest.skip(
            f"the source distribution of transformers {transformers.__version__} was not obtained: {error}",
            allow_module_level=True,
        )
    sys.path.insert(0, str(folder))
    modeling, configuration = (importlib.import_module(f"{PACKAGE}.{Path(name).stem}") for name in NEEDED)
    return modeling, configuration


modeling, configuration = common_tests()


class MuEModelTester:
    """What the common tests ask about the model: its inputs and the sizes of its outputs."""

    batch_size = 3
    is_training = True
    image_tokens = 4
    # one length for both texts, since the tests use one mask for both
    seq_length = decoder_seq_length = 7
    encoder_seq_length = image_tokens + seq_length
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    attention: str | None = None

    def __init__(self, decomposed: bool):
        self.decomposed = decomposed

    def get_config(self) -> MuEConfig:
        return tiny_config(
            modality_decomposition=self.decomposed,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            attn_implementation=self.attention,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MuEConfig, dict]:
        config = self.get_config()
        inputs = {
            "input_ids": torch.randint(4, config.vocab_size, (self.batch_size, self.seq_length)),
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
            "pixel_values": torch.rand(self.batch_size, 3, 32, 32),
            "decoder_input_ids": torch.randint(4, config.vocab_size, (self.batch_size, self.seq_length)),
        }
        return config, inputs


class _CommonTests(modeling.ModelTesterMixin):
    all_model_classes = (MuEModel, MuEForConditionalGeneration)
    additional_model_inputs = ["pixel_values"]
    is_encoder_decoder = True
    decomposed: bool

    @pytest.fixture(autouse=True)
    def _names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The tests look class names up in transformers' static tables, which `register` does not fill."""
        for table, name in {
            "MODEL_MAPPING_NAMES": "MuEModel",
            "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "MuEForConditionalGeneration",
            "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "MuEForConditionalGeneration",
        }.items():
            monkeypatch.setitem(getattr(modeling_auto, table), "mue", name)

    def setUp(self) -> None:
        self.model_tester = MuEModelTester(self.decomposed)
        names = ["hidden_size", "num_attention_heads", "num_hidden_layers"]
        sizes = {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2}
        self.config_tester = configuration.ConfigTester(self, MuEConfig, common_properties=names, **sizes)

    @unittest.skip("its mixin of `generate` tests is not in the source distribution; test_generation.py stands for it")
    def test_generation_tester_mixin_inheritance(self) -> None: ...

    def test_model_outputs_equivalence(self) -> None:
        """Asks for attention weights, which this model refuses, rather than leaves out, unless attention is eager."""
        self.model_tester.attention = "eager"
        super().test_model_outputs_equivalence()

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class TestJoint(_CommonTests, unittest.TestCase):
    decomposed = False


class TestDecomposed(_CommonTests, unittest.TestCase):
    decomposed = True
    # one test in 160 with a fifth of the time, and nothing that it loads depends on the mode
    test_bc_torch_dtype = None

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self) -> tuple[MuEConfig, dict]:
        """Text alone: what two streams return is put together for the caller, and no gradient passes through that."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {name: value for name, value in inputs.items() if name != "pixel_values"}
