"""Per-example gradient rows of any torch model: hooks, layer rules, labels; no Fisher and no sketch."""

from __future__ import annotations

from pipeline.gradients.capture import LogitsFunction, frozen
from pipeline.gradients.collector import Collected, GradientCollector
from pipeline.gradients.coverage import check_coverage
from pipeline.gradients.errors import UnsupportedModelError
from pipeline.gradients.label_factor import exact_label_factor, truncated_label_factor
from pipeline.gradients.labels import IGNORED, UNKNOWN, LabelRows, LabelSpec, label_rows
from pipeline.gradients.parameters import ParameterLayout, left_out, model_fingerprint, select_parameters
from pipeline.gradients.positions import PositionShares, position_shares

__all__ = [
    "IGNORED",
    "UNKNOWN",
    "Collected",
    "GradientCollector",
    "LabelRows",
    "LabelSpec",
    "LogitsFunction",
    "ParameterLayout",
    "PositionShares",
    "UnsupportedModelError",
    "check_coverage",
    "exact_label_factor",
    "frozen",
    "label_rows",
    "left_out",
    "model_fingerprint",
    "position_shares",
    "select_parameters",
    "truncated_label_factor",
]
