"""Examining a trained network: one report from the library's methods, panel by panel.

`examine(model, data)` runs every panel within a budget of time and gives a `Report`. A panel is a
function of a model, data and a budget; a file in `assay.examine.panels` adds one.
"""

from assay.examine.budget import Budget
from assay.examine.comparison import Comparison
from assay.examine.examination import examine
from assay.examine.gates import Gate
from assay.examine.panel import (
    Finding,
    Metric,
    NotApplicable,
    Panel,
    Picture,
    all_panels,
    choose_panels,
    panel,
)
from assay.examine.report import Report
from assay.examine.sample import Sample, Split, task_loss
from assay.examine.sources import Data

__all__ = [
    "examine",
    "Data",
    "Report",
    "Comparison",
    "Gate",
    "panel",
    "all_panels",
    "choose_panels",
    "Panel",
    "Metric",
    "Finding",
    "Picture",
    "NotApplicable",
    "Budget",
    "Sample",
    "Split",
    "task_loss",
]
