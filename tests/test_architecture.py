"""The rooms of the package: which may import which, and that CONTRIBUTING's map is the tree."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mue_hf"
# From low to high: a room imports from itself and from those before it. Files outside of rooms: `files` is the lowest,
# `_moved` and `__init__` stand above all.
ROOMS = (
    *("files", "model", "metrics", "convert", "data", "inference", "evaluation", "training"),
    *("calibration", "benchmarking", "publishing", "export", "app", "cli"),
)
ABOVE = ("__init__", "_moved")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path) for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it, those for type checkers aside."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    parent = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = parent[: len(parent) - node.level + 1]
                base = ".".join((*up, *filter(None, [node.module])))
            elif base.split(".")[0] == "mue_hf":
                base = base.removeprefix("mue_hf").lstrip(".") or "__init__"
            else:
                continue
            modules = {f"{base}.{alias.name}".lstrip(".") for alias in node.names} & NAMES
            found |= modules or {base or "__init__"}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("mue_hf.") for a in node.names if a.name.startswith("mue_hf.")}
    return found


GRAPH = {name_of(path): imports_of(path) for path in SOURCES}


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_a_room():
    assert {room(name) for name in NAMES} == {*ROOMS, *ABOVE}
    assert all(imported in NAMES for imports in GRAPH.values() for imported in imports)


@pytest.mark.parametrize("name", sorted(NAMES - set(ABOVE)))
def test_imports_run_downwards(name):
    for imported in GRAPH[name]:
        assert room(imported) in ROOMS, f"{name} imports {imported}"
        assert ROOMS.index(room(imported)) <= ROOMS.index(room(name)), f"{name} imports {imported} of a higher room"
        assert room(imported) != "cli" or room(name) == "cli", f"{name} imports a command: {imported}"


def test_commands_alone_parse_arguments():
    parsing = {name_of(path) for path in SOURCES if re.search(r"\bArgumentParser\b(?! and)", path.read_text(), re.M)}
    assert {room(name) for name in parsing} == {"cli"}


def test_there_are_no_cycles():
    """Those among the types of the hub half aside: they are never run."""
    left = {name: imports - {name} for name, imports in GRAPH.items()}
    while free := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_the_map_is_the_tree():
    """CONTRIBUTING names every file of the package once, in its room."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("src/mue_hf/\n") :].split("\n```")[0]
    named, current = set(), ""
    for line in tree.splitlines()[1:]:
        if match := re.match(r"  (\w+)/", line):
            current = f"{match[1]}/"
        elif re.match(r"\S", line):
            break
        elif re.match(r"  \S", line):
            current = ""
        named |= {f"{current}{file}" for file in re.findall(r"[\w.]+\.(?:py|jinja|typed)\b", line.split("  #")[0])}
    there = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.*") if path.suffix in (".py", ".jinja", ".typed")
    }
    assert named == {path for path in there if not path.endswith("__init__.py") or "/" not in path}
