"""Optimisers and learning-rate schedules from the literature."""

from assay.optim.amsgrad import AdamNC, AMSGrad, adamnc, amsgrad
from assay.optim.curvature import KFAC, DiagGGN
from assay.optim.dgc_sgd import DGCSGD
from assay.optim.dual_preconditioning import (
    Arcsinh,
    Clip,
    Diagonal,
    DualPreconditionedGD,
    Normalized,
    Power,
    SignedLog,
)
from assay.optim.initialization import (
    EdgeOfChaos,
    MeanField,
    critical_,
    delta_orthogonal_,
    edge_of_chaos,
    fixup_,
    lsuv_,
    mean_field,
)
from assay.optim.learned_preconditioner import (
    FitReport,
    GaussianSampler,
    LearnedPreconditioner,
    RadialSampler,
    effective_sample_size,
)
from assay.optim.lr_scheduler import FGECyclicLR, HoldDecayLR
from assay.optim.projected_adam import Box
from assay.optim.step_size import BarzilaiBorwein, LRRange, StepEstimate, lr_range_test
from assay.optim.svrg import SVRG

__all__ = [
    "DGCSGD",
    "AMSGrad",
    "AdamNC",
    "Box",
    "adamnc",
    "amsgrad",
    "FGECyclicLR",
    "HoldDecayLR",
    "DualPreconditionedGD",
    "Power",
    "Normalized",
    "Clip",
    "Arcsinh",
    "SignedLog",
    "Diagonal",
    "LearnedPreconditioner",
    "FitReport",
    "GaussianSampler",
    "RadialSampler",
    "effective_sample_size",
    "DiagGGN",
    "KFAC",
    "edge_of_chaos",
    "EdgeOfChaos",
    "mean_field",
    "MeanField",
    "critical_",
    "delta_orthogonal_",
    "lsuv_",
    "fixup_",
    "SVRG",
    "lr_range_test",
    "LRRange",
    "BarzilaiBorwein",
    "StepEstimate",
]
