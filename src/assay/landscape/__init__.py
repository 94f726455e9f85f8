"""The loss surface around and between trained networks."""

from assay.landscape.curves import (
    BezierCurve,
    CurveEvaluation,
    PolyChain,
    evaluate_curve,
    fit_curve,
    linear_barrier,
)
from assay.landscape.ensembling import FGE
from assay.landscape.evaluation import Evaluation, evaluate

__all__ = [
    "BezierCurve",
    "PolyChain",
    "fit_curve",
    "evaluate_curve",
    "CurveEvaluation",
    "linear_barrier",
    "FGE",
    "Evaluation",
    "evaluate",
]
