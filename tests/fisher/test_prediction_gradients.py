"""Gradients of the prediction from Fisher factors, against autograd and the pseudo-inverse of the label factor."""

from __future__ import annotations

import pytest
import torch
from npeff.fisher import prediction_gradients, prediction_weights
from npeff.gradients import exact_label_factor


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_the_weights_reproduce_the_error_of_the_prediction(n_classes: int) -> None:
    logits = 3 * torch.randn(200, n_classes, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1)
    error = torch.nn.functional.one_hot(p.argmax(-1), n_classes) - p
    factor = exact_label_factor(logits)
    weights = prediction_weights(logits)
    torch.testing.assert_close((factor @ weights[:, :, None])[:, :, 0], error, rtol=0, atol=1e-12)
    expected = (torch.linalg.pinv(factor) @ error[:, :, None])[:, :, 0]
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 40.0, 150.0])
def test_the_gradients_are_those_of_autograd_whatever_the_certainty(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    found, expected = [], []
    for x in inputs:
        logits = weight @ x
        jacobian = torch.autograd.functional.jacobian(lambda w, x=x: w @ x, weight).flatten(1)
        factor = exact_label_factor(logits[None])[0].T @ jacobian
        length = factor.abs().max()
        found.append(prediction_gradients((factor / length)[None], logits[None])[0])
        # e_y − p without cancellation, for certain predictions
        others = logits.softmax(0).index_fill(0, logits.argmax(), 0)
        error = -others + torch.nn.functional.one_hot(logits.argmax(), 4) * others.sum()
        gradient = error @ jacobian
        expected.append(gradient / gradient.norm())
    live = [index for index, each in enumerate(expected) if each.isfinite().all()]
    assert len(live) > 10
    torch.testing.assert_close(
        torch.stack([found[index] for index in live]),
        torch.stack([expected[index] for index in live]),
        rtol=0,
        atol=1e-6,
    )


def test_a_row_of_an_empirical_label_is_the_gradient_and_a_zero_row_stays_zero() -> None:
    factors = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])
    torch.testing.assert_close(prediction_gradients(factors, None), torch.tensor([[0.6, -0.8], [0.0, 0.0]]).double())
