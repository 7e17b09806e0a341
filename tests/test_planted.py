from __future__ import annotations

import numpy as np
import pytest
from planted import HARD_PROBLEMS, hard_problem, planted_fishers


def test_components_have_the_cosine_and_the_frequencies_that_were_asked_for() -> None:
    planted = planted_fishers(
        n_examples=3000, rank=2, dim=400, n_components=8, noise=0.0, seed=0, n_active=1, cosine=0.8, zipf=1.2
    )
    cosines = planted.components_KD @ planted.components_KD.T
    assert np.abs(cosines[~np.eye(8, dtype=bool)] - 0.8).max() < 0.06
    counts = (planted.coefficients_NK > 0).sum(axis=0)
    expected = np.arange(1.0, 9) ** -1.2
    np.testing.assert_allclose(counts / 3000, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize("name", HARD_PROBLEMS)
def test_a_hard_problem_is_normalised_and_of_the_sizes_asked_for(name: str) -> None:
    planted, n_fit = hard_problem(name, seed=1, n_examples=50, dim=40, n_components=12)
    fishers = planted.factors_NRD.transpose(0, 2, 1) @ planted.factors_NRD
    np.testing.assert_allclose(np.linalg.norm(fishers, axis=(1, 2)), 1.0)
    assert planted.factors_NRD.shape == (50, 3, 40)
    assert planted.components_KD.shape == (12, 40)
    assert n_fit == (9 if name == "fewer fitted than true" else 12)
