"""The pages say what the code has: the table of criteria, the reference, links; and they build without a warning."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import mue_hf
from mue_hf.model.criteria_mue import CRITERIA, Criterion, register_criterion

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import pages

    yield pages
    del sys.modules["pages"]


def test_the_table_of_criteria_is_that_of_the_code(pages):
    text = (ROOT / "docs" / "exits.md").read_text(encoding="utf-8")
    assert pages.with_table(text) == text, "run `python docs/pages.py`"
    assert all(f"\n| `{name}` | {criterion.summary} |" in text for name, criterion in CRITERIA.items())


def test_a_criterion_that_is_registered_is_in_the_table(pages):
    @register_criterion
    class Other(Criterion):
        name, summary, exits_above, in_encoder = "other", "something else", False, True
        sweep = classmethod(lambda cls, num_layers: (0.5, 0.25))

    try:
        found = pages.criteria_table().splitlines()[-1]
    finally:
        del CRITERIA["other"]
    assert found.startswith("| `other` | something else | `image_exit_threshold`, `text_exit_threshold`, ")
    assert found.endswith("| below the threshold | no | the same | 0.5, 0.25 |")


def test_the_reference_has_every_public_name():
    reference = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    entries = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", reference, re.M)}
    assert {*mue_hf.__all__, *mue_hf._TRAINING} <= entries
    listed = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "reference" / "README.md").read_text(encoding="utf-8"))
    assert {*listed, "README.md"} == {page.name for page in (ROOT / "docs" / "reference").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    """In `code`: files of this repository by their path."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests|examples|benchmarks|checkpoints|docs|model_cards|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_they_build_without_a_warning(tmp_path):
    """Those of docstrings are warnings too."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "register_criterion" in (tmp_path / "site" / "reference" / "exits.html").read_text(encoding="utf-8")
