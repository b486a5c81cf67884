"""The command `mue-hf`: finds the module of a subcommand, runs it, and turns bad input into a message."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

# What one does, in order -> command -> its line in the help. A command's module, `mue_hf.cli.<command>`, has
# `add_arguments(parser)` and `run(args) -> exit code`, and is imported only when its command is asked for.
GROUPS = {
    "try a checkpoint": {
        "caption": "caption images: a few, showing which layers were skipped, or any number",
        "app": "show where and why layers stop, on a page in the browser",
    },
    "use it on many rows": {
        "caption --out": "caption any number of images into a file",
        "answer": "choose among given answers for each row of a table",
    },
    "bring a model": {
        "convert": "convert an OFA checkpoint",
        "export": "write ONNX graphs beside a checkpoint, for ONNX Runtime",
    },
    "measure and tune exits": {
        "evaluate": "measure quality, depth, FLOPs and time of exit settings on a data set",
        "calibrate": "find exit thresholds for a budget of changed outputs or of compute",
        "bench": "time exits against plain decoding, with layers and FLOPs beside",
    },
    "share": {
        "trim": "write a smaller checkpoint, of the layers that fixed depths run",
        "publish": "put a checkpoint and its model card on the Hugging Face Hub",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items() if " " not in name}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of `command` alone filled in."""
    lines = []
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:15}{summary}" for name, summary in commands.items())]
    parser = argparse.ArgumentParser(
        prog="mue-hf",
        usage="mue-hf [-h] [--version] command ...",
        description="\n".join(["OFA and MuE for transformers: vision-language models with early exits.", *lines]),
        epilog="example: mue-hf caption photo.jpg\nEach command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mue-hf {version('mue-hf')}")
    # the description lists them, grouped
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command", help=argparse.SUPPRESS)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            prog=f"mue-hf {name}",
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:
            import_module(f"{__name__}.{name}").add_arguments(subparser)
            subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command with `argv`, the process' own arguments by default, to an exit code: 0 done, 1 done in part,
    2 bad input, 3 stopped by an audit, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(argv)
        return import_module(f"{__name__}.{args.command}").run(args)
    # ImportError: a trunk, a scorer or the loaders of an extra that is not installed; its message names the package.
    except (ImportError, OSError, ValueError) as error:
        if "--debug" in argv:
            traceback.print_exception(error)
        print(f"mue-hf {command}: {error}", file=sys.stderr)
        if isinstance(error, ValueError) and not _is_ours(error) and "--debug" not in argv:
            print("--debug shows where this came from.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mue-hf {command}: interrupted", file=sys.stderr)
        return 130


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised an error; its messages say what to do."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].partition(".")[0] == __package__.partition(".")[0]


__all__ = ["COMMANDS", "GROUPS", "build_parser", "main"]
