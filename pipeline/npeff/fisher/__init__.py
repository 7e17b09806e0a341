"""Per-example Fishers computed from gradient rows: low-rank factors, diagonals and grouped sums."""

from __future__ import annotations

from npeff.fisher.diagonal import diagonal_norms, diagonal_sum, grouped_sums
from npeff.fisher.output_units import GroupLayout
from npeff.fisher.per_example import FisherBatch, PerExampleFishers
from npeff.fisher.prediction_gradients import prediction_gradients, prediction_weights
from npeff.fisher.top_entries import TopEntries, top_entries

__all__ = [
    "FisherBatch",
    "GroupLayout",
    "PerExampleFishers",
    "TopEntries",
    "diagonal_norms",
    "diagonal_sum",
    "grouped_sums",
    "prediction_gradients",
    "prediction_weights",
    "top_entries",
]
