"""What several topics need of a module: its parameters as a vector, its norms, a training loop."""

from assay.functional.batchnorm import running_norms, update_bn
from assay.functional.parameters import (
    ParameterLayout,
    call_with_vector,
    filter_normalize,
    parameters_to_vector,
    random_direction,
    vector_to_parameters,
)
from assay.functional.training import evaluate_classifier, fit

__all__ = [
    "ParameterLayout",
    "parameters_to_vector",
    "vector_to_parameters",
    "call_with_vector",
    "random_direction",
    "filter_normalize",
    "running_norms",
    "update_bn",
    "fit",
    "evaluate_classifier",
]
