"""Per-example Fishers made of gradient rows: low-rank factors, diagonals, grouped sums."""

from __future__ import annotations

from pipeline.fisher.diagonal import diagonal_norms, diagonal_sum, grouped_sums
from pipeline.fisher.output_units import GroupLayout
from pipeline.fisher.per_example import FisherBatch, PerExampleFishers
from pipeline.fisher.top_entries import TopEntries, top_entries

__all__ = [
    "FisherBatch",
    "GroupLayout",
    "PerExampleFishers",
    "TopEntries",
    "diagonal_norms",
    "diagonal_sum",
    "grouped_sums",
    "top_entries",
]
