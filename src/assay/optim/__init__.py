"""Optimisers and learning-rate schedules from the literature."""

from assay.optim.amsgrad import AdamNC, AMSGrad, adamnc, amsgrad
from assay.optim.lr_scheduler import FGECyclicLR, HoldDecayLR
from assay.optim.projected_adam import Box

__all__ = ["AMSGrad", "AdamNC", "Box", "adamnc", "amsgrad", "FGECyclicLR", "HoldDecayLR"]
