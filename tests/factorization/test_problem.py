from __future__ import annotations

import pickle

import pytest
import torch
from npeff.factorization import ExampleShard, InvalidProblemError, validate_shape, validate_size


def test_as_many_components_as_factor_rows_are_allowed_and_one_more_is_not() -> None:
    validate_size(n_examples=5, rank=3, n_components=15)
    with pytest.raises(InvalidProblemError, match="n_components=16 exceeds the 15 factor rows"):
        validate_size(n_examples=5, rank=3, n_components=16)


@pytest.mark.parametrize("size", [(0, 3, 1), (5, 0, 1), (5, 3, 0)])
def test_nothing_to_factorize_is_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidProblemError):
        validate_size(*size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_example_that_is_not_finite_is_named(value: float) -> None:
    factors_NRD = torch.ones(6, 2, 3)
    factors_NRD[4, 1, 2] = factors_NRD[5, 0, 0] = value
    with pytest.raises(InvalidProblemError, match=r"2 examples are not finite .* example 4"):
        ExampleShard(factors_NRD)


@pytest.mark.parametrize("factors", [torch.ones(4, 3), torch.ones(4, 3, 2, dtype=torch.int64)])
def test_factors_of_another_shape_or_kind_are_refused(factors: torch.Tensor) -> None:
    with pytest.raises(InvalidProblemError, match="examples, rank, dim"):
        validate_shape(factors)


def test_a_refusal_survives_the_journey_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InvalidProblemError("ask for fewer")))
    assert isinstance(error, InvalidProblemError)
    assert str(error) == "ask for fewer"
