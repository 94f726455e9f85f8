"""What the loss looks like around a model's weights, to second order."""

from assay.curvature.directional import (
    CurvatureProbe,
    DirectionalCurvature,
    directional_curvature,
)

__all__ = [
    "DirectionalCurvature",
    "directional_curvature",
    "CurvatureProbe",
]
