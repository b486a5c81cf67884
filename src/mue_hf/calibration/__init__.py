"""Exit thresholds for a budget of changed outputs, with a guarantee, or for a budget of compute."""

from .presets import check_preset, write_preset
from .procedure import Calibration, calibrate

__all__ = ["Calibration", "calibrate", "check_preset", "write_preset"]
