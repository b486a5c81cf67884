"""Exit thresholds for a budget of changed outputs, with a guarantee, or for a budget of compute."""

from .goal import OBJECTIVES, RISKS, SHARED_OPTIONS, calibrated_criteria
from .presets import check_preset, write_preset
from .procedure import Calibration, calibrate

__all__ = [
    "OBJECTIVES",
    "RISKS",
    "SHARED_OPTIONS",
    "Calibration",
    "calibrate",
    "calibrated_criteria",
    "check_preset",
    "write_preset",
]
