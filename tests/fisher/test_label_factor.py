from __future__ import annotations

import pytest
import torch

from pipeline.fisher import exact_label_factor


def covariance(logits: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(logits.double(), dim=-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@pytest.mark.parametrize("n_classes", [2, 3, 10, 200])
def test_factor_times_its_transpose_is_the_covariance(n_classes: int) -> None:
    logits = 3 * torch.randn(20, n_classes, generator=torch.Generator().manual_seed(n_classes))
    factor = exact_label_factor(logits)
    assert factor.shape == (20, n_classes, n_classes - 1)
    assert factor.dtype == torch.float64
    torch.testing.assert_close(factor @ factor.transpose(1, 2), covariance(logits), rtol=1e-13, atol=1e-16)


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
    torch.testing.assert_close(factor @ factor.transpose(1, 2), covariance(logits), rtol=1e-13, atol=1e-16)


def test_factor_of_an_example_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    whole = exact_label_factor(logits)
    assert torch.equal(whole, torch.cat([exact_label_factor(row[None]) for row in logits]))
