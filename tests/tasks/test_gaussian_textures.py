"""Textures have the spectrum, the labels and the information that their parameter gives them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from npeff.input_fisher.path import fisher_path
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.perception.gaussian_texture import (
    element_frequencies,
    element_orientations,
    frequency_information,
    spread_information,
    texture_spectrum,
)
from npeff.stages.scale.curves import Curves
from npeff.stages.scale.other_spaces import of_stimulus
from npeff.tasks import TaskError, load_task

SMALL = {"size": 16, "n_examples": 30, "train_examples": 60, "epochs": 1, "bins": 4}


def examples(**options: Any) -> Any:
    return load_task("gaussian-textures", SMALL | options).examples(Path())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    spec = ModelSpec("gaussian-textures", dict(SMALL), tmp_path_factory.mktemp("task") / "task", ("*",), (), "cpu")
    spec.prepare()
    return spec.load()


@pytest.mark.parametrize("elements", [4, None])
def test_images_have_unit_variance_and_the_spectrum_of_their_level(elements: int | None) -> None:
    shown = examples(elements=elements, noise=1e-6, n_examples=200)
    images = shown.stimulus("z0", [0.25] * 200, range(200))[:, 0].double().numpy()
    assert images.std() == pytest.approx(1, abs=0.05)
    power = (np.abs(np.fft.fft2(images, norm="ortho")) ** 2).mean(0)
    expected = texture_spectrum(16, 3.5, 1.1, math.radians(30))
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(16) * 16, np.fft.fftfreq(16) * 16))
    shares = [(spectrum * ((radius > 2) & (radius < 6))).sum() / 256 for spectrum in (power, expected)]
    assert shares[0] == pytest.approx(shares[1], abs=0.06)


def test_labels_are_the_intervals_of_the_level() -> None:
    table = examples().table()
    levels = np.array(table["z0"].to_pylist())
    assert table["label"].to_pylist() == np.floor((levels - 2) / 6 * 4).astype(int).tolist()
    assert examples().class_names[0] == "2 to 3.5"


def test_a_stimulus_at_the_level_of_an_example_is_the_example() -> None:
    shown = examples()
    at = (np.array(shown.table()["z0"].to_pylist()) - 2) / 6
    torch.testing.assert_close(shown.stimulus("z0", at[:5].tolist(), range(5)), shown.batch(range(5)))
    assert shown.stimulus("b_z", [0.0], [0]) is None
    assert shown.stimulus_information("b_z", [0.0]) is None


def test_elements_are_drawn_from_the_distributions_of_the_closed_forms() -> None:
    generator = np.random.default_rng(0)
    normal, uniform = generator.standard_normal(200_000), generator.random(200_000)
    z = element_frequencies(3.0, 1.1, normal)
    variance = 1.1**2 * math.log(2) / 8
    score = (np.log(z / 3.0) - variance) / (variance * 3.0)  # the derivative of log p with respect to the mode
    assert score.mean() == pytest.approx(0, abs=4 * score.std() / math.sqrt(len(z)))
    assert score.var() == pytest.approx(float(frequency_information(3.0, 1.1)), rel=0.02)
    spread = 0.4
    theta, kappa, step = element_orientations(spread, uniform), 1 / (4 * spread**2), 1e-4

    def log_density(sigma: float) -> np.ndarray:
        grid = np.linspace(-math.pi, math.pi, 4001)
        total = np.trapezoid(np.exp(np.cos(grid) / (4 * sigma**2)), grid)
        return np.cos(2 * theta) / (4 * sigma**2) - math.log(total)

    score = (log_density(spread + step) - log_density(spread - step)) / (2 * step)
    assert kappa > 1
    assert score.mean() == pytest.approx(0, abs=4 * score.std() / math.sqrt(len(theta)))
    assert score.var() == pytest.approx(float(spread_information(spread)), rel=0.03)


def test_the_information_is_that_of_all_elements_in_units_of_s() -> None:
    (found,) = examples(elements=7).stimulus_information("z0", [0.5])
    assert found == pytest.approx(7 * float(frequency_information(5.0, 1.1)) * 6**2)
    (found,) = examples(parameter="sigma_theta").stimulus_information("sigma_theta", [0.0])
    assert found == pytest.approx(4 * float(spread_information(math.radians(5))) * math.radians(55) ** 2)
    (found,) = examples(elements=None, noise=0.5).stimulus_information("z0", [0.5])
    lower, here, higher = (texture_spectrum(16, 5 + d, 1.1, math.radians(30)) for d in (-1e-3, 0, 1e-3))
    assert found == pytest.approx((((higher - lower) / 2e-3 * 6 / (here + 0.25)) ** 2).sum() / 2, rel=1e-4)


def test_the_derivative_of_a_stimulus_is_that_of_small_steps(loaded: LoadedModel) -> None:
    shown, curves = loaded.examples, Curves(loaded, "z0")
    s = np.array([0.0, 0.4, 1.0])
    values, derivatives = curves.of(3, None).points(s)
    stimuli = shown._stimuli  # type: ignore[attr-defined]
    noise = shown._noise.of([3])  # type: ignore[attr-defined]
    for place, at in enumerate(s):
        step, draw = 1e-5, stimuli._sum_of_elements
        expected = (draw(at + step, noise) - draw(at - step, noise)) / (2 * step)
        found = derivatives[place, :, 0].view(16, 16).double().numpy()
        np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    torch.testing.assert_close(values[1, :, 0].view(16, 16), shown.stimulus("z0", [0.4], [3])[0, 0])


def test_a_path_along_the_parameter_is_bracketed(loaded: LoadedModel) -> None:
    path = fisher_path(Curves(loaded, "z0").of(0, None), tolerance=0.02)
    assert path.tolerance_met
    assert path.distance <= path.chord_sum <= path.length <= 1.02 * path.chord_sum * (1 + 1e-12)
    ideal = of_stimulus(loaded, "z0", 16)
    np.testing.assert_allclose(ideal.psi_n, np.log(1 + 3 * ideal.s_n) / np.log(4), atol=1e-6)
    with pytest.raises(TaskError, match=r"stimulus_information\(\) gives no information about 'b_z'"):
        of_stimulus(loaded, "b_z", 16)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"levels": [3.0, 2.0]}, "levels must be two increasing positive numbers"),
        ({"levels": [1.0]}, "levels must be two increasing positive numbers"),
        ({"elements": 0}, "elements must be at least 1"),
        ({"bins": 1}, "bins must be at least 2"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"elements": None, "noise": 0.0}, "noise must not be negative, and positive for a field"),
        ({"b_z": 0.0}, "b_z must be positive"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(TaskError, match=problem) as found:
        load_task("gaussian-textures", options)
    assert "\n" not in str(found.value)
