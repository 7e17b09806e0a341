"""Validation of factorization problems."""

from __future__ import annotations

from torch import Tensor

from npeff.errors import NpeffError


class InvalidProblemError(NpeffError, ValueError):
    """The data or the number of components is not valid. The message contains the remedy."""


def validate_size(n_examples: int, rank: int, n_components: int) -> None:
    """Check that there are examples and at most as many components as factor rows.

    Args:
        n_examples: N, the total over all shards.
        rank: R.
        n_components: K.

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
            f" of rank {rank}: reduce n_components or give more examples"
        )


def validate_shape(factors_NRD: Tensor) -> None:
    """Check that factors are a floating-point array of shape (N, R, D).

    Raises:
        InvalidProblemError: if they are not; the message contains the type and the shape.
    """
    if factors_NRD.ndim != 3 or not factors_NRD.is_floating_point():
        raise InvalidProblemError(
            f"factors must be a floating-point array of shape (examples, rank, dim),"
            f" not {factors_NRD.dtype} of shape {tuple(factors_NRD.shape)}"
        )


def refuse_not_finite(fisher_squares_N: Tensor) -> None:
    """Check that all factors are finite.

    Args:
        fisher_squares_N: ‖AᵀA‖² of the factors in float64. It is not finite if an entry of the factors is not finite.

    Raises:
        InvalidProblemError: if one is not finite; the message contains the number of examples and the first one.
    """
    finite_N = fisher_squares_N.isfinite()
    if not bool(finite_N.all()):
        first = int((~finite_N).nonzero()[0, 0])
        raise InvalidProblemError(
            f"factors of {int((~finite_N).sum())} examples are not finite (the first is example {first}):"
            " remove invalid examples"
        )
