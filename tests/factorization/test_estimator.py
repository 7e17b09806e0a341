from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from npeff.factorization import InvalidProblemError, match_components
from npeff.factorization.estimator import NPEFF
from planted import Planted, planted_fishers
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

_ONLY_TO_THE_TOLERANCE = {
    f"check_sample_weight_equivalence_on_{kind}_data": "equal to the tolerance, not to 1e-7: see test_options"
    for kind in ("dense", "sparse")
}


@parametrize_with_checks([NPEFF(n_components=2, max_iter=30)], expected_failed_checks=lambda _: _ONLY_TO_THE_TOLERANCE)
def test_every_check_of_scikit_learn_that_takes_matrices_passes(estimator: NPEFF, check: Callable[[Any], None]) -> None:
    # scikit-learn itself skips check_array_api_input unless SCIPY_ARRAY_API is set: the
    # estimator makes no claim to take arrays of other libraries.
    check(estimator)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_fishers(n_examples=300, rank=3, dim=24, n_components=6, noise=0.05, seed=0, n_active=3)


@pytest.fixture(scope="module")
def fitted(planted: Planted) -> NPEFF:
    return NPEFF(n_components=6, random_state=0).fit(planted.factors_NRD)


def test_factors_of_three_axes_are_fitted(planted: Planted, fitted: NPEFF) -> None:
    assert match_components(fitted.components_, planted.components_KD)[1].min() > 0.99
    assert fitted.n_features_in_ == 24
    assert fitted.coefficients_.shape == (300, 6)
    assert fitted.explained_ == pytest.approx(1 - fitted.loss_ / 300)
    assert fitted.n_iter_ == len(fitted.history_)
    assert fitted.stopped_ == "converged"
    assert fitted.near_duplicates_ == []
    assert fitted.get_feature_names_out().tolist() == [f"npeff{k}" for k in range(6)]


def test_fit_transform_and_transform_agree(planted: Planted, fitted: NPEFF) -> None:
    np.testing.assert_allclose(fitted.transform(planted.factors_NRD), fitted.coefficients_, rtol=1e-7, atol=1e-9)
    again = clone(fitted).fit_transform(planted.factors_NRD)
    np.testing.assert_array_equal(again, fitted.coefficients_)


def test_examples_are_transformed_independently_of_each_other(planted: Planted, fitted: NPEFF) -> None:
    whole = fitted.transform(planted.factors_NRD)
    np.testing.assert_allclose(fitted.transform(planted.factors_NRD[7:9]), whole[7:9], rtol=1e-9, atol=1e-10)


def test_new_examples_may_have_another_rank(planted: Planted, fitted: NPEFF) -> None:
    padded = np.concatenate([planted.factors_NRD, np.zeros((300, 2, 24))], axis=1)
    np.testing.assert_allclose(fitted.transform(padded), fitted.transform(planted.factors_NRD), rtol=1e-9, atol=1e-10)


def test_normalisation_makes_the_scale_of_an_example_irrelevant(planted: Planted, fitted: NPEFF) -> None:
    scaled = planted.factors_NRD * np.random.default_rng(0).uniform(0.1, 10, (300, 1, 1))
    model = NPEFF(n_components=6, random_state=0).fit(scaled)
    assert model.loss_ == pytest.approx(fitted.loss_, rel=1e-6)
    as_given = NPEFF(n_components=6, random_state=0, normalize=False).fit(2 * planted.factors_NRD)
    assert as_given.loss_ == pytest.approx(16 * fitted.loss_, rel=1e-6)


def test_the_precision_of_the_input_is_that_of_the_coefficients(planted: Planted, fitted: NPEFF) -> None:
    model = NPEFF(n_components=6, random_state=0)
    coefficients = model.fit_transform(planted.factors_NRD.astype(np.float32))
    assert coefficients.dtype == np.float32
    assert fitted.coefficients_.dtype == np.float64
    assert model.loss_ == pytest.approx(fitted.loss_, rel=1e-5)


def test_a_matrix_is_taken_as_factors_of_rank_one() -> None:
    planted = planted_fishers(n_examples=80, rank=1, dim=12, n_components=4, noise=0.1, seed=0, n_active=1)
    matrix = NPEFF(n_components=4, random_state=0).fit(planted.factors_NRD[:, 0])
    factors = NPEFF(n_components=4, random_state=0).fit(planted.factors_NRD)
    np.testing.assert_array_equal(matrix.components_, factors.components_)


def test_the_score_of_the_fitted_examples_is_what_is_explained(planted: Planted, fitted: NPEFF) -> None:
    assert fitted.score(planted.factors_NRD) == pytest.approx(fitted.explained_, rel=1e-6)
    assert fitted.score(planted.factors_NRD.astype(np.float32)) == pytest.approx(fitted.explained_, rel=1e-5)
    assert fitted.score(planted.components_KD) == pytest.approx(1, abs=0.02), "Fishers of one component each"


def test_the_score_is_the_fraction_of_its_definition(planted: Planted, fitted: NPEFF) -> None:
    held_out = planted_fishers(n_examples=40, rank=3, dim=24, n_components=6, noise=0.3, seed=5, n_active=3)
    coefficients = fitted.transform(held_out.factors_NRD)
    fishers = np.einsum("nrd,nre->nde", held_out.factors_NRD, held_out.factors_NRD)
    fishers /= np.linalg.norm(fishers, axis=(1, 2), keepdims=True)
    found = np.einsum("nk,kd,ke->nde", coefficients, fitted.components_, fitted.components_)
    squares = ((fishers - found) ** 2).sum(axis=(1, 2))
    assert fitted.score(held_out.factors_NRD) == pytest.approx(1 - squares.sum() / 40)
    weights = np.linspace(0, 2, 40)
    expected = 1 - (weights * squares).sum() / weights.sum()
    assert fitted.score(held_out.factors_NRD, sample_weight=weights) == pytest.approx(expected)
    with pytest.raises(ValueError, match="all zero"):
        fitted.score(np.zeros((3, 2, 24)))


def test_the_factors_of_coefficients_have_these_coefficients(planted: Planted) -> None:
    model = NPEFF(n_components=6, random_state=0, normalize=False).fit(planted.factors_NRD)
    coefficients = model.transform(planted.factors_NRD)
    factors = model.inverse_transform(coefficients)
    assert factors.shape == (300, 6, 24)
    expected = np.einsum("nk,kd,ke->nde", coefficients, model.components_, model.components_)
    np.testing.assert_allclose(np.einsum("nrd,nre->nde", factors, factors), expected, atol=1e-12)
    np.testing.assert_allclose(model.transform(factors), coefficients, atol=1e-8)
    assert model.inverse_transform(coefficients.astype(np.float32)).dtype == np.float32
    with pytest.raises(ValueError, match="Negative values"):
        model.inverse_transform(-coefficients)
    with pytest.raises(ValueError, match="6 components, not 5"):
        model.inverse_transform(coefficients[:, :5])
    with pytest.raises(NotFittedError):
        clone(model).inverse_transform(coefficients)


def test_a_search_over_held_out_examples_finds_the_number_of_components(planted: Planted) -> None:
    search = GridSearchCV(NPEFF(random_state=0, n_starts=1), {"n_components": [2, 4, 6]}, cv=3)
    search.fit(planted.factors_NRD)
    assert search.best_params_ == {"n_components": 6}
    assert not np.isnan(search.cv_results_["mean_test_score"]).any()
    assert search.score(planted.factors_NRD) == pytest.approx(search.best_estimator_.explained_, rel=1e-6)
    assert search.best_estimator_.get_params()["n_components"] == 6


def test_input_that_does_not_fit_is_refused(planted: Planted, fitted: NPEFF) -> None:
    with pytest.raises(NotFittedError):
        NPEFF(n_components=6).transform(planted.factors_NRD)
    with pytest.raises(ValueError, match="23 features, but NPEFF is expecting 24"):
        fitted.transform(planted.factors_NRD[:, :, :23])
    with pytest.raises(ValueError, match="dim"):
        fitted.transform(planted.factors_NRD[None])
    with pytest.raises(InvalidProblemError, match="exceeds"):
        NPEFF(n_components=901).fit(planted.factors_NRD)
    broken = planted.factors_NRD.copy()
    broken[3, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        NPEFF(n_components=6).fit(broken)
