"""What `make docs` does to the pages: the table of exit criteria is written from the code, and links to files outside
of this folder become plain text. `python docs/pages.py` writes the table into exits.md, to be read there."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from mue_hf import ExitOptions
from mue_hf.model.criteria_mue import CRITERIA, SHARED_OPTIONS, THRESHOLD_OPTIONS, Criterion

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- criteria: written by docs/pages.py -->\n).*?(<!-- end -->)", re.S)


def criteria_table() -> str:
    """A row for each registered criterion."""
    lines = [
        "| `exit_criterion` | a row exits when | options of its own | exits | intermediate logits | encoder streams "
        "| `--sweep` tries, of 6 layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, criterion in CRITERIA.items():
        with_threshold = THRESHOLD_OPTIONS["decoder"] in criterion.options
        side = "above" if criterion.exits_above else "below"
        cells = [
            f"`{name}`",
            criterion.summary,
            ", ".join(f"`{option}`" for option in own_options(criterion)) or "-",
            f"{side} the threshold" if with_threshold else "-",
            "yes" if criterion.needs_logits else "no",
            "the same" if criterion.in_encoder else "by similarity",
            ", ".join(f"{value:g}" for value in criterion.sweep(6)) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def own_options(criterion: type[Criterion]) -> list[str]:
    """The options of a criterion without those that all take, and without thresholds of streams that do not follow."""
    others = set(SHARED_OPTIONS)
    if not criterion.in_encoder:
        others |= {option for stream, option in THRESHOLD_OPTIONS.items() if stream != "decoder"}
    return [field.name for field in fields(ExitOptions) if field.name in criterion.options - others]


def with_table(markdown: str) -> str:
    """The page with the table of today between its marks."""
    return TABLE.sub(lambda marks: f"{marks[1]}\n{criteria_table()}\n{marks[2]}", markdown)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """MkDocs calls it for each page."""
    folder = (DOCS / page.file.src_path).parent

    def inside(link: re.Match) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_path}: {link[0]} leads nowhere")
        return link[0] if target.is_relative_to(DOCS) and target.is_file() else link[1]

    return re.sub(r"(?<!!)\[([^\]]+)\]\(((?!https?:|#)[^)#]+)(?:#[^)]*)?\)", inside, with_table(markdown))


if __name__ == "__main__":
    page = DOCS / "exits.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
