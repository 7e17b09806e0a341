"""Handwritten digits: a small convolutional network, and scikit-learn images that are not in its training set.

The task needs no download. scikit-learn contains the 1,797 images (8×8 pixels, UCI "Optical Recognition of Handwritten
Digits"). The network is trained once per run from a fixed seed, which takes a few seconds.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn

from npeff.tasks.base import Examples, Task
from npeff.tasks.errors import TaskError
from npeff.tasks.trained_model import train_once, trained_classifier, with_weights

_MODEL_FILE = "digits-model.safetensors"


class DigitsTask(Task):
    """A network that is trained on a random part of the images. The other images are the examples.

    Args:
        seed: Seed of the split, the initial weights and the order of training.
        train_examples: Number of training images. The remaining images are the examples.
        epochs: Number of passes over the training images.
        limit: Use only the first ``limit`` of the remaining images.
    """

    def __init__(self, seed: int = 0, train_examples: int = 597, epochs: int = 12, limit: int | None = None) -> None:
        pixels, targets = images_of_digits()
        if not 10 <= train_examples < len(pixels):
            raise TaskError(f"digits: train_examples must be between 10 and {len(pixels) - 1}, not {train_examples}")
        if epochs < 1:
            raise TaskError(f"digits: epochs must be at least 1, not {epochs}")
        if limit is not None and limit < 0:
            raise TaskError(f"digits: limit must not be negative, not {limit}")
        order = np.random.default_rng(seed).permutation(len(pixels))
        train, rest = order[:train_examples], order[train_examples:][:limit]
        self._train = (pixels[train], targets[train])
        self._examples = _Digits(pixels[rest], targets[rest], rest)
        self._seed, self._epochs = seed, epochs

    def prepare(self, cache: Path) -> None:
        def train() -> nn.Module:
            return trained_classifier(_network(self._seed), *self._train, epochs=self._epochs, seed=self._seed)

        train_once(cache / _MODEL_FILE, train)

    def model(self, cache: Path) -> nn.Module:
        return with_weights(_network(self._seed), cache / _MODEL_FILE)

    def examples(self, cache: Path) -> Examples:
        return self._examples

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits: Tensor = model(batch)
        return logits


class _Digits(Examples):
    class_names = tuple("0123456789")

    def __init__(self, pixels: Tensor, targets: Tensor, positions: np.ndarray) -> None:
        self._pixels, self._targets, self._positions = pixels, targets, positions

    def __len__(self) -> int:
        return len(self._pixels)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._pixels[torch.as_tensor(indices, dtype=torch.int64)]

    def table(self) -> pa.Table:
        return pa.table(
            {
                "id": pa.array([f"digit-{position:04d}" for position in self._positions], pa.string()),
                "label": pa.array(self._targets.tolist(), pa.int64()),
                "image": pa.array([_png(position) for position in self._positions.tolist()], pa.binary()),
                "ink": pa.array(self._pixels.mean((1, 2, 3)).tolist(), pa.float64()),
            }
        )


@functools.cache
def images_of_digits() -> tuple[Tensor, Tensor]:
    """All images (1797, 1, 8, 8), from 0 to 1, and their classes (1797,)."""
    rows = np.loadtxt(_images_file(), delimiter=",", dtype=np.float32)
    pixels = torch.from_numpy(rows[:, :-1] / 16).reshape(-1, 1, 8, 8)
    return pixels, torch.from_numpy(rows[:, -1].astype(np.int64))


def _images_file() -> Path:
    """Return the file that `sklearn.datasets.load_digits` reads: 64 pixels from 0 to 16 and a class per line.

    It is read here because every worker would otherwise import scikit-learn, and with it pandas and scipy.stats, which
    takes longer than its share of the Fishers.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise TaskError(
            "digits: scikit-learn, which contains the images, is not installed: install npeff-pipeline again"
        )
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


@functools.cache
def _png(position: int) -> bytes:
    image, buffer = images_of_digits()[0][position, 0], io.BytesIO()
    Image.fromarray((255 * (1 - image)).round().to(torch.uint8).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        ).eval()
