# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[train]"]
# ///
"""Make statements about photos, true and false ones, out of captions.

    python examples/make_statements.py captions.jsonl statements-train.jsonl --split train
    python examples/make_statements.py captions.jsonl statements-test.jsonl --split test --per-image 10

The results are read by `mue_hf.data.load_entailment`, so by examples/finetune_entailment.py and `mue-hf evaluate
entailment --kind-column about --words-baseline statements-train.jsonl`.
"""

import argparse

from mue_hf.data.statement_words import KINDS
from mue_hf.data.statements import STATEMENT_KINDS, write_statements


def main() -> None:
    """Writes the file and says how many statements there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what mue_hf.data.load_captioning reads, with images as files")
    parser.add_argument("file", help="the JSONL file to write")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-image", type=int, default=2, help="statements about one image at most, an even number")
    parser.add_argument(
        "--kinds", nargs="+", default=KINDS, choices=STATEMENT_KINDS, help="what false ones are false by"
    )
    parser.add_argument("--image-root", help="folder of the images (default: that of the source)")
    args = parser.parse_args()
    options = {} if args.image_root is None else {"image_root": args.image_root}
    options |= {"seed": args.seed, "per_image": args.per_image, "kinds": args.kinds}
    count = write_statements(args.source, args.file, args.split, **options)
    print(f"{count} statements in {args.file}")


if __name__ == "__main__":
    main()
