"""Entailment scores as a module of Hugging Face evaluate: `evaluate.load(mue_hf.metrics.ENTAILMENT_MODULE)`."""

from typing import Any

# As a module: `evaluate.load` takes the first class of its own kind that it finds among the names of this file.
import evaluate
from datasets import Features, Value

from mue_hf.metrics.entailment import entailment_scores


class MuEEntailment(evaluate.Metric):
    """[`entailment_scores`] behind evaluate's interface; its options are arguments of `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of entailment answers, by class and with intervals over images.",
            citation="",
            inputs_description="An answer and the true label of each pair, and the options of `entailment_scores`.",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, Any]:
        return entailment_scores(predictions, references, **options)


__all__ = ["MuEEntailment"]
