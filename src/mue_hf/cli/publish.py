"""`mue-hf publish`: a checkpoint with its code and model card on the Hugging Face Hub, or in a folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from ..publishing.checkpoint import check_folder
from ..publishing.model_card import About, read_about
from ..publishing.upload import publish_to_folder, stage, upload, write_card

EPILOG = """examples:
  mue-hf publish my-checkpoint my-name/mue-captioner --about about.toml --evaluation runs/captions.jsonl --dry-run
  mue-hf publish my-checkpoint my-name/mue-captioner --about about.toml --evaluation runs/captions.jsonl --private
  mue-hf publish my-checkpoint --to published

The repository or folder gets the weights, the configurations, the generation config with its exit presets, the source
files that load the model where this package is not installed, a model card and the evaluation records. The card is
written anew each time: edits are lost. For the Hub, log in with `hf auth login`, set HF_TOKEN, or pass --token.
Exit codes: 0 done, 2 bad input or the Hub refused, 130 interrupted. After an interruption run the same command again:
weights that have arrived are not sent twice."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf publish` takes."""
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint folder, of `save_pretrained` or a trainer")
    parser.add_argument(
        "name", nargs="?", metavar="ORG/NAME", help="repository of the Hub, made if it does not exist; not with --to"
    )
    card = parser.add_argument_group("model card")
    card.add_argument(
        "--about",
        metavar="FILE.toml",
        help="what the card states: summary, language, base_model, datasets, training, license, license_name, "
        "license_link, license_note, commands, limits, data_names",
    )
    card.add_argument(
        "--evaluation",
        metavar="FILE.jsonl",
        help="records of `mue-hf evaluate` on these weights; needs the extra eval",
    )
    hub = parser.add_argument_group("on the Hub")
    either = hub.add_mutually_exclusive_group()
    either.add_argument("--revision", metavar="BRANCH", help="made if it does not exist (default: main)")
    either.add_argument("--create-pr", action="store_true", help="propose the files in a pull request")
    hub.add_argument("--private", action="store_true", help="of a new repository: only its owners see it")
    hub.add_argument("--token", help="default: HF_TOKEN, or that of `hf auth login`")
    instead = parser.add_argument_group("in place of the Hub")
    either = instead.add_mutually_exclusive_group()
    either.add_argument("--to", type=Path, metavar="DIR", help="write the files to a new or empty folder")
    either.add_argument("--dry-run", action="store_true", help="list the files with their sizes and send nothing")
    either.add_argument("--card", type=Path, metavar="FILE.md", help="write the card, its records and plots there")
    instead.add_argument("--overwrite", action="store_true", help="with --to: replace a checkpoint folder at DIR")


def run(args: argparse.Namespace) -> int:
    """Publishes, lists, or writes the card alone.

    Returns:
        `int`: 0.
    """
    checkpoint = Path(args.checkpoint)
    name = _repository(args)
    about = About() if args.about is None else read_about(args.about)
    if args.card is not None:
        check_folder(checkpoint)
        write_card(checkpoint, args.card, name, about, args.evaluation, f"{args.card.stem}.evaluation")
        sys.stdout.write(f"{args.card}\n")
    elif args.to is not None:
        files = publish_to_folder(checkpoint, args.to, name, about, args.evaluation, args.overwrite)
        sys.stdout.write(f"{_listing(files, args.to)}\n{args.to}\n")
    else:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            sys.stdout.write(
                _listing(stage(checkpoint, folder, name, about, args.evaluation, link=True), folder) + "\n"
            )
            sys.stdout.flush()
            address = "Nothing was sent."
            if not args.dry_run:
                options = {name: getattr(args, name) for name in ("private", "revision", "create_pr", "token")}
                address = upload(folder, name, **options)
        sys.stdout.write(f"{address}\n")
    return 0


def _repository(args: argparse.Namespace) -> str:
    """What the card calls the model."""
    if args.name is None:
        if args.to is None:
            raise ValueError("the repository ORG/NAME must be given, got none; name it, or pass `--to DIR`.")
        return str(args.to)
    validate_repo_id(args.name)
    if "/" not in args.name:
        raise ValueError(f"the repository must be named ORG/NAME, got {args.name!r}; put your name or team before it.")
    return args.name


def _listing(files: Sequence[Path], folder: Path) -> str:
    sizes = [path.stat().st_size for path in files]
    lines = [
        f"  {tqdm.format_sizeof(size, 'B'):>7}  {path.relative_to(folder)}"
        for size, path in zip(sizes, files, strict=True)
    ]
    return "\n".join([*lines, f"  {tqdm.format_sizeof(sum(sizes), 'B'):>7}  in {len(files)} files"])


__all__ = ["add_arguments", "run"]
