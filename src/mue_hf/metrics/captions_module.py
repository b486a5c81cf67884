"""Caption scores as a module of Hugging Face evaluate: `evaluate.load(mue_hf.metrics.CAPTION_MODULE)`."""

from typing import Any

# As a module: `evaluate.load` takes the first class of its own kind that it finds among the names of this file.
import evaluate
from datasets import Features, Value

from mue_hf.metrics.captions import caption_scores

CITATION = """@article{chen2015microsoft,
  title={Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author={Chen, Xinlei and others},
  journal={arXiv preprint arXiv:1504.00325},
  year={2015}
}"""


class MuECaptions(evaluate.Metric):
    """[`caption_scores`] behind evaluate's interface; its options are arguments of `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU-1 to 4, METEOR, ROUGE-L, CIDEr-D and SPICE of captions, through pycocoevalcap.",
            citation=CITATION,
            inputs_description="A caption and a list of references per image, and the options of `caption_scores`.",
            features=Features({"predictions": Value("string"), "references": [Value("string")]}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], **options: Any) -> dict[str, Any]:
        return caption_scores(predictions, references, **options)


__all__ = ["MuECaptions"]
