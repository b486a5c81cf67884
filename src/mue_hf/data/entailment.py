"""Visual entailment data: an image, with or without a premise, a hypothesis and its label, from the same sources."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from ..model.processing_mue import MuEProcessor
from .reader import Fault, Reader, has_words

ENTAILMENT_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "premise": Value("string"),
        "hypothesis": Value("string"),
        "label": Value("string"),
    }
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
    image_column: str | None = None,
    premise_column: str | None = None,
    hypothesis_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    image_root: str | PathLike | None = None,
    keep_columns: Sequence[str] = (),
    streaming: bool = False,
    skip_bad: bool = False,
    skipped: Counter | None = None,
    **load_options: Any,
) -> Dataset | IterableDataset:
    """
    Pairs of an image, with or without a premise, and a hypothesis, one row per pair, checked.

    Args:
        premise_column (`str`, *optional*): column of the premise, null where there is none. Default: "premise" or
            "sentence1" if there is one.
        hypothesis_column (`str`, *optional*): default: "hypothesis" or "sentence2".
        label_column (`str`, *optional*): column of labels: "entailment", "neutral", "contradiction", or the answers
            "yes", "maybe", "no", or numbers of named classes. Default: "label" or "gold_label".
        label_names (sequence of `str`, *optional*): the classes by number, where the source does not name them.
        source, split, image_column, id_column, split_column, image_root, keep_columns, streaming, skip_bad, skipped,
        load_options:
            See [`load_captioning`].

    Returns:
        `Dataset`, or `IterableDataset` if streamed: "image", "image_id", "premise" (`str` or None), "hypothesis" (both
        as written), "label" ("entailment", "neutral" or "contradiction"), and `keep_columns`.

    Raises:
        ValueError: if the source or the split does not exist, a line of a JSONL file is no JSON object, a column is
            missing, or rows are bad: an image that is missing or not an image, a text without words, or an unknown
            label ("-" of SNLI among them).
    """
    options = (image_column, id_column, split_column, image_root, keep_columns, streaming, skip_bad, skipped)
    reader = Reader(source, split, *options, load_options)
    if premise_column is not None or set(PREMISE_COLUMNS) & set(reader.columns):
        premise_column = reader.column("premise_column", premise_column, PREMISE_COLUMNS)
    hypothesis_column = reader.column("hypothesis_column", hypothesis_column, HYPOTHESIS_COLUMNS)
    label_column = reader.column("label_column", label_column, LABEL_COLUMNS)
    kind = (reader.rows.features or {}).get(label_column)
    if label_names is None and isinstance(kind, ClassLabel):
        label_names = kind.names
    columns = [name for name in (premise_column, hypothesis_column, label_column) if name is not None]
    pair = _Pair(premise_column, hypothesis_column, label_column, label_names)
    return reader.read(columns, pair, ENTAILMENT_FEATURES, gather=False)


@dataclass(frozen=True)
class _Pair:
    """Columns of an entailment source; `names` are the classes of a column of numbers."""

    premise: str | None
    hypothesis: str
    label: str
    names: Sequence[str] | None

    def __call__(self, row: dict[str, Any], fault: Fault) -> dict[str, Any] | None:
        premise = None if self.premise is None else row[self.premise]
        hypothesis, label = row[self.hypothesis], row[self.label]
        if self.names is not None and isinstance(label, int) and 0 <= label < len(self.names):
            label = self.names[label]
        if isinstance(label, str):
            label = ANSWER_LABELS.get(label, label)
        if not has_words(hypothesis):
            fault("hypothesis without words", f"{self.hypothesis} holds {hypothesis!r}")
        elif premise is not None and not has_words(premise):
            fault("premise without words", f"{self.premise} holds {premise!r}; null stands for none")
        elif label not in LABELS:
            known = [*LABELS, *ANSWER_LABELS]
            fault("unknown label", f"{self.label} holds {label!r}, not one of {known}; numbers need `label_names`")
        else:
            return {"premise": premise, "hypothesis": hypothesis, "label": label}
        return None


__all__ = ["ENTAILMENT_FEATURES", "load_entailment"]
