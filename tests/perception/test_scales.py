"""Perceptual scales against their closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from npeff.perception.scales import perceptual_scale


def test_the_scale_of_a_logistic_model_has_its_closed_form() -> None:
    # I = p(1 − p) b² for p = 1/(1 + exp(−a − bs)), and ∫√I ds = 2 |asin √p₁ − asin √p₀|
    a, b, levels = 0.3, 1.7, np.linspace(-3, 4, 29)

    def probability(s: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-a - b * s))

    scale = perceptual_scale(lambda s: probability(s) * (1 - probability(s)) * b**2, levels)
    exact = 2 * (np.arcsin(np.sqrt(probability(levels))) - np.arcsin(np.sqrt(probability(levels[0]))))
    assert scale.length == pytest.approx(exact[-1], rel=1e-12)
    np.testing.assert_allclose(scale.psi_n, exact / exact[-1], atol=1e-12)


def test_another_parametrization_of_the_stimulus_leaves_the_scale_as_it_is() -> None:
    levels = np.linspace(0.2, 3, 12)
    own = perceptual_scale(lambda s: (1 + s**2) ** 2, levels)
    # u = s³: I(u) = I(s) (ds/du)²
    other = perceptual_scale(lambda u: ((1 + np.cbrt(u) ** 2) / (3 * np.cbrt(u) ** 2)) ** 2, levels**3)
    assert other.length == pytest.approx(own.length, rel=1e-6)
    np.testing.assert_allclose(other.psi_n, own.psi_n, atol=1e-6)


def test_a_constant_information_gives_a_straight_line_and_none_gives_no_scale() -> None:
    np.testing.assert_allclose(perceptual_scale(lambda s: 4.0, [0, 1, 3, 4]).psi_n, [0, 0.25, 0.75, 1], atol=1e-14)
    without = perceptual_scale(lambda s: 0 * s, [0, 1])
    assert without.length == 0
    assert np.isnan(without.psi_n).all()


@pytest.mark.parametrize("levels", [[1.0], [0, 0, 1], [1, 0], [0, np.nan], [[0, 1]]])
def test_levels_that_do_not_increase_are_refused(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="levels must be at least two finite and increasing values"):
        perceptual_scale(lambda s: s, levels)


@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan])
def test_an_information_that_cannot_be_one_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="negative or not finite at"):
        perceptual_scale(lambda s: np.where(s > 0.5, value, 1.0), [0, 1])
