"""Scores of captions and of entailment, with intervals over images.

`caption_scores` and `entailment_scores` are plain functions; `caption_metrics` and `entailment_metrics` make the
`compute_metrics` of a transformers trainer; `CAPTION_MODULE` and `ENTAILMENT_MODULE` are the files that
`evaluate.load` takes.
"""

from pathlib import Path

from .captions import caption_metrics, caption_scores
from .entailment import entailment_metrics, entailment_scores
from .intervals import bootstrap_interval

CAPTION_MODULE = str(Path(__file__).with_name("captions_module.py"))
ENTAILMENT_MODULE = str(Path(__file__).with_name("entailment_module.py"))

__all__ = [
    "CAPTION_MODULE",
    "ENTAILMENT_MODULE",
    "bootstrap_interval",
    "caption_metrics",
    "caption_scores",
    "entailment_metrics",
    "entailment_scores",
]
