"""The machinery of evidence: papers, claims, runs, results, reports. Knows no method."""

from assay.lab.experiment import (
    Experiment,
    all_experiments,
    find_experiment,
    run_experiment,
    slugs,
)
from assay.lab.lab import Lab
from assay.lab.paper import (
    Claim,
    Expectation,
    Judgement,
    Paper,
    at_least,
    at_most,
    between,
    close_to,
)
from assay.lab.result import Result, merge
from assay.lab.usage import UsageError

__all__ = [
    "Paper",
    "Claim",
    "Expectation",
    "Judgement",
    "at_most",
    "at_least",
    "between",
    "close_to",
    "Lab",
    "Experiment",
    "UsageError",
    "find_experiment",
    "all_experiments",
    "slugs",
    "run_experiment",
    "Result",
    "merge",
]
