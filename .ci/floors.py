"""Prints pip constraints that hold every package a user installs to the lowest version that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

FLOOR = re.compile(r"(?P<name>[\w.-]+)(?:\[[\w,-]+\])?[>=]=(?P<version>[\d.]+)")


def floors(project: dict) -> list[str]:
    """`name==version` of the dependencies and of all extras but `dev` and `docs`, which hold tools."""
    extras = [group for name, group in project["optional-dependencies"].items() if name not in ("dev", "docs")]
    matches = [FLOOR.match(requirement) for group in [project["dependencies"], *extras] for requirement in group]
    return [f"{match['name']}=={match['version']}" for match in matches]


if __name__ == "__main__":
    print("\n".join(floors(tomllib.loads(Path("pyproject.toml").read_text())["project"])))
