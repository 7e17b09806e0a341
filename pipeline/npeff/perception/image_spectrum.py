"""Power spectrum of an image, read as the spectrum of a Gaussian texture."""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

_WIDTH = 1.0
"""Standard deviation in bins of the kernel that smooths a periodogram, which has as much noise as signal."""
_FLOOR = 1e-3
"""Smallest value of a spectrum, as a fraction of its mean: a spectrum of a Gaussian field is positive everywhere."""


def image_spectrum(image: ArrayLike) -> NDArray[np.float64]:
    """Estimate the power spectrum of an image, with the frequency 0 first.

    The squared entries of the orthonormal discrete Fourier transform are smoothed over neighbouring frequencies.

    Args:
        image: Pixels (height, width), or (channels, height, width), whose spectra are added.

    Returns:
        The spectrum (height, width), which does not contain the mean of the image.

    Raises:
        ValueError: All pixels of each channel are equal, or a pixel is not finite.
    """
    pixels = np.asarray(image, np.float64)
    if pixels.ndim not in (2, 3) or not np.isfinite(pixels).all():
        raise ValueError("image must have finite pixels (height, width) or (channels, height, width)")
    channels_CHW = pixels.reshape(-1, *pixels.shape[-2:])
    centred_CHW = channels_CHW - channels_CHW.mean((1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centred_CHW, norm="ortho")) ** 2).sum(0)
    mean = float(power.mean())
    if mean <= np.finfo(np.float64).eps * float(np.square(channels_CHW).sum()):
        raise ValueError("image has the same value everywhere, so that it has no spectrum")
    smooth: NDArray[np.float64] = scipy.ndimage.gaussian_filter(power, _WIDTH, mode="wrap")
    return np.maximum(smooth, _FLOOR * mean)
