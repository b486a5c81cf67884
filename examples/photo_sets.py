# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[train]"]
# ///
"""Write the files that `make photos` and `make measure` score on: for each data set of photos its dev and test images
with at least four captions, and statements made from the captions of its splits; and the dev images of all of them.

    python examples/photo_sets.py runs/photo-sets flickr8k=../flickr8k/captions.jsonl coco=../coco/captions.jsonl

Images are named by absolute paths, so that the files may lie anywhere: NAME-dev.jsonl, NAME-test.jsonl,
NAME-statements.jsonl and dev.jsonl.
"""

import argparse
import json
from pathlib import Path

from mue_hf.data.statement_words import KINDS
from mue_hf.data.statements import STATEMENT_KINDS, write_statements
from mue_hf.files import json_lines, write_whole

CAPTIONS = 4


def scored_rows(source: Path, split: str) -> list[dict]:
    """The rows of a split with enough captions for scores, images by absolute path."""
    rows = [row for row in json_lines(source) if isinstance(row, dict) and row["split"] == split]
    rows = [row for row in rows if len(row["captions"]) >= CAPTIONS]
    if not rows:
        raise SystemExit(f"{source} must have images with {CAPTIONS} captions in the split {split!r}, got none.")
    names = [{"image": str((source.parent / row["image"]).absolute()), "image_id": row["image"]} for row in rows]
    return [row | name for row, name in zip(rows, names, strict=True)]


def main() -> None:
    """Writes the files and says how many rows each has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sources", nargs="+", metavar="NAME=FILE.jsonl")
    parser.add_argument("--per-image", type=int, default=10, help="statements about one test image at most")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict]] = {"dev.jsonl": []}
    for pair in args.sources:
        name, _, source = pair.partition("=")
        if not Path(source).is_file():
            parser.error(f"sources must be NAME=FILE.jsonl with a file that exists, got {pair!r}.")
        for split in ("dev", "test"):
            files[f"{name}-{split}.jsonl"] = scored_rows(Path(source), split)
        files["dev.jsonl"] += files[f"{name}-dev.jsonl"]
        statements = args.folder / f"{name}-statements.jsonl"
        texts = []
        for split, per_image, kinds in (
            ("train", 4, KINDS),
            ("dev", 4, STATEMENT_KINDS),
            ("test", args.per_image, KINDS),
        ):
            write_statements(source, statements, split, seed=0, per_image=per_image, kinds=kinds)
            texts.append(statements.read_text())
        write_whole(statements, "".join(texts))
    for name, rows in files.items():
        write_whole(args.folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} images in {args.folder / name}")


if __name__ == "__main__":
    main()
