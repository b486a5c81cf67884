"""Docstrings in transformers' style for mkdocstrings, which reads Google's: an extension of griffe."""

import re
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any

import griffe

REFERENCE = Path(__file__).parent / "reference"


def documented() -> dict[str, str]:
    """The objects that have an entry in the reference: last name -> path."""
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md")))
    return {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)", pages, re.M)}


class TransformersDocstrings(griffe.Extension):
    """Makes of a docstring what it is at run time where `auto_docstring` writes it, and brings it into the form that
    griffe knows: one parameter a line, types without marks, references to entries of this reference."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = documented()

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Called for each object that griffe has loaded."""
        decorators = getattr(obj, "decorators", [])
        if any(decorator.callable_path.endswith(".auto_docstring") for decorator in decorators):
            parser, options = loader.docstring_parser, loader.docstring_options
            text = cleandoc(at_run_time(obj))
            obj.docstring = griffe.Docstring(
                text, lineno=obj.lineno, parent=obj, parser=parser, parser_options=options
            )
        if obj.docstring is not None:
            obj.docstring.value = self.rewritten(obj.docstring.value, defaults=not obj.is_function)

    def rewritten(self, text: str, defaults: bool) -> str:
        """The docstring in Google's style; `defaults` says whether those in it are kept."""
        # what transformers says of every model and configuration
        text = re.sub(
            r"^ *<Tip>.*?</Tip>\n|^This is the configuration class.*?more information\.\n", "", text, flags=re.M | re.S
        )
        # several parameters that are described at once: `a, b (`int`): text`
        several = re.compile(r"^( +)(\w+(?:, \w+)+)((?: \(.+\))?:.*\n(?:\1 +.*\n|\n(?=\1 ))*)", re.M)
        text = several.sub(lambda m: "".join(f"{m[1]}{name}{m[3]}" for name in m[2].split(", ")), f"{text}\n")
        # types, without marks and without the defaults that a signature shows
        text = re.sub(r"^( +\w+) \((.+)\):", lambda m: f"{m[1]} ({plain_type(m[2], defaults)}):", text, flags=re.M)
        # of transformers' own pages
        text = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", text)
        return re.sub(r"\[`~?([\w.]+)`\](?!\[|\()", self.reference, text).rstrip()

    def reference(self, match: re.Match) -> str:
        """[`Name`] as a link, where the reference has it."""
        entry = self.entries.get(match[1])
        return f"[`{match[1]}`][{entry}]" if entry else f"`{match[1]}`"


def plain_type(text: str, defaults: bool) -> str:
    """The type of a parameter as it is written in a docstring, without marks."""
    text = re.sub(r"\[`~?([\w.]+)`\]", r"\1", text).replace("`", "").replace("*", "")
    return text if defaults else re.sub(r",? ?optional, defaults to .*", "", text)


def at_run_time(obj: griffe.Object) -> str:
    """The docstring of an object when the package is imported."""
    found: Any = import_module(obj.module.path)
    for name in obj.path.removeprefix(f"{obj.module.path}.").split("."):
        found = getattr(found, name)
    return found.__doc__ or ""
