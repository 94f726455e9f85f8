"""What several topics need of a module: its parameters as a vector, its norms, a training loop."""

from assay.functional.batchnorm import running_norms, update_bn
from assay.functional.bisection import Bisection, Bracket, bisect, bracket
from assay.functional.ensemble import (
    Ensemble,
    EnsembleBatches,
    EnsembleLoss,
    train_many,
)
from assay.functional.krylov import (
    DenseOperator,
    Estimate,
    ScaledOperator,
    SpectralDensity,
    SymmetricOperator,
    Tridiagonal,
    hutchinson_block_draws,
    hutchinson_diagonal,
    hutchinson_trace,
    lanczos,
    spectral_density,
    top_eigenvalues,
)
from assay.functional.likelihood import Likelihood, per_sample_loss
from assay.functional.modes import evaluating, keeping_modes
from assay.functional.parameters import (
    ParameterLayout,
    call_with_vector,
    filter_normalize,
    parameters_to_vector,
    random_direction,
    vector_to_parameters,
)
from assay.functional.products import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    LossOperator,
    ResidualOperator,
    call_model,
    plain_attention,
    repeatable,
    select_parameters,
)
from assay.functional.reinitialization import reinitialize
from assay.functional.training import evaluate_classifier, fit

__all__ = [
    "ParameterLayout",
    "parameters_to_vector",
    "vector_to_parameters",
    "call_with_vector",
    "random_direction",
    "filter_normalize",
    "select_parameters",
    "call_model",
    "plain_attention",
    "repeatable",
    "evaluating",
    "keeping_modes",
    "LossOperator",
    "HessianOperator",
    "GGNOperator",
    "ResidualOperator",
    "EmpiricalFisherOperator",
    "SymmetricOperator",
    "DenseOperator",
    "ScaledOperator",
    "Tridiagonal",
    "lanczos",
    "top_eigenvalues",
    "SpectralDensity",
    "spectral_density",
    "Estimate",
    "hutchinson_trace",
    "hutchinson_block_draws",
    "hutchinson_diagonal",
    "Likelihood",
    "per_sample_loss",
    "bracket",
    "Bracket",
    "bisect",
    "Bisection",
    "running_norms",
    "update_bn",
    "reinitialize",
    "fit",
    "evaluate_classifier",
    "Ensemble",
    "EnsembleBatches",
    "EnsembleLoss",
    "train_many",
]
