"""Per-example Fisher factors of a torch model, exact or sketched."""

from pipeline.fisher.capture import LogitsFunction, frozen
from pipeline.fisher.coverage import check_coverage
from pipeline.fisher.diagonal import (
    GroupLayout,
    TopEntries,
    diagonal_norms,
    diagonal_sum,
    grouped_sums,
    top_entries,
)
from pipeline.fisher.errors import UnsupportedModelError
from pipeline.fisher.gradients import Collected, GradientCollector
from pipeline.fisher.label_factor import exact_label_factor, truncated_label_factor
from pipeline.fisher.labels import IGNORED, UNKNOWN, LabelRows, LabelSpec, label_rows
from pipeline.fisher.parameters import ParameterLayout, left_out, model_fingerprint, select_parameters
from pipeline.fisher.per_example import FisherBatch, PerExampleFishers
from pipeline.fisher.sketch import Sketch, SketchSpec, make_sketch

__all__ = [
    "IGNORED",
    "UNKNOWN",
    "Collected",
    "FisherBatch",
    "GradientCollector",
    "GroupLayout",
    "LabelRows",
    "LabelSpec",
    "LogitsFunction",
    "ParameterLayout",
    "PerExampleFishers",
    "Sketch",
    "SketchSpec",
    "TopEntries",
    "UnsupportedModelError",
    "check_coverage",
    "diagonal_norms",
    "diagonal_sum",
    "exact_label_factor",
    "frozen",
    "grouped_sums",
    "label_rows",
    "left_out",
    "make_sketch",
    "model_fingerprint",
    "select_parameters",
    "top_entries",
    "truncated_label_factor",
]
