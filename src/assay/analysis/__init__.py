"""Measurements on training: regret, step sizes, spectra, what a network has learned."""

from assay.analysis.regret import (
    RegretTracker,
    StepSizeMonitor,
    StepSizeReport,
    amsgrad_regret_bound,
)

__all__ = ["RegretTracker", "StepSizeMonitor", "StepSizeReport", "amsgrad_regret_bound"]
