"""Fisher information of Gaussian textures about their parameters.

The power spectrum of a Gaussian texture is read as the density of the spatial frequency z and the orientation θ of its
elements: log-normal in z with mode z₀ and bandwidth b (in octaves), and von Mises in 2θ with spread σ_θ (in radians).
With σ² = b² ln 2 / 8 and κ = 1/(4 σ_θ²), the information of one element about each parameter has a closed form.

Source: Vacher & Mamassian 2024, section 2.3 and appendix. The closed forms are those of the log-normal and von Mises
distributions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

_LARGE_KAPPA = 1e3
"""Above this concentration, the series of A′ is exact to rounding, and its closed form loses digits."""


def frequency_information(frequency: ArrayLike, bandwidth: ArrayLike) -> NDArray[np.float64]:
    """Compute the Fisher information about the mode of the spatial frequency: 1/(σ² z₀²).

    The scale of the frequency is therefore logarithmic (Fechner's law).

    Args:
        frequency: Mode z₀ of the spatial frequency, positive.
        bandwidth: Bandwidth b in octaves, positive.
    """
    z0, b = _positive("frequency", frequency), _positive("bandwidth", bandwidth)
    return 8 / (math.log(2) * b**2 * z0**2)


def bandwidth_information(bandwidth: ArrayLike) -> NDArray[np.float64]:
    """Compute the Fisher information about the bandwidth, with fixed mode: ln 2 / 2 + 2 / b².

    Args:
        bandwidth: Bandwidth b in octaves, positive.
    """
    return math.log(2) / 2 + 2 / _positive("bandwidth", bandwidth) ** 2


def orientation_information(spread: ArrayLike) -> NDArray[np.float64]:
    """Compute the Fisher information about the mean orientation, which does not depend on it: 4 κ A(κ).

    Args:
        spread: Spread σ_θ of the orientation in radians, positive.
    """
    kappa = 1 / (4 * _positive("spread", spread) ** 2)
    return 4 * kappa * _mean_resultant(kappa)


def spread_information(spread: ArrayLike) -> NDArray[np.float64]:
    """Compute the Fisher information about the spread of the orientation: A′(κ) / (4 σ_θ⁶), A′ = 1 − A/κ − A².

    Args:
        spread: Spread σ_θ of the orientation in radians, positive.
    """
    sigma = _positive("spread", spread)
    kappa = 1 / (4 * sigma**2)
    mean = _mean_resultant(kappa)
    closed = 1 - mean / kappa - mean**2
    series = 1 / (2 * kappa**2) + 1 / (4 * kappa**3) + 3 / (8 * kappa**4) + 25 / (32 * kappa**5)
    return np.where(kappa > _LARGE_KAPPA, series, closed) / (4 * sigma**6)


@dataclass(frozen=True)
class SpectrumPath:
    """A path of stationary Gaussian fields between two textures: √f_t = t √B + (1 − t) √A.

    The means are interpolated linearly. Spectra are those of the orthonormal discrete Fourier transform, with all
    frequencies of the real field, and the frequency 0 first.
    """

    start_f: NDArray[np.float64]
    """The spectrum A at t = 0, positive, of any shape."""
    end_f: NDArray[np.float64]
    """The spectrum B at t = 1, positive, of the same shape."""
    start_mean: float = 0.0
    """The mean of the pixels at t = 0."""
    end_mean: float = 0.0
    """The mean of the pixels at t = 1."""

    def __post_init__(self) -> None:
        if self.start_f.shape != self.end_f.shape:
            raise ValueError(f"the spectra have the shapes {self.start_f.shape} and {self.end_f.shape}")
        for spectrum_f in (self.start_f, self.end_f):
            _positive("spectrum", spectrum_f)

    def spectrum(self, t: float) -> NDArray[np.float64]:
        """Return the spectrum at t."""
        return (t * np.sqrt(self.end_f) + (1 - t) * np.sqrt(self.start_f)) ** 2

    def information(self, t: ArrayLike) -> NDArray[np.float64]:
        """Compute the Fisher information about t: n μ′²/f_t(0) + ½ Σ (f_t′/f_t)² (Whittle's likelihood).

        Args:
            t: Positions on the path, of any shape.
        """
        roots_f = np.sqrt(self.start_f), np.sqrt(self.end_f)
        change_f = (roots_f[1] - roots_f[0]).ravel()
        positions = np.asarray(t, np.float64)
        root_tf = np.multiply.outer(positions, change_f) + roots_f[0].ravel()
        of_mean = self.start_f.size * (self.end_mean - self.start_mean) ** 2 / root_tf[..., 0] ** 2
        information: NDArray[np.float64] = of_mean + 2 * np.square(change_f / root_tf).sum(-1)
        return information


def _mean_resultant(kappa: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return A(κ) = I₁(κ)/I₀(κ), the mean resultant length of the von Mises distribution."""
    ratio: NDArray[np.float64] = scipy.special.i1e(kappa) / scipy.special.i0e(kappa)
    return ratio


def _positive(name: str, value: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(value, np.float64)
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{name} must be positive and finite")
    return array
