"""Data sets: loaders and collator for fine-tuning, trunk features cached on disk, generated scenes."""

from .captioning import CAPTIONING_FEATURES, CaptionPairs, CaptionTexts, load_captioning
from .collator import MuEDataCollator
from .entailment import ENTAILMENT_FEATURES, load_entailment
from .mixture import Mixture

__all__ = [
    "CAPTIONING_FEATURES",
    "ENTAILMENT_FEATURES",
    "CaptionPairs",
    "CaptionTexts",
    "Mixture",
    "MuEDataCollator",
    "load_captioning",
    "load_entailment",
]
