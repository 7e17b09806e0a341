"""Predicted KL divergences: exact for a model whose logits are linear in the parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from npeff.gradients import exact_label_factor, truncated_label_factor
from npeff.models.predictions import kl_divergence
from npeff.verification.linearized import Linearized, orthogonal_changes, triangular_changes

N, C, P = 7, 5, 30


def example(scale: float, labels: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Linearized]:
    """Logits, Jacobians and a direction of a linear model, and the prediction from its factors A = LᵀJ."""
    torch.manual_seed(0)
    logits_NC, jacobians_NCP = scale * torch.randn(N, C).double(), torch.randn(N, C, P).double()
    along_P = torch.randn(P).double() / P**0.5
    factor_NCR = exact_label_factor(logits_NC) if labels == "exact" else truncated_label_factor(logits_NC, C - 1)[0]
    products_NR = (factor_NCR.mT @ jacobians_NCP @ along_P).numpy()
    solve = triangular_changes if labels == "exact" else orthogonal_changes
    changes_NC = solve(products_NR, factor_NCR.numpy())
    return logits_NC, jacobians_NCP, along_P, Linearized(np.square(products_NR).sum(1), logits_NC.numpy(), changes_NC)


@pytest.mark.parametrize("labels", ["exact", "truncated"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_kl_of_a_linear_model_is_predicted_exactly(scale: float, labels: str) -> None:
    logits_NC, jacobians_NCP, along_P, predicted = example(scale, labels)
    for step in (1.0, -2.5):
        moved_NC = logits_NC + step * jacobians_NCP @ along_P
        np.testing.assert_allclose(predicted.kl(step), kl_divergence(moved_NC, logits_NC).numpy(), rtol=1e-6)


@pytest.mark.parametrize("labels", ["exact", "truncated"])
def test_a_short_step_has_the_quadratic_kl_that_is_taken_where_logits_are_unknown(labels: str) -> None:
    *_, predicted = example(1.0, labels)
    without_logits = Linearized(predicted.evidence_n)
    np.testing.assert_allclose(predicted.kl(1e-4), without_logits.kl(1e-4), rtol=1e-3)
    assert without_logits.confidence_slope() is None
    some = np.array([4, 1])
    for each in (predicted, without_logits):
        np.testing.assert_array_equal(each.at(some).kl(0.3), each.kl(0.3)[some])


def test_the_slope_is_the_derivative_of_the_mean_log_probability_of_the_predicted_class() -> None:
    logits_NC, jacobians_NCP, along_P, predicted = example(1.0, "exact")
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    log_p_NC = (logits_NC + step * (jacobians_NCP @ along_P)).log_softmax(-1)
    log_p_NC.gather(1, logits_NC.argmax(1, keepdim=True)).mean().backward()  # type: ignore[no-untyped-call]
    assert step.grad is not None
    assert predicted.confidence_slope() == pytest.approx(float(step.grad), rel=1e-6)


def test_rows_of_impossible_classes_do_not_matter() -> None:
    """Their stored rows contain only rounding, which division by a tiny probability would amplify."""
    logits_NC = torch.tensor([[0.0, 1.0, -90.0, -400.0], [-900.0, 0.0, 0.5, -1e30]], dtype=torch.float64)
    noise_NR = 1e-6 * np.random.default_rng(0).standard_normal((2, 3))
    for factor_NCR, solve in [
        (exact_label_factor(logits_NC), triangular_changes),
        (truncated_label_factor(logits_NC, 3)[0], orthogonal_changes),
    ]:
        changes_NC = solve(noise_NR, factor_NCR.numpy())
        assert np.isfinite(changes_NC).all()
        kl_N = Linearized(np.square(noise_NR).sum(1), logits_NC.numpy(), changes_NC).kl(1.0)
        assert (kl_N < 1e-9).all()
