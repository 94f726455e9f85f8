"""Individual gradients, their moments, and curvature of any model in nearly one backward pass."""

from assay.curvature.context import extend
from assay.curvature.directional import (
    CurvatureProbe,
    DirectionalCurvature,
    directional_curvature,
)
from assay.curvature.engine import QUANTITIES, compute
from assay.curvature.kronecker import KroneckerFactors
from assay.curvature.quantities import Quantities
from assay.curvature.reduce import all_reduce_quantities

__all__ = [
    "compute",
    "extend",
    "QUANTITIES",
    "Quantities",
    "KroneckerFactors",
    "all_reduce_quantities",
    "DirectionalCurvature",
    "directional_curvature",
    "CurvatureProbe",
]
