"""Handwritten digits: a small convolutional network, and scikit-learn images that are not in its training set.

The task needs no download. scikit-learn contains the 1,797 images (8×8 pixels, UCI "Optical Recognition of Handwritten
Digits"). The network is trained once per run from a fixed seed, which takes a few seconds.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from npeff.tasks.base import Examples, Task, TaskError

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
        images, labels = load_digits(return_X_y=True)
        if not 10 <= train_examples < len(images):
            raise TaskError(f"digits: train_examples must be between 10 and {len(images) - 1}, not {train_examples}")
        if epochs < 1:
            raise TaskError(f"digits: epochs must be at least 1, not {epochs}")
        if limit is not None and limit < 0:
            raise TaskError(f"digits: limit must not be negative, not {limit}")
        order = np.random.default_rng(seed).permutation(len(images))
        pixels = torch.from_numpy(images.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
        targets = torch.from_numpy(labels.astype(np.int64))
        train, rest = order[:train_examples], order[train_examples:][:limit]
        self._train = (pixels[train], targets[train])
        self._examples = _Digits(pixels[rest], targets[rest], rest)
        self._seed, self._epochs = seed, epochs

    def prepare(self, cache: Path) -> None:
        target = cache / _MODEL_FILE
        if not target.exists():
            model = _train(_network(self._seed), *self._train, epochs=self._epochs, seed=self._seed)
            temporary = target.with_suffix(".partial")
            save_file(model.state_dict(), temporary)
            os.replace(temporary, target)

    def model(self, cache: Path) -> nn.Module:
        model = _network(self._seed)
        model.load_state_dict(load_file(cache / _MODEL_FILE))
        return model

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
                "image": pa.array([_png(image) for image in self._pixels], pa.binary()),
                "ink": pa.array(self._pixels.mean((1, 2, 3)).tolist(), pa.float64()),
            }
        )


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((255 * (1 - image[0])).round().to(torch.uint8).numpy()).save(buffer, format="PNG")
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


def _train(model: nn.Module, pixels: Tensor, targets: Tensor, *, epochs: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels), generator=generator).split(32):
            loss = nn.functional.cross_entropy(model(pixels[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model
