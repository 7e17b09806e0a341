"""Statistics of planted spectra against their definitions, and sums over groups of rows against dense matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from npeff.fisher.second_moments import MomentGroups, MomentSum, RowGroups
from npeff.fisher.spectrum import (
    cumulative_shares,
    local_effective_dimension,
    nonnegative,
    resolution,
    spectrum_statistics,
)
from torch import Tensor

N, D, P = 200, 24, 1000
SPECTRA = {
    "decaying": 3.0 * 0.6 ** np.arange(D),
    "equal": np.full(D, 0.1),
    "one": np.array([7.0, *[0.0] * (D - 1)]),
    "step": np.repeat([2.0, 1e-3], D // 2),
}


def definition(eigenvalues: Sequence[float], n: int, p: int) -> dict[str, float]:
    """Every statistic as it is written in the documentation, in sums over numbers."""
    values = sorted(eigenvalues, reverse=True)
    trace = math.fsum(values)
    kappa = n / (2 * math.pi * math.log(n))

    def directions(share: float) -> int:
        return next(m for m in range(1, len(values) + 1) if math.fsum(values[:m]) >= share * trace * (1 - 1e-12))

    return {
        "trace": trace,
        "largest": values[0],
        "effective_rank": math.exp(-math.fsum(v / trace * math.log(v / trace) for v in values if v > 0)),
        "participation_ratio": trace**2 / math.fsum(v * v for v in values),
        "effective_parameters_1": math.fsum(n * v / (n * v + 1) for v in values),
        "effective_parameters_100": math.fsum(n * v / (n * v + 100) for v in values),
        "local_effective_dimension": math.fsum(math.log(1 + kappa * p * v / trace) for v in values) / math.log(kappa),
        "directions_90": directions(0.9),
        "directions_99": directions(0.99),
        "mean_eigenvalue": trace / p,
        "mean_squared_eigenvalue": math.fsum(v * v for v in values) / p,
    }


def planted_rows(eigenvalues_D: np.ndarray) -> Tensor:
    """Rows (4 D, D) whose sum of a aᵀ over N examples has these eigenvalues after division by N."""
    rng = np.random.default_rng(0)
    basis_DD = np.linalg.qr(rng.standard_normal((D, D)))[0]
    mixing_mD = np.linalg.qr(rng.standard_normal((4 * D, D)))[0]
    return torch.from_numpy(mixing_mD * np.sqrt(N * eigenvalues_D) @ basis_DD)


def summed(rows_mD: Tensor) -> MomentSum:
    moments = MomentSum(rows_mD.shape[1])
    for block in rows_mD.split(7):
        moments.add(block)
    return moments


@pytest.mark.parametrize("name", SPECTRA)
def test_statistics_of_a_planted_spectrum_are_those_of_the_definitions(name: str) -> None:
    rows_mD = planted_rows(SPECTRA[name])
    groups = MomentGroups(3, lambda group: summed(rows_mD[group::3]))
    found = spectrum_statistics(nonnegative(groups.eigenvalues(range(3))) / N, N, P)
    expected = definition(SPECTRA[name], N, P)
    assert found == pytest.approx(expected, rel=1e-10)


def test_rows_and_sums_give_the_same_eigenvalues_of_every_set_in_any_order() -> None:
    rows_mD = planted_rows(SPECTRA["decaying"])[:18]
    dense = {chosen: torch.cat([rows_mD[group::3] for group in chosen]) for chosen in ((0, 1, 2), (2, 0), (1,))}
    of_rows = RowGroups([rows_mD[group::3] for group in range(3)])
    of_sums = MomentGroups(3, lambda group: summed(rows_mD[group::3].flip(0)))
    for chosen, rows in dense.items():
        expected = nonnegative(np.linalg.eigvalsh((rows.T @ rows).numpy()))
        scale = 1e-10 * expected[0]
        assert nonnegative(of_sums.eigenvalues(chosen)) == pytest.approx(expected, abs=scale)
        found = nonnegative(of_rows.eigenvalues(chosen))
        assert found == pytest.approx(expected[: len(found)], abs=scale)
        assert len(found) == len(rows)


def test_a_sum_continues_from_its_arrays_and_merges() -> None:
    rows_mD = planted_rows(SPECTRA["step"])
    first, rest = summed(rows_mD[:30]), rows_mD[30:]
    continued = MomentSum(D, arrays={name: panel.copy() for name, panel in first.arrays().items()})
    continued.add(rest)
    first.merge(summed(rest))
    dense = rows_mD.T @ rows_mD
    assert torch.allclose(continued.matrix(), dense, rtol=1e-12, atol=1e-12)
    assert torch.allclose(first.matrix(), dense, rtol=1e-12, atol=1e-12)
    copied = first.copy()
    copied.subtract(summed(rest))
    assert torch.allclose(copied.matrix(), rows_mD[:30].T @ rows_mD[:30], rtol=1e-12, atol=1e-10)
    assert torch.allclose(first.matrix(), dense, rtol=1e-12, atol=1e-12), "the copy is another sum"


def test_blocks_in_float32_are_added_up_in_float64() -> None:
    one = torch.ones(1, 3)
    moments = MomentSum(3)
    moments.add(4096.0 * one)
    moments.matrix()  # the first block is added
    moments.add(0.5 * one)
    assert moments.matrix()[0, 2] == 4096.0**2 + 0.25


def test_dimensions_below_the_number_of_blocks() -> None:
    rows_mD = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(summed(rows_mD).matrix(), rows_mD.T @ rows_mD)


@pytest.mark.parametrize("n", [0, 1, 2, 18])
def test_too_few_examples_have_no_effective_dimension(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 19 examples, not {n}"):
        local_effective_dimension(SPECTRA["equal"], n, P)
    assert spectrum_statistics(SPECTRA["equal"], n, P)["local_effective_dimension"] is None


def test_nineteen_examples_have_one() -> None:
    assert resolution(19) > 1
    assert spectrum_statistics(SPECTRA["equal"], 19, P)["local_effective_dimension"] is not None


def test_a_fisher_of_zero_has_no_ranks() -> None:
    found = spectrum_statistics(np.zeros(4), 100, P)
    assert found["trace"] == found["largest"] == found["effective_parameters_1"] == 0
    undefined = ("effective_rank", "participation_ratio", "local_effective_dimension", "directions_90")
    assert [found[name] for name in undefined] == [None] * 4
    assert np.isnan(cumulative_shares(np.zeros(4))).all()


def test_negative_rounding_errors_are_zero_and_infinities_are_refused() -> None:
    assert nonnegative(np.array([-1e-18, 2.0, 1.0])).tolist() == [2.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="finite"):
        nonnegative(np.array([1.0, np.nan]))
