"""`mue-hf publish`: a checkpoint with its code and model card on the Hugging Face Hub, or in a folder."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from ..inference.loading import check_not_replaced
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
    repository = "repository of the Hub, made if it does not exist; not with --to"
    parser.add_argument("name", nargs="?", metavar="ORG/NAME", help=repository)
    card = parser.add_argument_group("model card")
    stated = f"what the card states: {', '.join(field.name for field in fields(About))}"
    card.add_argument("--about", metavar="FILE.toml", help=stated)
    records = "records of `mue-hf evaluate` on these weights; needs the extra eval"
    card.add_argument("--evaluation", metavar="FILE.jsonl", help=records)
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
    """Publishes, lists, or writes the card alone."""
    checkpoint = Path(args.checkpoint)
    # before its card's files, which left with it
    check_not_replaced(checkpoint)
    name = _repository(args)
    about = About() if args.about is None else read_about(args.about)
    if args.card is not None:
        check_folder(checkpoint)
        write_card(checkpoint, args.card, name, about, args.evaluation, f"{args.card.stem}.evaluation")
        print(args.card)
    elif args.to is not None:
        files = publish_to_folder(checkpoint, args.to, name, about, args.evaluation, args.overwrite)
        print(_listing(files, args.to), args.to, sep="\n")
    else:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            files = stage(checkpoint, folder, name, about, args.evaluation, link=True)
            print(_listing(files, folder), flush=True)
            options = {option: getattr(args, option) for option in ("private", "revision", "create_pr", "token")}
            print("Nothing was sent." if args.dry_run else upload(folder, name, **options))
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
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    lines = sizes | {f"in {len(files)} files": sum(sizes.values())}
    return "\n".join(f"  {tqdm.format_sizeof(size, 'B'):>7}  {text}" for text, size in lines.items())


__all__ = ["add_arguments", "run"]
