"""Data sets: loaders and collator for fine-tuning, trunk features cached on disk, generated scenes."""

from .captioning import CAPTIONING_FEATURES, CaptionPairs, load_captioning
from .collator import MuEDataCollator
from .entailment import ENTAILMENT_FEATURES, load_entailment

__all__ = [
    "CAPTIONING_FEATURES",
    "ENTAILMENT_FEATURES",
    "CaptionPairs",
    "MuEDataCollator",
    "load_captioning",
    "load_entailment",
]
