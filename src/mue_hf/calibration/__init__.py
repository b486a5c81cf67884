"""Exit thresholds for a budget of changed outputs, with a guarantee, or for a budget of compute."""

from .presets import check_preset, write_preset
from .procedure import OBJECTIVES, RISKS, Calibration, calibrate, calibrated_criteria
from .runner import SHARED_OPTIONS

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
