"""What the scripts beside this file share: options, captions, runs in turns, and where record and table go."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mue_hf.cli.bench import add_model_arguments
from mue_hf.cli.options import at_least
from mue_hf.files import write_whole
from mue_hf.inference.timing import in_turns, timed


def make_parser(description: str, repeats: int | None) -> argparse.ArgumentParser:
    """A parser with the options of every script; `repeats` is the default of --repeats, None without it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats is not None:
        parser.add_argument("--repeats", type=at_least(1), default=repeats, help=f"timed rounds ({repeats})")
    parser.add_argument("--output", type=Path, help="file for the JSON record; default: standard output")
    parser.add_argument("--table", type=Path, help="file for a Markdown table")
    return parser


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """What is captioned by which model: what [`load_timed_model`] reads, "count" images and "tokens"."""
    add_model_arguments(parser)
    parser.add_argument("--count", type=at_least(1), default=2, help="images")
    parser.add_argument("--tokens", type=at_least(1), default=16, help="new tokens")


def greedy(model: PreTrainedModel, inputs: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Exactly so many new tokens [rows, tokens] at full depth, whatever the checkpoint has saved."""
    options = {"num_beams": 1, "do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    return model.generate(**inputs, **options, no_repeat_ngram_size=0, exit_criterion="never")[:, -tokens:]


def seconds_in_turns(
    ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each way by round, in turns, after one round to warm up."""
    runs = {name: lambda way=way: timed(way, device)[1] for name, way in ways.items()}
    return {name: seconds[1:] for name, seconds in in_turns(runs, repeats + 1).items()}


def write_results(args: argparse.Namespace, record: Mapping[str, Any], table: str) -> None:
    """The record to --output or standard output, the table to --table."""
    text = json.dumps(record, indent=1) + "\n"
    if args.table is not None:
        write_whole(args.table, table)
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_whole(args.output, text)
