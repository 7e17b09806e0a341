"""The spectrum of an image, and the mean of scales."""

from __future__ import annotations

import numpy as np
import pytest
from npeff.perception.image_spectrum import image_spectrum
from npeff.perception.scales import mean_scale


def test_the_spectrum_of_a_grating_is_around_its_frequency() -> None:
    columns = np.arange(16)
    image = np.tile(3 + np.cos(2 * np.pi * 4 * columns / 16), (16, 1))
    found = image_spectrum(image)
    assert np.unravel_index(found.argmax(), found.shape)[1] in (4, 12)
    assert (found > 0).all()
    np.testing.assert_allclose(image_spectrum(np.stack([image, image])), 2 * found)
    np.testing.assert_allclose(image_spectrum(image + 7), found, rtol=1e-6, atol=1e-12)


def test_the_spectrum_of_white_noise_is_flat_and_has_its_variance() -> None:
    found = image_spectrum(np.random.default_rng(0).standard_normal((64, 64)))
    assert found.mean() == pytest.approx(1, abs=0.05)
    assert found.std() < 0.4


@pytest.mark.parametrize("image", [np.ones((4, 4)), np.full((4, 4), np.nan), np.ones(4)])
def test_what_has_no_spectrum_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image"):
        image_spectrum(image)


def test_the_mean_of_scales_has_intervals_over_the_scales() -> None:
    s = [0.0, 0.5, 1.0]
    found = mean_scale([(s, [0.0, 0.4, 1.0]), (s, [0.0, 0.6, 1.0])], 5, 0.9, n_draws=200)
    np.testing.assert_allclose(found.psi_n, [0, 0.25, 0.5, 0.75, 1])
    assert (found.low_n[2], found.high_n[2]) == (0.4, 0.6)
    assert (found.low_n <= found.psi_n).all()
    assert (found.psi_n <= found.high_n).all()
