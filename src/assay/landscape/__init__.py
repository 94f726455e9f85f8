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
from assay.landscape.patterns import (
    LogitLoss,
    MultiPointLoss,
    PatternBeside,
    PlaneModel,
    PlantedPattern,
    embed_pattern,
    embed_pattern_beside,
    load_mask,
    random_plane,
    scan_plane,
)
from assay.landscape.span import evaluate_span
from assay.landscape.trajectory import (
    Flatness,
    FlatSubspacePenalty,
    MinibatchStatistics,
    TrajectoryPCA,
    TrajectoryRecorder,
    VarianceFlatnessFit,
    effective_temperature,
    flatness,
    langevin_step,
    minibatch_statistics,
    variance_flatness_fit,
)

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
    "evaluate_span",
    "random_plane",
    "scan_plane",
    "embed_pattern",
    "embed_pattern_beside",
    "PlantedPattern",
    "PatternBeside",
    "LogitLoss",
    "load_mask",
    "PlaneModel",
    "MultiPointLoss",
    "TrajectoryRecorder",
    "TrajectoryPCA",
    "Flatness",
    "flatness",
    "VarianceFlatnessFit",
    "variance_flatness_fit",
    "effective_temperature",
    "MinibatchStatistics",
    "minibatch_statistics",
    "langevin_step",
    "FlatSubspacePenalty",
]
