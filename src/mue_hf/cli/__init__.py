"""The command `mue-hf`: finds the module of a subcommand, runs it, and turns bad input into a message."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

# Command -> module with `add_arguments(parser)` and `run(args) -> exit code`, and its line in the help. A module is
# imported only when its command is asked for.
COMMANDS = {
    "answer": ("mue_hf.cli.answer", "choose among given answers for each row of a table"),
    "app": ("mue_hf.app.page", "show where and why layers stop, on a page in the browser"),
    "bench": (
        "mue_hf.benchmarking.run",
        "time exits against plain decoding, with layers and FLOPs beside",
    ),
    "calibrate": ("mue_hf.cli.calibrate", "find exit thresholds for a budget of changed outputs or of compute"),
    "caption": ("mue_hf.cli.caption", "caption images: a few, showing which layers were skipped, or any number"),
    "convert": ("mue_hf.convert.ofa", "convert an OFA checkpoint"),
    "evaluate": ("mue_hf.evaluation.run", "measure quality, depth, FLOPs and time of exit settings on a data set"),
    "publish": ("mue_hf.publishing.upload", "put a checkpoint and its model card on the Hugging Face Hub"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of `command` alone filled in."""
    parser = argparse.ArgumentParser(
        prog="mue-hf",
        description="OFA and MuE for transformers: vision-language models that leave their layers early.",
        epilog="example: mue-hf caption photo.jpg\nEach command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mue-hf {version('mue-hf')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:
            import_module(module).add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments, those of the process by default.

    Returns:
        `int`: exit code; 0 done, 1 done in part, 2 bad input, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(argv)
        return import_module(COMMANDS[args.command][0]).run(args)
    # ImportError: a trunk, a scorer or the loaders of an extra that is not installed; its message names the package.
    except (ImportError, OSError, ValueError) as error:
        print(f"mue-hf {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mue-hf {command}: interrupted", file=sys.stderr)
        return 130


__all__ = ["build_parser", "main"]


if __name__ == "__main__":
    sys.exit(main())
