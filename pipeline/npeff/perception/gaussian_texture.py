"""Fisher information of Gaussian textures about their parameters.

The power spectrum of a Gaussian texture is read as the density of the spatial frequency z and the orientation θ of its
elements: log-normal in z with mode z₀ and bandwidth b (in octaves), and von Mises in 2θ with spread σ_θ (in radians).
With σ² = b² ln 2 / 8 and κ = 1/(4 σ_θ²), the information of one element about each parameter has a closed form.

Source: Vacher & Mamassian 2024, section 2.3 and appendix. The closed forms are those of the log-normal and von Mises
distributions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

_ANGLES = 8193
"""Angles at which the distribution of orientations is tabulated."""
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


def element_frequencies(frequency: ArrayLike, bandwidth: ArrayLike, normal: ArrayLike) -> NDArray[np.float64]:
    """Return spatial frequencies of elements, as a smooth function of the parameters for given noise.

    Args:
        frequency: Mode z₀ of the spatial frequency, positive.
        bandwidth: Bandwidth b in octaves, positive.
        normal: Standard normal noise of each element.
    """
    variance = math.log(2) / 8 * _positive("bandwidth", bandwidth) ** 2
    exponent = variance + np.sqrt(variance) * np.asarray(normal, np.float64)
    frequencies: NDArray[np.float64] = _positive("frequency", frequency) * np.exp(exponent)
    return frequencies


def element_orientations(spread: float, uniform: ArrayLike) -> NDArray[np.float64]:
    """Return orientations of elements in radians, around 0, as a smooth function of the spread for given noise.

    Args:
        spread: Spread σ_θ of the orientation in radians, positive.
        uniform: Uniform noise from 0 to 1 of each element.
    """
    doubled, cumulative = _doubled_angles(1 / (4 * float(_positive("spread", spread)) ** 2))
    return np.asarray(np.interp(np.asarray(uniform, np.float64), cumulative, doubled)) / 2


@functools.lru_cache(maxsize=8)
def _doubled_angles(kappa: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return angles from −π to π, and the cumulative von Mises distribution there."""
    doubled = np.linspace(-np.pi, np.pi, _ANGLES)
    density = np.exp(kappa * (np.cos(doubled) - 1))
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return doubled, cumulative / cumulative[-1]


def texture_spectrum(size: int, frequency: float, bandwidth: float, spread: float) -> NDArray[np.float64]:
    """Return the power spectrum of a Gaussian texture with pixels of variance 1, with the frequency 0 first.

    Args:
        size: Width and height of the image in pixels.
        frequency: Mode z₀ of the spatial frequency in cycles per image.
        bandwidth: Bandwidth b in octaves.
        spread: Spread σ_θ of the orientation in radians.
    """
    axis = np.fft.fftfreq(size) * size
    vertical, horizontal = np.meshgrid(axis, axis, indexing="ij")
    radius, angle = np.hypot(vertical, horizontal), np.arctan2(vertical, horizontal)
    variance, kappa = math.log(2) / 8 * bandwidth**2, 1 / (4 * spread**2)
    radius[0, 0] = 1.0
    exponent = -((np.log(radius / frequency) - variance) ** 2) / (2 * variance) + kappa * (np.cos(2 * angle) - 1)
    density: NDArray[np.float64] = np.exp(exponent) / radius**2  # per frequency and orientation, and per area
    density[0, 0] = 0.0
    return density * float(size**2 / density.sum())


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
