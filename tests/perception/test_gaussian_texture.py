"""The information of Gaussian textures against quadrature, simulation, and the curvature of the KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from npeff.perception import gaussian_texture
from npeff.perception.gaussian_path import GaussianPath, rao_distance
from npeff.perception.gaussian_texture import SpectrumPath
from npeff.perception.scales import perceptual_scale
from scipy import integrate, special

H = 1e-4


def log_frequency(z: np.ndarray, z0: float, b: float) -> np.ndarray:
    """Logarithm of the log-normal density with mode z0 and bandwidth b in octaves."""
    variance = b**2 * math.log(2) / 8
    return (
        -np.log(z) - 0.5 * math.log(2 * math.pi * variance) - (np.log(z) - math.log(z0) - variance) ** 2 / 2 / variance
    )


def log_orientation(theta: np.ndarray, mean: float, spread: float) -> np.ndarray:
    """Logarithm of the von Mises density of 2θ, on a half turn."""
    kappa = 1 / (4 * spread**2)
    return kappa * (np.cos(2 * (theta - mean)) - 1) - np.log(math.pi * special.i0e(kappa))


def by_quadrature(log_density: Callable[[np.ndarray, float], np.ndarray], at: float, low: float, high: float) -> float:
    """E (∂ log p)², the derivative by central differences of fourth order."""

    def integrand(x: float) -> float:
        point = np.asarray(x)
        one, two = (
            (log_density(point, at + step) - log_density(point, at - step)) / (2 * step)
            for step in (H * at, 2 * H * at)
        )
        return float(np.exp(log_density(point, at)) * ((4 * one - two) / 3) ** 2)

    return integrate.quad(integrand, low, high, epsabs=1e-13, epsrel=1e-12, limit=500)[0]


@pytest.mark.parametrize(("z0", "b"), [(2.5, 1.1), (0.7, 0.4), (4.0, 2.0)])
def test_frequency_and_bandwidth_have_the_information_of_the_log_normal_density(z0: float, b: float) -> None:
    for measured, closed in (
        (
            by_quadrature(lambda u, z: log_frequency(np.exp(u), z, b) + u, z0, -9, 9),
            gaussian_texture.frequency_information(z0, b),
        ),
        (
            by_quadrature(lambda u, w: log_frequency(np.exp(u), z0, w) + u, b, -9, 9),
            gaussian_texture.bandwidth_information(b),
        ),
    ):
        assert float(closed) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("spread", [0.6, 0.2, math.radians(5)])
def test_orientation_and_spread_have_the_information_of_the_von_mises_density(spread: float) -> None:
    half = math.pi / 2
    of_spread = by_quadrature(lambda theta, s: log_orientation(theta, 0.0, s), spread, -half, half)
    of_mean = by_quadrature(lambda theta, m: log_orientation(theta, m - 1, spread), 1.0, -half, half)
    assert float(gaussian_texture.spread_information(spread)) == pytest.approx(of_spread, rel=1e-6)
    assert float(gaussian_texture.orientation_information(spread)) == pytest.approx(of_mean, rel=1e-6)


def test_the_scores_of_draws_have_this_variance() -> None:
    rng, z0, b, spread = np.random.default_rng(0), 2.5, 1.1, math.radians(5)
    variance = b**2 * math.log(2) / 8
    z = np.exp(math.log(z0) + variance + math.sqrt(variance) * rng.standard_normal(200_000))
    score = (log_frequency(z, z0 + H, b) - log_frequency(z, z0 - H, b)) / (2 * H)
    theta = rng.vonmises(0, 1 / (4 * spread**2), 200_000) / 2
    of_spread = (log_orientation(theta, 0, spread + H * spread) - log_orientation(theta, 0, spread * (1 - H))) / (
        2 * H * spread
    )
    for scores, closed in (
        (score, gaussian_texture.frequency_information(z0, b)),
        (of_spread, gaussian_texture.spread_information(spread)),
    ):
        squares = scores**2
        assert abs(squares.mean() - float(closed)) < 3 * squares.std() / math.sqrt(len(squares))


def test_known_values() -> None:
    assert float(gaussian_texture.frequency_information(2.5, 1.1)) == pytest.approx(1.5262, abs=5e-5)
    assert float(gaussian_texture.bandwidth_information(1.1)) == pytest.approx(1.9995, abs=5e-5)
    assert float(gaussian_texture.spread_information(math.radians(5))) == pytest.approx(266.819894, abs=5e-7)


def test_the_spread_has_no_jump_where_its_series_begins_and_a_limit_for_small_spreads() -> None:
    at = math.sqrt(1 / (4 * 1e3))
    below, above = gaussian_texture.spread_information([at * (1 - 1e-9), at * (1 + 1e-9)])
    assert float(below) == pytest.approx(float(above), rel=1e-8)
    assert float(gaussian_texture.spread_information(1e-4)) == pytest.approx(2e8, rel=1e-6)  # of a normal density: 2/σ²


def test_the_scale_of_the_frequency_is_logarithmic_and_that_of_the_bandwidth_has_its_integral() -> None:
    levels = np.linspace(1, 5, 13)
    scale = perceptual_scale(lambda z: gaussian_texture.frequency_information(z, 1.1), levels)
    np.testing.assert_allclose(scale.psi_n, np.log(levels) / np.log(5), atol=1e-8)
    a, ends = math.log(2) / 2, np.array([0.4, 2.2])
    root = np.sqrt(a * ends**2 + 2)
    exact = np.diff(root - math.sqrt(2) * np.arctanh(math.sqrt(2) / root))[0]
    assert perceptual_scale(gaussian_texture.bandwidth_information, ends).length == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_parameters_that_are_not_positive_are_refused(bad: float) -> None:
    for call in (
        lambda: gaussian_texture.frequency_information(bad, 1.0),
        lambda: gaussian_texture.bandwidth_information(bad),
        lambda: gaussian_texture.spread_information([1.0, bad]),
        lambda: SpectrumPath(np.ones(4), np.array([1, bad, 1, 1])),
    ):
        with pytest.raises(ValueError, match="must be positive and finite"):
            call()


def spectrum(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A spectrum of a real field: the same at a frequency and at its negative."""
    power = np.abs(np.fft.fft2(rng.standard_normal(shape))) ** 2 / math.prod(shape)
    return power + 0.1


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_information_along_a_path_of_spectra_is_the_curvature_of_the_kl_divergence(t: float) -> None:
    rng, shape = np.random.default_rng(1), (6, 5)
    path = SpectrumPath(spectrum(rng, shape), spectrum(rng, shape), 0.4, -0.3)
    roots = [torch.from_numpy(np.sqrt(f)) for f in (path.start_f, path.end_f)]
    own = torch.from_numpy(path.spectrum(t))

    def kl(s: torch.Tensor) -> torch.Tensor:
        """Of the field at t from that at s: independent normal coefficients, one per frequency."""
        other = (s * roots[1] + (1 - s) * roots[0]) ** 2
        difference = math.sqrt(other.numel()) * (path.end_mean - path.start_mean) * (s - t)
        return 0.5 * (own / other - 1 - torch.log(own / other)).sum() + 0.5 * difference**2 / other[0, 0]

    curvature = torch.autograd.functional.hessian(kl, torch.tensor(t, dtype=torch.float64))
    assert float(path.information(t)) == pytest.approx(float(curvature), rel=1e-8)
    np.testing.assert_allclose(path.spectrum(0.0), path.start_f)
    np.testing.assert_allclose(path.spectrum(1.0), path.end_f)


def covariance(rng: np.random.Generator, d: int) -> np.ndarray:
    factor = rng.standard_normal((d, d))
    return factor @ factor.T + 0.2 * np.eye(d)


@pytest.fixture
def gaussians() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng.standard_normal(4), covariance(rng, 4), rng.standard_normal(4), covariance(rng, 4)


def test_a_path_of_gaussians_has_the_given_ends(gaussians: tuple[np.ndarray, ...]) -> None:
    path = GaussianPath(*gaussians)
    for t, place in ((0.0, 0), (1.0, 2)):
        np.testing.assert_allclose(path.mean(t), gaussians[place], atol=1e-12)
        np.testing.assert_allclose(path.covariance(t), gaussians[place + 1], atol=1e-10)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_information_along_a_path_of_gaussians_is_the_curvature_of_the_kl_divergence(
    t: float, gaussians: tuple[np.ndarray, ...]
) -> None:
    path = GaussianPath(*gaussians)
    # the path is a quadratic polynomial of t: three of its points have all of it
    points = [torch.from_numpy(path.covariance(s)) for s in (0.0, 0.5, 1.0)]
    means = [torch.from_numpy(path.mean(s)) for s in (0.0, 1.0)]
    own, own_mean = torch.from_numpy(path.covariance(t)), torch.from_numpy(path.mean(t))

    def kl(s: torch.Tensor) -> torch.Tensor:
        weights = (1 - s) * (1 - 2 * s), 4 * s * (1 - s), s * (2 * s - 1)
        other = sum(w * point for w, point in zip(weights, points, strict=True))
        difference = (1 - s) * means[0] + s * means[1] - own_mean
        ratio = torch.linalg.solve(other, own)
        return 0.5 * (torch.trace(ratio) - 4 - torch.logdet(ratio) + difference @ torch.linalg.solve(other, difference))

    curvature = torch.autograd.functional.hessian(kl, torch.tensor(t, dtype=torch.float64))
    assert float(path.information(t)) == pytest.approx(float(curvature), rel=1e-8)


def test_no_path_is_shorter_than_the_rao_distance_which_one_feature_reaches() -> None:
    rng = np.random.default_rng(3)
    a, b, zero = covariance(rng, 4), covariance(rng, 4), np.zeros(4)
    length = perceptual_scale(GaussianPath(zero, a, zero, b).information, np.linspace(0, 1, 17)).length
    assert length >= rao_distance(a, b)
    one = perceptual_scale(GaussianPath([0], [[1.0]], [0], [[9.0]]).information, np.linspace(0, 1, 17)).length
    assert one == pytest.approx(rao_distance([[1.0]], [[9.0]]), rel=1e-10)
    assert one == pytest.approx(math.log(9) / math.sqrt(2), rel=1e-10)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([[1.0, 2.0], [0.0, 1.0]], "symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], "not positive definite"),
        ([[np.nan, 0.0], [0.0, 1.0]], "finite"),
        ([[1.0]], "different numbers of features"),
    ],
)
def test_a_covariance_that_cannot_be_one_is_refused(bad: list[list[float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GaussianPath([0, 0], bad, [0, 0], np.eye(2))
