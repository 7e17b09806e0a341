from __future__ import annotations

import math

import pytest
import torch
from npeff.gradients import exact_label_factor, truncated_label_factor
from torch import Tensor


def covariance(logits: Tensor) -> Tensor:
    p = torch.softmax(logits.double(), dim=-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def random_logits(n: int, n_classes: int) -> Tensor:
    return 3 * torch.randn(n, n_classes, generator=torch.Generator().manual_seed(n_classes))


@pytest.mark.parametrize("n_classes", [2, 3, 10, 200])
def test_factor_times_its_transpose_is_the_covariance(n_classes: int) -> None:
    logits = random_logits(20, n_classes)
    factor = exact_label_factor(logits)
    assert factor.shape == (20, n_classes, n_classes - 1)
    assert factor.dtype == torch.float64
    torch.testing.assert_close(factor @ factor.mT, covariance(logits), rtol=1e-13, atol=1e-16)


def test_saturated_predictions_keep_their_relative_accuracy() -> None:
    gap = 60.0
    factor = exact_label_factor(torch.tensor([[gap, 0.0], [0.0, gap]], dtype=torch.float64))
    expected = torch.exp(torch.tensor(-gap / 2, dtype=torch.float64)) / (1 + torch.exp(torch.tensor(-gap).double()))
    torch.testing.assert_close(factor[:, 0, 0], expected.expand(2), rtol=1e-14, atol=0)
    torch.testing.assert_close(factor.sum(1), torch.zeros(2, 1, dtype=torch.float64), rtol=0, atol=1e-27)


@pytest.mark.parametrize("scale", [1e3, 1e30, 1e308])
def test_extreme_logits_give_finite_factors(scale: float) -> None:
    logits = scale * torch.tensor([[1.0, -1.0, 0.0, 1.0], [-1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    factor = exact_label_factor(logits)
    assert factor.isfinite().all()
    torch.testing.assert_close(factor @ factor.mT, covariance(logits), rtol=1e-13, atol=1e-16)
    truncated, _, kept = truncated_label_factor(logits, 3)
    torch.testing.assert_close(truncated @ truncated.mT, covariance(logits), rtol=1e-13, atol=1e-16)
    assert kept.tolist() == [1, 1]  # of the second, which is certain, there is nothing to keep


@pytest.mark.parametrize("rank", [1, 2])
def test_factor_of_an_example_does_not_depend_on_its_batch(rank: int) -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact_label_factor(logits), torch.cat([exact_label_factor(row[None]) for row in logits]))
    single = [truncated_label_factor(row[None], rank) for row in logits]
    for whole, parts in zip(truncated_label_factor(logits, rank), zip(*single, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("n_classes", "rank"), [(2, 1), (7, 1), (7, 3), (7, 6), (40, 5), (40, 39)])
def test_truncated_factor_has_the_largest_eigenpairs_of_the_covariance(n_classes: int, rank: int) -> None:
    logits = random_logits(20, n_classes)
    values, vectors = torch.linalg.eigh(covariance(logits))
    largest, kept_vectors = values[:, -rank:], vectors[:, :, -rank:]
    expected = (kept_vectors * largest[:, None]) @ kept_vectors.mT
    factor, ranks, kept = truncated_label_factor(logits, rank)
    assert factor.shape == (20, n_classes, rank)
    assert factor.dtype == torch.float64
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(kept, largest.sum(1) / values.sum(1), rtol=1e-12, atol=0)
    # largest first, and each orthogonal to the others
    torch.testing.assert_close(factor.mT @ factor, torch.diag_embed(largest.flip(1)), rtol=0, atol=1e-14)
    assert ranks.tolist() == [rank] * 20


@pytest.mark.parametrize("n_classes", [2, 3, 6])
def test_signs_do_not_depend_on_the_last_digits_of_the_logits(n_classes: int) -> None:
    """For two classes the eigenvector is (1, -1)/√2, whose entries are of one magnitude."""
    logits = random_logits(200, n_classes)
    factor, _, _ = truncated_label_factor(logits, 4)
    near, _, _ = truncated_label_factor(logits + 1e-7 * random_logits(200, n_classes).flip(0), 4)
    torch.testing.assert_close(near, factor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95, 0.999])
def test_the_fewest_pairs_that_keep_the_share_are_used(share: float) -> None:
    logits = random_logits(60, 9)
    values = torch.linalg.eigvalsh(covariance(logits)).flip(1)[:, :8]
    shares = values.cumsum(1) / values.sum(1, keepdim=True)
    expected = 1 + (shares < share).sum(1)
    factor, ranks, kept = truncated_label_factor(logits, 8, share)
    assert ranks.tolist() == expected.tolist()
    assert len(set(ranks.tolist())) > 1 or share == 0.3
    assert (kept >= share).all()
    used = torch.arange(8) < ranks[:, None]
    assert (factor.abs().amax(1).gt(0) == used).all()
    torch.testing.assert_close(factor.square().sum((1, 2)), kept * values.sum(1), rtol=1e-12, atol=0)


def test_the_rank_is_the_limit_where_it_keeps_less_than_the_share() -> None:
    logits = torch.zeros(1, 11)
    _, ranks, kept = truncated_label_factor(logits, 3, 0.9)
    assert ranks.tolist() == [3]
    torch.testing.assert_close(kept, torch.tensor([0.3], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("share", "rank"), [(0.25, 1), (0.5, 2), (0.6, 3), (0.75, 3), (1.0, 4)])
def test_ties_of_a_uniform_prediction(share: float, rank: int) -> None:
    """All eigenvalues are 1/C: any basis will do, and a share that is met exactly is met."""
    factor, ranks, kept = truncated_label_factor(torch.zeros(3, 5), 4, share)
    assert ranks.tolist() == [rank] * 3
    torch.testing.assert_close(kept, torch.full((3,), rank / 4, dtype=torch.float64), rtol=1e-12, atol=0)
    squared = factor.mT @ factor
    expected = torch.diag(0.2 * (torch.arange(4) < rank).double())
    torch.testing.assert_close(squared, expected.expand(3, 4, 4), rtol=0, atol=1e-14)
    torch.testing.assert_close(factor.sum(1), torch.zeros(3, 4, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("gap", [5.0, 40.0, 200.0])
def test_saturated_predictions_keep_their_eigenpairs(gap: float) -> None:
    """For p = (1 - 2e, e, e) the eigenvalues are 3 e (1 - 2e), of (-2, 1, 1), and e, of (0, 1, -1)."""
    factor, ranks, _ = truncated_label_factor(torch.tensor([[gap, 0.0, 0.0]], dtype=torch.float64), 2)
    e = math.exp(-gap) / (1 + 2 * math.exp(-gap))
    first, second = math.sqrt(3 * e * (1 - 2 * e)), math.sqrt(e)
    expected = torch.tensor([[2 / 6**0.5, -1 / 6**0.5, -1 / 6**0.5]], dtype=torch.float64) * first
    torch.testing.assert_close(factor[:, :, 0], -expected, rtol=1e-12, atol=0)  # -2 + 1.5 + 2 > 0
    assert abs(float(factor[0, 1, 1]) * float(factor[0, 2, 1]) / (-second * second / 2) - 1) < 1e-12
    assert ranks.tolist() == [2]
    _, _, kept = truncated_label_factor(torch.tensor([[gap, 0.0, 0.0]], dtype=torch.float64), 1)
    assert abs(float(kept) / (first**2 / (first**2 + second**2)) - 1) < 1e-12
