"""Individual gradients, their moments, and curvature of any model in nearly one backward pass."""

from assay.curvature.directional import (
    CurvatureProbe,
    DirectionalCurvature,
    directional_curvature,
)
from assay.curvature.engine import QUANTITIES, compute
from assay.curvature.kronecker import KroneckerFactors
from assay.curvature.quantities import Quantities

__all__ = [
    "compute",
    "QUANTITIES",
    "Quantities",
    "KroneckerFactors",
    "DirectionalCurvature",
    "directional_curvature",
    "CurvatureProbe",
]
