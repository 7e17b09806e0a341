from __future__ import annotations

import pytest
import torch
from npeff.factorization import Candidates, ExampleShard, Statistics, explained, merge_candidates
from npeff.factorization.objective import N_CANDIDATES


def shard_and_components(n: int = 30, seed: int = 0) -> tuple[ExampleShard, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    factors_NRD = torch.randn(n, 3, 8, dtype=torch.float64, generator=g)
    h_KD = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64, generator=g), dim=1)
    return ExampleShard(factors_NRD), h_KD


def test_packing_is_exact_and_packs_add_up_to_the_pack_of_the_merge() -> None:
    shard, h_KD = shard_and_components()
    parts = [ExampleShard(part).accumulate(h_KD) for part in shard.factors_NRD.split(11)]
    packed = torch.stack([part.pack() for part in parts]).sum(dim=0)
    unpacked = Statistics.unpack(parts[0].pack(), 5, 8)
    assert torch.equal(unpacked.pack(), parts[0].pack())
    assert unpacked.n_examples == 11
    assert packed.shape == (5 * 8 + 5 * 5 + 4,)
    merged = Statistics.zeros(5, 8)
    for part in parts:
        merged.merge(part)
    torch.testing.assert_close(merged.pack(), packed, rtol=1e-14, atol=0)
    assert merged.n_examples == 30


def test_statistics_of_different_shapes_do_not_merge() -> None:
    with pytest.raises(AssertionError):
        Statistics.zeros(3, 4).merge(Statistics.zeros(3, 5))


def test_u_gives_the_gradient_of_the_loss() -> None:
    shard, h_KD = shard_and_components()
    statistics = shard.accumulate(h_KD)
    w_NK, factors_NRD = shard.coefficients_NK, shard.factors_NRD
    h = h_KD.clone().requires_grad_()
    model = torch.einsum("nk,kd,ke->nde", w_NK, h, h)
    (gradient,) = torch.autograd.grad((factors_NRD.mT @ factors_NRD - model).square().sum(), h)
    s_KK = statistics.ww_KK * (h_KD @ h_KD.T)
    torch.testing.assert_close(-4 * (statistics.u_KD - s_KK @ h_KD), gradient, rtol=1e-10, atol=1e-10)


def test_explained_is_one_for_a_perfect_fit_and_zero_without_components() -> None:
    assert explained(0.0, 7.0) == 1.0
    assert explained(7.0, 7.0) == 0.0


def test_a_component_without_coefficients_is_dead_and_others_are_not() -> None:
    statistics = Statistics.zeros(3, 4)
    statistics.ww_KK.copy_(torch.diag(torch.tensor([2.0, 0.0, 1e-6])))
    assert statistics.dead_K.tolist() == [False, True, False]
    assert Statistics.zeros(3, 4).dead_K.all()


def test_candidates_pack_exactly_and_merge_to_the_worst_in_any_grouping() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [
        Candidates(torch.rand(N_CANDIDATES, generator=g).double(), torch.randn(N_CANDIDATES, 6).double())
        for _ in range(3)
    ]
    unpacked = Candidates.unpack(parts[0].pack())
    assert torch.equal(unpacked.residuals_M, parts[0].residuals_M)
    assert torch.equal(unpacked.directions_MD, parts[0].directions_MD)
    at_once = merge_candidates([*parts, Candidates.none(6)])
    in_turn = merge_candidates([parts[2], merge_candidates([parts[1], parts[0]])])
    assert torch.equal(at_once.pack(), in_turn.pack())
    everything = torch.cat([part.residuals_M for part in parts])
    assert torch.equal(at_once.residuals_M, everything.sort(descending=True).values[:N_CANDIDATES])
