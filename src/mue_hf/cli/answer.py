"""`mue-hf answer`: visual entailment, or questions with a closed set of answers, for each row of a table."""

import argparse
from pathlib import Path

from ..inference.bulk import ANSWER_COLUMNS, TASKS
from ..inference.sources import Source
from .bulk import run_bulk
from .options import add_bulk_arguments, add_exit_arguments, add_model_arguments, at_least

# Text -> its columns, of which the first that a table has is taken.
TEXT_COLUMNS = {"hypothesis": ("hypothesis", "sentence2"), "premise": ("premise", "sentence1")}
TEXT_COLUMNS |= {"question": ("question", "text")}
EXAMPLE = """example:
  mue-hf answer pairs.jsonl --answers yes,no,maybe --out answers.jsonl --columns scores
  mue-hf answer questions.csv --task vqa --answers cat,dog,neither

A table has an image and a hypothesis (and perhaps a premise), or an image and a question, in each row. The model
scores every answer; the best one is the row's. Without --out the rows are printed as JSON lines; with it a run that
was killed goes on where it was, as in `mue-hf caption`.

exit code: 0 done; 1 done, but some rows could not be used; 2 bad input; 3 stopped by an
audit; 130 interrupted."""


def answer_list(text: str) -> list[str]:
    """Answers with commas between them, or one per line of the file that follows an @."""
    if text.startswith("@"):
        try:
            parts = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"must be a text file after the @, got an error: {error}") from error
    else:
        parts = text.split(",")
    return [part.strip() for part in parts if part.strip()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf answer` takes."""
    parser.epilog = EXAMPLE
    tables = ".jsonl, .csv or .parquet file, or a data set of the Hub"
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=tables)
    answers = "answers to choose from, or @FILE with one per line (default for entailment: yes,no,maybe)"
    parser.add_argument("--answers", type=answer_list, metavar="A,B", help=answers)
    parser.add_argument("--task", choices=TASKS[1:], help="default: entailment where the table has a hypothesis")
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="rows per call (default: 16)")
    add_exit_arguments(parser, " for exits")
    output = parser.add_argument_group("rows")
    output.add_argument("--out", metavar="FILE", help=".jsonl or .parquet file for the answers (default: stdout)")
    output.add_argument("--json", action="store_true", help="with --out: one JSON object for the whole run on stdout")
    for name in TEXT_COLUMNS:
        output.add_argument(f"--{name}-column", metavar="NAME", help=f"of the {name}")
    add_bulk_arguments(output, ANSWER_COLUMNS)


def text_columns(args: argparse.Namespace, source: Source) -> tuple[str, dict[str, str]]:
    """The task, and which column is which text.

    Raises:
        ValueError: if the table has neither a hypothesis nor a question, or both and no task was named.
    """
    hypothesis, premise, question = (
        source.column(f"{name}_column", getattr(args, f"{name}_column"), usual) for name, usual in TEXT_COLUMNS.items()
    )
    if args.task is None and hypothesis is not None and question is not None:
        raise ValueError(f"`--task` must be given, got a hypothesis and a question in {source.columns}; pass one.")
    task = args.task or ("entailment" if question is None else "vqa")
    found = {"text": question} if task == "vqa" else {"hypothesis": hypothesis, "premise": premise}
    texts = {argument: column for argument, column in found.items() if column is not None}
    if not texts.keys() & {"text", "hypothesis"}:
        raise ValueError(
            f"`--hypothesis-column` or `--question-column` must be given for {task}, got none of the usual names in "
            f"{source.columns}; name it."
        )
    return task, texts


def run(args: argparse.Namespace) -> int:
    """Answers the rows; 1 if some could not be used, 3 if an audit stopped the run."""
    source = Source(args.tables, args.split, args.image_root)
    task, texts = text_columns(args, source)
    args.keep = list(dict.fromkeys([*texts.values(), *args.keep]))
    return run_bulk(args, source, task, args.answers, texts=texts)


__all__ = ["add_arguments", "run"]
