"""The digits in three parts, two networks, a training loop, and diagonal Fishers.

Legend: N examples, C classes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from npeff.fisher.diagonal import diagonal_sum
from npeff.gradients import GradientCollector, LabelSpec, select_parameters
from sklearn.datasets import load_digits
from torch import Tensor, nn

TRAIN, VALIDATION, BATCH = 597, 300, 32


@dataclass(frozen=True)
class Part:
    """Images (N, 1, 8, 8), from 0 to 1, or other inputs, and their classes."""

    images: Tensor
    classes: Tensor

    def turned(self) -> Part:
        """The same images, by a quarter."""
        return Part(self.images.rot90(1, (2, 3)), self.classes)

    def permuted(self, order: Tensor) -> Part:
        """The same images as vectors, in another order of the pixels."""
        return Part(self.images.flatten(1)[:, order], self.classes)

    def some(self, which: Tensor) -> Part:
        return Part(self.images[which], self.classes[which])


@functools.cache
def parts() -> tuple[Part, Part, Part]:
    """Training, validation and test images. The split is the same for all seeds."""
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    whole = Part(torch.from_numpy(images[order] / 16).float().reshape(-1, 1, 8, 8), torch.from_numpy(classes[order]))
    ends = (0, TRAIN, TRAIN + VALIDATION, len(images))
    train, validation, test = (whole.some(torch.arange(a, b)) for a, b in itertools.pairwise(ends))
    return train, validation, test


def convolutional(seed: int) -> nn.Module:
    """The network of the task ``digits``: 9,802 parameters."""
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
    )


def layered(seed: int) -> nn.Module:
    """64-100-100-10: 17,610 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def train(
    model: nn.Module,
    part: Part,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    seed: int,
    batch_size: int = BATCH,
    more: Callable[[], Tensor] | None = None,
    after_epoch: Callable[[], Any] | None = None,
) -> list[Any]:
    """Train on the cross entropy, plus `more`. Returns what `after_epoch` returned."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        for batch in torch.randperm(len(part.images), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(part.images[batch]), part.classes[batch])
            if more is not None:
                loss = loss + more()
            loss.backward()
            optimizer.step()
        if after_epoch is not None:
            found.append(after_epoch())
    return found


@torch.no_grad()
def losses(model: nn.Module, part: Part) -> Tensor:
    """The cross entropy of each example (N,)."""
    return nn.functional.cross_entropy(model(part.images), part.classes, reduction="none")


@torch.no_grad()
def correct(model: nn.Module, part: Part) -> Tensor:
    """Whether each prediction is right (N,)."""
    return (model(part.images).argmax(1) == part.classes).double()


def diagonal_fisher(model: nn.Module, part: Part, kind: Any = "exact") -> dict[str, Tensor]:
    """The mean diagonal Fisher over the examples, as `npeff fishers` computes it."""
    collector = GradientCollector(
        model, lambda network, images: network(images), select_parameters(model), LabelSpec(kind)
    )
    total: dict[str, Tensor] = {}
    for rows in torch.arange(len(part.images)).split(200):
        found = collector.collect(part.images[rows], rows.tolist(), part.classes[rows])
        weights_1B = torch.full((1, len(rows)), 1 / len(part.images), dtype=torch.float64)
        total = diagonal_sum(found.contributions, found.labels.scales_B, weights_1B, total)
    return {name: values[0].float() for name, values in total.items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}
