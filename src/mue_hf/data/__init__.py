"""Data sets: loaders and collator for fine-tuning, trunk features cached on disk, generated scenes."""

from .loaders import CaptionPairs, MuEDataCollator, load_captioning, load_entailment

__all__ = ["CaptionPairs", "MuEDataCollator", "load_captioning", "load_entailment"]
