"""Per-example gradient rows of any torch model, computed with hooks, layer rules and label directions."""

from __future__ import annotations

from npeff.gradients.calls import Collected
from npeff.gradients.capture import LogitsFunction, frozen
from npeff.gradients.collector import GradientCollector, check_coverage
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.label_factor import exact_label_factor, truncated_label_factor
from npeff.gradients.labels import IGNORED, UNKNOWN, LabelRows, label_rows
from npeff.gradients.parameters import (
    LeftOut,
    ParameterLayout,
    in_memory,
    is_quantized,
    left_out,
    model_fingerprint,
    select_parameters,
)
from npeff.gradients.positions import PositionShares, position_shares
from npeff.options.labels import LabelSpec

__all__ = [
    "IGNORED",
    "UNKNOWN",
    "Collected",
    "GradientCollector",
    "LabelRows",
    "LabelSpec",
    "LeftOut",
    "LogitsFunction",
    "ParameterLayout",
    "PositionShares",
    "UnsupportedModelError",
    "check_coverage",
    "exact_label_factor",
    "frozen",
    "in_memory",
    "is_quantized",
    "label_rows",
    "left_out",
    "model_fingerprint",
    "position_shares",
    "select_parameters",
    "truncated_label_factor",
]
