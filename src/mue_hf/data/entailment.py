"""Visual entailment data: an image, with or without a premise, a hypothesis and its label, from the same sources."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from ..model.processing_mue import MuEProcessor
from .reader import Fault, Reader, has_words

ENTAILMENT_FEATURES = Features(
    {"image": Image()} | {name: Value("string") for name in ("image_id", "premise", "hypothesis", "label")}
)
# The first that the source has.
PREMISE_COLUMNS = ("premise", "sentence1")
HYPOTHESIS_COLUMNS = ("hypothesis", "sentence2")
LABEL_COLUMNS = ("label", "gold_label")
LABELS = tuple(MuEProcessor.entailment_answers)
ANSWER_LABELS = {answer: label for label, answer in MuEProcessor.entailment_answers.items()}


def load_entailment(
    source: str | PathLike,
    split: str | None = "train",
    *,
    premise_column: str | None = None,
    hypothesis_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    **options: Any,
) -> Dataset | IterableDataset:
    """Pairs of an image, with or without a premise, and a hypothesis, one row per pair, checked.

    Args:
        source, split, options: see [`load_captioning`].
        premise_column (`str`, *optional*): column of the premise, null where there is none. Default: "premise" or
            "sentence1" if there is one.
        hypothesis_column (`str`, *optional*): default: "hypothesis" or "sentence2".
        label_column (`str`, *optional*): column of labels: "entailment", "neutral", "contradiction", or the answers
            "yes", "maybe", "no", or numbers of named classes. Default: "label" or "gold_label".
        label_names (sequence of `str`, *optional*): the classes by number, where the source does not name them.

    Returns:
        `Dataset`, or `IterableDataset` if streamed: "image", "image_id", "premise" (`str` or None), "hypothesis" (both
        as written), "label" ("entailment", "neutral" or "contradiction"), and `keep_columns`.

    Raises:
        ValueError: as [`load_captioning`]; rows are also bad for a text without words, or an unknown label ("-" of
            SNLI among them).
    """
    reader = Reader(source, split, **options)
    if premise_column is not None or set(PREMISE_COLUMNS) & set(reader.columns):
        premise_column = reader.column("premise_column", premise_column, PREMISE_COLUMNS)
    hypothesis_column = reader.column("hypothesis_column", hypothesis_column, HYPOTHESIS_COLUMNS)
    label_column = reader.column("label_column", label_column, LABEL_COLUMNS)
    kind = (reader.rows.features or {}).get(label_column)
    names = kind.names if label_names is None and isinstance(kind, ClassLabel) else label_names or []

    def pair(row: dict[str, Any], fault: Fault) -> dict[str, Any] | None:
        premise = None if premise_column is None else row[premise_column]
        hypothesis, label = row[hypothesis_column], row[label_column]
        if isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        if isinstance(label, str):
            label = ANSWER_LABELS.get(label, label)
        if not has_words(hypothesis):
            fault("hypothesis without words", f"{hypothesis_column} holds {hypothesis!r}")
        elif premise is not None and not has_words(premise):
            fault("premise without words", f"{premise_column} holds {premise!r}; null stands for none")
        elif label not in LABELS:
            known = [*LABELS, *ANSWER_LABELS]
            fault("unknown label", f"{label_column} holds {label!r}, not one of {known}; numbers need `label_names`")
        else:
            return {"premise": premise, "hypothesis": hypothesis, "label": label}
        return None

    columns = [name for name in (premise_column, hypothesis_column, label_column) if name is not None]
    return reader.read(columns, pair, ENTAILMENT_FEATURES, gather=False)


__all__ = ["ENTAILMENT_FEATURES", "load_entailment"]
