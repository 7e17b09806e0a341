"""Factorization of per-example Fishers into non-negative coefficients and rank-1 components, on arrays in memory."""

from __future__ import annotations

from npeff.factorization.diagonals.blocks import entries_by_column
from npeff.factorization.diagonals.initialization import initialize_diagonal
from npeff.factorization.diagonals.shard import DiagonalShard, DiagonalStatistics
from npeff.factorization.diagonals.solver import (
    DiagonalState,
    advance_diagonal,
    diagonal_stopping_reason,
    initial_diagonal_state,
    solve_diagonal,
    step_diagonal,
    unit_components,
)
from npeff.factorization.example_shard import ExampleShard
from npeff.factorization.factor_source import BLOCK_ROWS, FactorsInMemory, FactorSource, StreamedFactors
from npeff.factorization.gauss_newton import gauss_newton_step
from npeff.factorization.initialization import (
    candidate_components,
    initialize,
    most_useful,
    n_candidates,
    starting_components,
    subsample_indices,
)
from npeff.factorization.kind import DiagonalFishers, FisherKind, LowRankFishers
from npeff.factorization.matching import canonical_order, canonical_signs, match_components, near_duplicates
from npeff.factorization.nnls import accelerated_, accelerated_is_faster, descend_, hals_, nnls, sweeps_for
from npeff.factorization.objective import Candidates, Statistics, explained, merge_candidates
from npeff.factorization.problem import InvalidProblemError, validate_shape, validate_size
from npeff.factorization.selection import (
    FitComparison,
    Recommendation,
    compare_fits,
    recommend,
    search,
    split_halves,
    stability,
)
from npeff.factorization.solver import (
    Factorization,
    IterationRecord,
    SolverState,
    advance,
    free_dead,
    initial_state,
    solve,
    stopping_reason,
)
from npeff.options.solver import SolverOptions

__all__ = [
    "BLOCK_ROWS",
    "Candidates",
    "DiagonalFishers",
    "DiagonalShard",
    "DiagonalState",
    "DiagonalStatistics",
    "ExampleShard",
    "FactorSource",
    "Factorization",
    "FactorsInMemory",
    "FisherKind",
    "FitComparison",
    "InvalidProblemError",
    "IterationRecord",
    "LowRankFishers",
    "Recommendation",
    "SolverOptions",
    "SolverState",
    "Statistics",
    "StreamedFactors",
    "accelerated_",
    "accelerated_is_faster",
    "advance",
    "advance_diagonal",
    "candidate_components",
    "canonical_order",
    "canonical_signs",
    "compare_fits",
    "descend_",
    "diagonal_stopping_reason",
    "entries_by_column",
    "explained",
    "free_dead",
    "gauss_newton_step",
    "hals_",
    "initial_diagonal_state",
    "initial_state",
    "initialize",
    "initialize_diagonal",
    "match_components",
    "merge_candidates",
    "most_useful",
    "n_candidates",
    "near_duplicates",
    "nnls",
    "recommend",
    "search",
    "solve",
    "solve_diagonal",
    "split_halves",
    "stability",
    "starting_components",
    "step_diagonal",
    "stopping_reason",
    "subsample_indices",
    "sweeps_for",
    "unit_components",
    "validate_shape",
    "validate_size",
]
