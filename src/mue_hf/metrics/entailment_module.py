"""Entailment scores as a module of Hugging Face evaluate: `evaluate.load(mue_hf.metrics.ENTAILMENT_MODULE)`."""

from typing import Any

# As a module: `evaluate.load` takes the first class of its own kind that it finds among the names of this file.
import evaluate
from datasets import Features, Value

from mue_hf.metrics.entailment import entailment_scores

DESCRIPTION = "Accuracy of entailment answers, by class and with intervals over images."
INPUTS = """
Args:
    predictions: one answer per pair.
    references: the true label of each pair.
    options: those of `mue_hf.metrics.entailment_scores`, which says what is returned.
"""


class MuEEntailment(evaluate.Metric):
    """`entailment_scores` behind evaluate's interface."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, Any]:
        return entailment_scores(predictions, references, **options)


__all__ = ["MuEEntailment"]
