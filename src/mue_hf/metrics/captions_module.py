"""Caption scores as a module of Hugging Face evaluate: `evaluate.load(mue_hf.metrics.CAPTION_MODULE)`."""

from typing import Any

# As a module: `evaluate.load` takes the first class of its own kind that it finds among the names of this file.
import evaluate
from datasets import Features, Value

from mue_hf.metrics.captions import caption_scores

DESCRIPTION = "BLEU-1 to 4, METEOR, ROUGE-L, CIDEr-D and SPICE of captions, through pycocoevalcap."
INPUTS = """
Args:
    predictions: one caption per image.
    references: a list of references per image.
    options: those of `mue_hf.metrics.caption_scores`, which says what is returned.
"""
CITATION = """@article{chen2015microsoft,
  title={Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author={Chen, Xinlei and others},
  journal={arXiv preprint arXiv:1504.00325},
  year={2015}
}"""


class MuECaptions(evaluate.Metric):
    """`caption_scores` behind evaluate's interface."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=Features({"predictions": Value("string"), "references": [Value("string")]}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], **options: Any) -> dict[str, Any]:
        return caption_scores(predictions, references, **options)


__all__ = ["MuECaptions"]
