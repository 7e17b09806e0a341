"""Textures whose spatial frequency, bandwidth or orientation a network has to tell, with a known ideal observer.

An image is a sum of gratings, the elements of the texture, whose frequencies and orientations are drawn from the
distributions of `npeff.perception.gaussian_texture`. With a fixed number of elements, an image tells as much about the
parameter as that number of independent draws, so that the closed forms of one element predict the scale of an observer.
Without a number, an image is a Gaussian field of the same spectrum, the limit of many elements: there, a window shows
more waves of a higher frequency, and the information is that of the whole field (Whittle's likelihood).

The images need no download. The network is trained once per run from a fixed seed, which takes about ten seconds.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from npeff.perception import gaussian_texture
from npeff.tasks.base import Examples, Task
from npeff.tasks.errors import TaskError
from npeff.tasks.pictures import png
from npeff.tasks.trained_model import train_once, trained_classifier, with_weights

_MODEL_FILE = "gaussian-textures-model.safetensors"
_CHANNELS = 16
_WHITE = 2.5
"""Value of a white pixel in pictures. The standard deviation of the pixels is 1."""
_DIFFERENCE = 1e-4
"""Change of s from which the derivative of a spectrum is computed."""

Parameter = Literal["z0", "b_z", "sigma_theta"]

_LEVELS: dict[str, tuple[float, float]] = {"z0": (2.0, 8.0), "b_z": (0.5, 1.5), "sigma_theta": (5.0, 60.0)}
"""First and last level of each parameter: cycles per image, octaves and degrees."""


@dataclass(frozen=True)
class _Noise:
    """What is random in n images."""

    frequency: NDArray[np.float64]
    orientation: NDArray[np.float64]
    phase: NDArray[np.float64]
    pixels: NDArray[np.float64]
    """(n, size, size): noise of the pixels. For a field, `phase` is white noise of the same shape, and the first two
    are empty."""

    def of(self, indices: Sequence[int]) -> _Noise:
        chosen = np.asarray(indices, np.int64)
        return _Noise(self.frequency[chosen], self.orientation[chosen], self.phase[chosen], self.pixels[chosen])


class GaussianTexturesTask(Task):
    """A network that tells in which of several equal intervals of a parameter a texture is.

    Args:
        parameter: ``z0``, the mode of the spatial frequency; ``b_z``, its bandwidth in octaves; or ``sigma_theta``, the
            spread of the orientation in degrees.
        levels: First and last level of the parameter.
        z0: Spatial frequency in cycles per image, if it is not the parameter.
        b_z: Bandwidth in octaves, if it is not the parameter.
        sigma_theta: Spread of the orientation in degrees, if it is not the parameter.
        elements: Number of elements of an image; None for a Gaussian field.
        noise: Standard deviation of the noise of a pixel. That of the texture is 1.
        size: Width and height of an image in pixels.
        bins: Number of intervals, the classes.
        n_examples: Number of examples.
        train_examples: Number of training images.
        epochs: Number of passes over the training images.
        seed: Seed of the images, the initial weights and the order of training.
    """

    def __init__(
        self,
        parameter: Parameter = "z0",
        levels: Sequence[float] | None = None,
        z0: float = 4.0,
        b_z: float = 1.1,
        sigma_theta: float = 30.0,
        elements: int | None = 4,
        noise: float = 0.1,
        size: int = 32,
        bins: int = 24,
        n_examples: int = 300,
        train_examples: int = 3000,
        epochs: int = 6,
        seed: int = 0,
    ) -> None:
        if parameter not in _LEVELS:
            raise TaskError(f"gaussian-textures: parameter must be one of {', '.join(_LEVELS)}, not {parameter!r}")
        low, high = levels if levels is not None and len(levels) == 2 else _LEVELS[parameter]
        if not 0 < low < high < math.inf or (levels is not None and len(levels) != 2):
            raise TaskError(f"gaussian-textures: levels must be two increasing positive numbers, not {levels}")
        for name, value, least in (
            ("elements", elements, 1),
            ("size", size, 8),
            ("bins", bins, 2),
            ("n_examples", n_examples, 2),
            ("train_examples", train_examples, 10),
            ("epochs", epochs, 1),
        ):
            if value is not None and value < least:
                raise TaskError(f"gaussian-textures: {name} must be at least {least}, not {value}")
        for name, given in (("z0", z0), ("b_z", b_z), ("sigma_theta", sigma_theta)):
            if not 0 < given < math.inf:
                raise TaskError(f"gaussian-textures: {name} must be positive, not {given}")
        if not 0 <= noise < math.inf or (elements is None and noise == 0):
            raise TaskError(f"gaussian-textures: noise must not be negative, and positive for a field, not {noise}")
        fixed = {"z0": z0, "b_z": b_z, "sigma_theta": sigma_theta}
        self._stimuli = _Stimuli(parameter, low, high, fixed, elements, noise, size)
        self._n_examples, self._n_train = n_examples, train_examples
        self._bins, self._epochs, self._seed = bins, epochs, seed

    def prepare(self, cache: Path) -> None:
        def train() -> nn.Module:
            drawn = _Textures(self._stimuli, self._n_train, self._bins, self._seed, "training")
            inputs, targets = drawn.batch(range(len(drawn))), torch.tensor(drawn.labels)
            return trained_classifier(self._network(), inputs, targets, epochs=self._epochs, seed=self._seed)

        train_once(cache / _MODEL_FILE, train)

    def model(self, cache: Path) -> nn.Module:
        return with_weights(self._network(), cache / _MODEL_FILE)

    def examples(self, cache: Path) -> Examples:
        return _Textures(self._stimuli, self._n_examples, self._bins, self._seed, "examples")

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits: Tensor = model(batch)
        return logits

    def _network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return nn.Sequential(
                nn.Conv2d(1, _CHANNELS, 7, padding=3),
                nn.ReLU(),
                nn.Conv2d(_CHANNELS, 2 * _CHANNELS, 5, stride=2, padding=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(2 * _CHANNELS, 32),
                nn.ReLU(),
                nn.Linear(32, self._bins),
            ).eval()


@dataclass(frozen=True)
class _Stimuli:
    """Textures as a function of s, the position of the parameter between its levels."""

    parameter: str
    low: float
    high: float
    fixed: dict[str, float]
    elements: int | None
    noise: float
    size: int

    def level(self, s: float) -> float:
        return self.low + (self.high - self.low) * s

    def draw(self, n: int, generator: np.random.Generator) -> _Noise:
        """Draw what is random in n images."""
        shape = (n, self.size, self.size)
        pixels = self.noise * generator.standard_normal(shape)
        if self.elements is None:
            nothing = np.empty((n, 0))
            return _Noise(nothing, nothing, generator.standard_normal(shape), pixels)
        wanted = (n, self.elements)
        return _Noise(generator.standard_normal(wanted), generator.random(wanted), generator.random(wanted), pixels)

    def images(self, s: Sequence[float], drawn: _Noise) -> Tensor:
        """Return the images (n, 1, size, size) at positions s, as many as there are of `drawn`."""
        image = self._field if self.elements is None else self._sum_of_elements
        made = [image(at, drawn.of([place])) for place, at in enumerate(s)]
        pixels = np.stack(made) + drawn.pixels if made else drawn.pixels
        return torch.from_numpy(pixels.astype(np.float32))[:, None]

    def information(self, s: float) -> float:
        """Return the Fisher information of an image about s."""
        if self.elements is None:
            lower, here, higher = (self._spectrum(at) for at in (s - _DIFFERENCE, s, s + _DIFFERENCE))
            change = (higher - lower) / (2 * _DIFFERENCE)
            return float(np.square(change / (here + self.noise**2)).sum() / 2)
        z0, b_z, spread = self._parameters(s)
        match self.parameter:
            case "z0":
                of_one = gaussian_texture.frequency_information(z0, b_z)
            case "b_z":
                of_one = gaussian_texture.bandwidth_information(b_z)
            case _:
                of_one = gaussian_texture.spread_information(spread) * math.radians(1.0) ** 2
        return float(self.elements * of_one * (self.high - self.low) ** 2)

    def _parameters(self, s: float) -> tuple[float, float, float]:
        """Return the spatial frequency, the bandwidth, and the spread of the orientation in radians."""
        values = self.fixed | {self.parameter: self.level(s)}
        return values["z0"], values["b_z"], math.radians(values["sigma_theta"])

    def _sum_of_elements(self, s: float, drawn: _Noise) -> NDArray[np.float64]:
        z0, b_z, spread = self._parameters(s)
        frequency = gaussian_texture.element_frequencies(z0, b_z, drawn.frequency[0])
        angle = gaussian_texture.element_orientations(spread, drawn.orientation[0])
        axis = np.arange(self.size) / self.size
        vertical = np.exp(2j * np.pi * (np.outer(frequency * np.sin(angle), axis) + drawn.phase[0, :, None]))
        horizontal = np.exp(2j * np.pi * np.outer(frequency * np.cos(angle), axis))
        image: NDArray[np.float64] = (vertical.T @ horizontal).real * math.sqrt(2 / len(frequency))
        return image

    def _field(self, s: float, drawn: _Noise) -> NDArray[np.float64]:
        white = np.fft.fft2(drawn.phase[0], norm="ortho")
        image: NDArray[np.float64] = np.fft.ifft2(np.sqrt(self._spectrum(s)) * white, norm="ortho").real
        return image

    def _spectrum(self, s: float) -> NDArray[np.float64]:
        return gaussian_texture.texture_spectrum(self.size, *self._parameters(s))


class _Textures(Examples):
    """Textures at random levels."""

    def __init__(self, stimuli: _Stimuli, n: int, bins: int, seed: int, part: str) -> None:
        generator = np.random.default_rng([seed, *part.encode()])
        self._stimuli, self._s = stimuli, generator.random(n)
        self._noise = stimuli.draw(n, generator)
        self.labels = np.minimum(bins * self._s, bins - 1).astype(np.int64).tolist()
        edges = [stimuli.level(edge / bins) for edge in range(bins + 1)]
        self.class_names = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]

    def __len__(self) -> int:
        return len(self._s)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._stimuli.images(self._s[list(indices)].tolist(), self._noise.of(indices))

    @functools.cache  # noqa: B019  (the examples live as long as the worker)
    def table(self) -> pa.Table:
        images = self.batch(range(len(self))).permute(0, 2, 3, 1).numpy()
        return pa.table(
            {
                "id": pa.array([f"texture-{number:04d}" for number in range(len(self))], pa.string()),
                "label": pa.array(self.labels, pa.int64()),
                "image": pa.array([png(image, -_WHITE, _WHITE) for image in images], pa.binary()),
                self._stimuli.parameter: pa.array([self._stimuli.level(s) for s in self._s.tolist()], pa.float64()),
            }
        )

    def stimulus(self, parameter: str, s: Sequence[float], indices: Sequence[int]) -> Any | None:
        if parameter != self._stimuli.parameter:
            return None
        return self._stimuli.images(s, self._noise.of(indices))

    def stimulus_information(self, parameter: str, s: Sequence[float]) -> Sequence[float] | None:
        return [self._stimuli.information(at) for at in s] if parameter == self._stimuli.parameter else None
