from __future__ import annotations

import numpy as np
import pytest
import torch
from npeff.factorization import ExampleShard, InvalidProblemError, factor_source, nnls
from torch import Tensor


def factors_and_components(n: int = 40, rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    factors_NRD = torch.randn(n, rank, 10, dtype=torch.float64, generator=g) / 5
    h_KD = torch.nn.functional.normalize(torch.randn(6, 10, dtype=torch.float64, generator=g), dim=1)
    return factors_NRD, h_KD


def dense_misfits(factors_NRD: Tensor, w_NK: Tensor, h_KD: Tensor) -> Tensor:
    """‖Âᵀ Â − Σ_j W_ij h_j h_jᵀ‖²_F from the D×D matrices, in float64."""
    fishers = factors_NRD.double().mT @ factors_NRD.double()
    return (fishers - torch.einsum("nk,kd,ke->nde", w_NK.double(), h_KD, h_KD)).square().sum(dim=(1, 2))


@pytest.mark.parametrize("method", ["accumulate", "finish"])
def test_loss_and_misfits_equal_the_dense_definition(method: str) -> None:
    factors_NRD, h_KD = factors_and_components()
    shard = ExampleShard(factors_NRD)
    loss = getattr(shard, method)(h_KD).loss(h_KD)
    expected = dense_misfits(factors_NRD, shard.coefficients_NK, h_KD)
    assert loss == pytest.approx(float(expected.sum()), rel=1e-12)
    torch.testing.assert_close(shard.misfits_N, expected, rtol=1e-10, atol=1e-12)


def test_the_final_loss_of_float32_factors_equals_the_dense_definition_too() -> None:
    factors_NRD, h_KD = factors_and_components()
    shard = ExampleShard(factors_NRD.float())
    loss = shard.finish(h_KD).loss(h_KD)
    assert shard.coefficients_NK.dtype == torch.float32
    assert loss == pytest.approx(
        float(dense_misfits(factors_NRD.float(), shard.coefficients_NK, h_KD).sum()), rel=1e-12
    )


def test_statistics_equal_their_definitions() -> None:
    factors_NRD, h_KD = factors_and_components()
    shard = ExampleShard(factors_NRD)
    statistics, w_NK = shard.accumulate(h_KD), shard.coefficients_NK
    b_NRK = factors_NRD @ h_KD.T
    torch.testing.assert_close(statistics.u_KD, torch.einsum("nk,nrk,nrd->kd", w_NK, b_NRK, factors_NRD))
    torch.testing.assert_close(statistics.ww_KK, w_NK.T @ w_NK)
    assert statistics.wt == pytest.approx(float((w_NK * b_NRK.square().sum(dim=1)).sum()))
    assert statistics.fisher_square_sum == pytest.approx(float((factors_NRD.mT @ factors_NRD).square().sum()))
    assert statistics.n_examples == 40


def test_passes_warm_start_and_finish_reaches_the_optimum() -> None:
    factors_NRD, h_KD = factors_and_components()
    shard = ExampleShard(factors_NRD)
    losses = [shard.accumulate(h_KD, sweeps=1).loss(h_KD) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    assert shard.finish(h_KD).loss(h_KD) <= losses[-1]
    t_NK = (factors_NRD @ h_KD.T).square().sum(dim=1)
    torch.testing.assert_close(shard.coefficients_NK, nnls(t_NK, (h_KD @ h_KD.T).square()), rtol=1e-9, atol=1e-12)


def test_given_coefficients_are_the_start_and_are_not_modified() -> None:
    factors_NRD, h_KD = factors_and_components()
    optimal = ExampleShard(factors_NRD)
    expected = optimal.finish(h_KD)
    start_NK = optimal.coefficients_NK.numpy().copy()
    shard = ExampleShard(factors_NRD, start_NK)
    assert shard.accumulate(h_KD, sweeps=1).loss(h_KD) == pytest.approx(expected.loss(h_KD), rel=1e-12)
    assert np.array_equal(start_NK, optimal.coefficients_NK.numpy())


def test_blocks_and_splits_do_not_change_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    factors_NRD, h_KD = factors_and_components()
    expected = ExampleShard(factors_NRD).accumulate(h_KD).pack()
    split = torch.stack([ExampleShard(part).accumulate(h_KD).pack() for part in factors_NRD.split(7)]).sum(dim=0)
    torch.testing.assert_close(split, expected, rtol=1e-11, atol=1e-12)
    monkeypatch.setitem(factor_source.BLOCK_ROWS, "cpu", 15)
    assert len(list(ExampleShard(factors_NRD).source.blocks())) == 8
    torch.testing.assert_close(ExampleShard(factors_NRD).accumulate(h_KD).pack(), expected, rtol=1e-11, atol=1e-12)


def test_examples_of_zero_rows_get_zero_coefficients_and_change_nothing() -> None:
    factors_NRD, h_KD = factors_and_components()
    expected = ExampleShard(factors_NRD).accumulate(h_KD).pack()
    padded = torch.cat([factors_NRD, torch.zeros(2, 3, 10)])
    shard = ExampleShard(padded)
    packed = shard.accumulate(h_KD).pack()
    assert not shard.coefficients_NK[-2:].any()
    torch.testing.assert_close(packed[:-1], expected[:-1], rtol=1e-12, atol=1e-13)


def test_a_shard_without_examples_has_zero_statistics_and_no_candidates() -> None:
    _, h_KD = factors_and_components()
    shard = ExampleShard(torch.zeros(0, 3, 10))
    for statistics in (shard.accumulate(h_KD), shard.finish(h_KD)):
        assert not statistics.pack().any()
    assert not shard.candidates(h_KD).pack().any()


def test_factors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InvalidProblemError, match="not finite"):
        ExampleShard(torch.full((2, 1, 3), float("nan")))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_a_candidate_is_the_direction_of_largest_residual_in_the_examples_row_space(rank: int) -> None:
    factors_NRD, h_KD = factors_and_components(n=9, rank=rank)
    shard = ExampleShard(factors_NRD)
    shard.accumulate(h_KD)
    candidates = shard.candidates(h_KD)
    misfits = dense_misfits(factors_NRD, shard.coefficients_NK, h_KD)
    worst = misfits.argsort(descending=True)[: len(candidates.residuals_M)]
    torch.testing.assert_close(candidates.residuals_M, misfits[worst])
    for i, direction_D in zip(worst.tolist(), candidates.directions_MD, strict=True):
        residual = factors_NRD[i].T @ factors_NRD[i] - (h_KD.T * shard.coefficients_NK[i]) @ h_KD
        basis = torch.linalg.svd(factors_NRD[i], full_matrices=False).Vh
        best = torch.linalg.eigvalsh(basis @ residual @ basis.T)[-1]
        assert float(direction_D @ direction_D) == pytest.approx(1.0)
        assert float(direction_D @ residual @ direction_D) == pytest.approx(float(best), rel=1e-9)
        torch.testing.assert_close(basis.T @ (basis @ direction_D), direction_D)


def test_candidates_fewer_than_asked_for_are_padded_with_zeros() -> None:
    factors_NRD, h_KD = factors_and_components(n=2)
    shard = ExampleShard(factors_NRD)
    shard.accumulate(h_KD)
    candidates = shard.candidates(h_KD)
    assert (candidates.residuals_M[:2] > 0).all()
    assert not candidates.residuals_M[2:].any()
    assert not candidates.directions_MD[2:].any()
