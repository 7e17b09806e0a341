"""What a well-posed factorization problem is, and the one-line refusals of everything else."""

from __future__ import annotations

from torch import Tensor

from npeff.errors import NpeffError


class InvalidProblemError(NpeffError, ValueError):
    """The data or the number of components cannot be factorized; the message says what to change."""


def validate_size(n_examples: int, rank: int, n_components: int) -> None:
    """Refuse an empty data set, and more components than the N·R factor rows that could support them.

    Callers that hold the data in shards pass the totals over all shards.

    Raises:
        InvalidProblemError: if N = 0, K < 1 or K > N·R.
    """
    if n_examples < 1 or rank < 1:
        raise InvalidProblemError("there are no examples to factorize: give at least one valid example")
    if n_components < 1:
        raise InvalidProblemError(f"n_components={n_components} must be at least 1")
    if n_components > n_examples * rank:
        raise InvalidProblemError(
            f"n_components={n_components} exceeds the {n_examples * rank} factor rows of {n_examples} examples"
            f" of rank {rank}: ask for fewer components or give more examples"
        )


def validate_shape(factors_NRD: Tensor) -> None:
    """Refuse factors that are not a floating-point array of shape (N, R, D).

    Raises:
        InvalidProblemError: naming the shape.
    """
    if factors_NRD.ndim != 3 or not factors_NRD.is_floating_point():
        raise InvalidProblemError(
            f"factors must be a floating-point array of shape (examples, rank, dim),"
            f" not {factors_NRD.dtype} of shape {tuple(factors_NRD.shape)}"
        )


def refuse_not_finite(fisher_squares_N: Tensor) -> None:
    """Refuse factors with entries that are not finite, which the float64 norms of their Fishers tell.

    Raises:
        InvalidProblemError: with the first of them.
    """
    finite_N = fisher_squares_N.isfinite()
    if not bool(finite_N.all()):
        first = int((~finite_N).nonzero()[0, 0])
        raise InvalidProblemError(
            f"factors of {int((~finite_N).sum())} examples are not finite (the first is example {first}):"
            " leave invalid examples out"
        )
