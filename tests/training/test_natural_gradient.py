"""Every kind of natural gradient is the dense float64 solution of its definition, and bad input is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.training import (
    DiagonalPreconditioner,
    ExactPreconditioner,
    LowRankPreconditioner,
    TrainingError,
)
from npeff.training.conjugate_gradients import CGState
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {"weight": (20, 15), "bias": (40,), "scalar": ()}
P = 20 * 15 + 40 + 1
N, RANK = 40, 3


def flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([values[name].reshape(-1) for name in SHAPES])


def parts(vector: Tensor) -> dict[str, Tensor]:
    pieces = vector.split([math.prod(shape) for shape in SHAPES.values()])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(SHAPES.items(), pieces, strict=True)}


@functools.cache
def rows(decay: float = 0.93) -> Tensor:
    """B (n, P) with eigenvalues of F̄ from 25 down."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(N * RANK, N * RANK, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(P, N * RANK, generator=generator, dtype=torch.float64))
    sizes = 5 * decay ** torch.arange(N * RANK, dtype=torch.float64)
    return left @ (sizes[:, None] * right.T)


def gradient(seed: int = 1) -> dict[str, Tensor]:
    return parts(torch.randn(P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def solved(fisher: Tensor, damping: float, g: Mapping[str, Tensor]) -> Tensor:
    return torch.linalg.solve(fisher + damping * torch.eye(P, dtype=torch.float64), flat(g))


class DenseRows:
    """The products with rows that are in memory."""

    shapes = SHAPES

    def __init__(self, rows_nP: Tensor) -> None:
        self.rows_nP, self.calls = rows_nP, 0

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.rows_nP @ flat(direction).double()

    def weighted_sum(self, weights_n: Tensor) -> dict[str, Tensor]:
        return parts(weights_n @ self.rows_nP)


def sketched(rows_nP: Tensor, dim: int) -> Tensor:
    """Random signs: a sketch whose inner products have the right mean."""
    generator = torch.Generator().manual_seed(2)
    signs = torch.randint(0, 2, (P, dim), generator=generator, dtype=torch.float64) * 2 - 1
    return rows_nP @ signs / dim**0.5


def in_blocks(rows_nD: Tensor, size: int) -> Callable[[], list[Tensor]]:
    return lambda: list(rows_nD.split(size))


def test_the_diagonal_kind_is_its_dense_solution(tmp_path: Path) -> None:
    fisher, g = rows().square().sum(0), gradient()
    expected = solved(fisher.diag(), 0.1, g)
    save_file(parts(fisher), tmp_path / "fisher.safetensors", {"labels": "exact"})
    for source in (parts(fisher), tmp_path / "fisher.safetensors"):
        found = DiagonalPreconditioner(source, damping=0.1).precondition(g)
        torch.testing.assert_close(flat(found), expected, rtol=1e-8, atol=0)


def test_the_low_rank_kind_is_its_dense_solution() -> None:
    g, k = gradient(), 12
    values, vectors = torch.linalg.eigh(rows().T @ rows())
    mu, top = values[-k:], vectors[:, -k:]
    expected = solved(top @ mu.diag() @ top.T, 1e-2, g)
    directions = {name: torch.stack([parts(each)[name] for each in top.T]) for name in SHAPES}
    found = LowRankPreconditioner(mu, directions, damping=1e-2).precondition(g)
    torch.testing.assert_close(flat(found), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("damping", [1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("dim", [None, 32, 256])
def test_the_exact_kind_is_the_dense_solution(damping: float, dim: int | None) -> None:
    rows_nP, g = rows(), gradient()
    expected = solved(rows_nP.T @ rows_nP, damping, g)
    sketch = None if dim is None else in_blocks(sketched(rows_nP, dim), 77)  # 32 < n, and 256 > n
    kind = ExactPreconditioner(
        DenseRows(rows_nP), damping=damping, sketched_rows=sketch, tolerance=1e-10, max_iterations=2000
    )
    found = flat(kind.precondition(g))
    assert float((found - expected).norm()) <= 1e-8 * float(expected.norm())


def test_a_sketch_takes_fewer_iterations_and_the_whole_rows_take_one() -> None:
    rows_nP, g = rows(0.96), gradient()

    def iterations(sketch: Tensor | None) -> int:
        return ExactPreconditioner(DenseRows(rows_nP), damping=1e-2, sketched_rows=sketch).solve(g).iterations

    plain, with_sketch, whole = iterations(None), iterations(sketched(rows_nP, 300)), iterations(rows_nP)
    assert whole <= 2
    assert 3 * with_sketch < plain


@pytest.mark.parametrize("dim", [None, 32, 256])
def test_the_error_is_not_larger_than_estimated(dim: int | None) -> None:
    rows_nP, g = rows(), gradient()
    sketch = None if dim is None else sketched(rows_nP, dim)
    for damping in (1e-3, 1e-1):
        expected = solved(rows_nP.T @ rows_nP, damping, g)
        for tolerance in (0.05, 0.01, 1e-4):
            found = ExactPreconditioner(
                DenseRows(rows_nP), damping=damping, sketched_rows=sketch, tolerance=tolerance, max_iterations=500
            ).solve(g)
            error = float((flat(found.direction) - expected).norm() / expected.norm())
            assert error <= tolerance >= found.relative_error


def test_an_interrupted_solution_goes_on_where_it_was() -> None:
    states: list[CGState] = []
    operator = DenseRows(rows())
    kind = ExactPreconditioner(operator, damping=1e-2, sketched_rows=sketched(rows(), 100))
    whole = kind.solve(gradient(), after=states.append)
    assert [state.iteration for state in states] == list(range(whole.iterations + 1))
    operator.calls = 0
    rest = kind.solve(gradient(), states[-3])
    assert operator.calls == 2
    assert rest.iterations == whole.iterations
    assert torch.equal(flat(rest.direction), flat(whole.direction))


def test_a_gradient_of_zeros_and_one_outside_the_rows() -> None:
    rows_nP = rows()
    kind = ExactPreconditioner(DenseRows(rows_nP), damping=0.5)
    zeros = kind.solve(parts(torch.zeros(P, dtype=torch.float64)))
    assert zeros.iterations == 0
    assert not flat(zeros.direction).any()


def test_the_dtype_of_the_gradients_is_kept() -> None:
    g = {name: value.float() for name, value in gradient().items()}
    fisher = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    directions = {name: torch.zeros(1, *shape) for name, shape in SHAPES.items()}
    directions["scalar"] += 1
    kinds: list[Any] = [
        DiagonalPreconditioner(fisher, damping=1.0),
        LowRankPreconditioner(torch.ones(1), directions, damping=1.0),
        ExactPreconditioner(DenseRows(rows()), damping=1.0),
    ]
    for kind in kinds:
        assert {value.dtype for value in kind.precondition(g).values()} == {torch.float32}
    half = kinds[0].precondition({name: value.bfloat16() for name, value in g.items()})
    assert {value.dtype for value in half.values()} == {torch.bfloat16}


def without_scalar(g: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in g.items() if name != "scalar"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_scalar, "the gradient of 'scalar' is missing: give a tensor for every"),
        (lambda g: g | {"more": torch.ones(1)}, "there is no Fisher for 'more'"),
        (lambda g: g | {"bias": torch.ones(3)}, r"has the shape \(3,\), and the Fisher has \(40,\)"),
        (lambda g: g | {"bias": torch.full((40,), math.nan)}, "has entries that are not finite"),
        (lambda g: g | {"bias": None}, "is missing"),
        (lambda g: list(g), "must be a mapping of tensors, not list"),
    ],
)
def test_other_gradients_are_refused(change: Callable[[Any], Any], said: str) -> None:
    fisher = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    for kind in (DiagonalPreconditioner(fisher, damping=1), ExactPreconditioner(DenseRows(rows()), damping=1)):
        with pytest.raises(TrainingError, match=said) as caught:
            kind.precondition(change(gradient()))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damping", [0, -1.0, math.nan, math.inf, "1", True])
def test_a_damping_that_is_no_finite_number_above_0_is_refused(damping: Any) -> None:
    fisher = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    directions = {name: torch.zeros(1, *shape) for name, shape in SHAPES.items()}
    for make in (
        lambda: DiagonalPreconditioner(fisher, damping=damping),
        lambda: ExactPreconditioner(DenseRows(rows()), damping=damping),
        lambda: LowRankPreconditioner(torch.ones(1), directions, damping=damping),
    ):
        with pytest.raises(TrainingError, match="damping must be a finite number above 0"):
            make()


def test_other_bad_input_is_refused(tmp_path: Path) -> None:
    fisher = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    save_file(fisher, tmp_path / "fisher.safetensors", {"labels": "empirical"})
    with pytest.raises(TrainingError, match="set allow_empirical=True"):
        DiagonalPreconditioner(tmp_path / "fisher.safetensors", damping=1)
    DiagonalPreconditioner(tmp_path / "fisher.safetensors", damping=1, allow_empirical=True)
    with pytest.raises(TrainingError, match="does not exist"):
        DiagonalPreconditioner(tmp_path / "other.safetensors", damping=1)
    with pytest.raises(TrainingError, match="not orthonormal"):
        LowRankPreconditioner(torch.ones(2), {"a": torch.ones(2, 3)}, damping=1)
    with pytest.raises(TrainingError, match="its first axis must have the 3 directions"):
        LowRankPreconditioner(torch.ones(3), {"a": torch.ones(2, 3)}, damping=1)
    with pytest.raises(TrainingError, match="not negative"):
        LowRankPreconditioner(-torch.ones(1), {"a": torch.ones(1, 1)}, damping=1)
    with pytest.raises(TrainingError, match="tolerance must be"):
        ExactPreconditioner(DenseRows(rows()), damping=1, tolerance=0)
    with pytest.raises(TrainingError, match="max_iterations must be"):
        ExactPreconditioner(DenseRows(rows()), damping=1, max_iterations=0)
    few = ExactPreconditioner(DenseRows(rows()), damping=1e-3, max_iterations=1)
    with pytest.raises(TrainingError, match=r"do not converge in 1 iterations .*: raise max_iterations"):
        few.precondition(gradient())
    assert not few.solve(gradient()).converged
    other = ExactPreconditioner(DenseRows(rows()), damping=1, sketched_rows=torch.ones(3, 5))
    with pytest.raises(TrainingError, match="3 sketched rows, and the Fisher has 120"):
        other.precondition(gradient())
