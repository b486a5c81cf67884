"""Exit thresholds for a budget of changed outputs, with a guarantee, or for a budget of compute."""

from .presets import check_preset, write_preset
from .procedure import CALIBRATED, OBJECTIVES, RISKS, Calibration, calibrate
from .runner import SHARED_OPTIONS

__all__ = [
    "CALIBRATED",
    "OBJECTIVES",
    "RISKS",
    "SHARED_OPTIONS",
    "Calibration",
    "calibrate",
    "check_preset",
    "write_preset",
]
