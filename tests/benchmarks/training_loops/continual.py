"""Five tasks one after another: the digits, with the pixels in another order in each task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from npeff.statistics.paired_bootstrap import paired_difference
from npeff.training import EWC
from torch import Tensor, nn

from training_loops.digits import BATCH, Part, correct, diagonal_fisher, layered, parameters, parts, train

TASKS, EPOCHS, REPLAYED, LR = 5, 15, 50, 1e-3
WEIGHTS = (0.01, 0.1, 1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)

FISHERS: dict[str, Callable[[nn.Module, Part], dict[str, Tensor]]] = {
    "L2": lambda model, part: {name: torch.ones_like(value) for name, value in parameters(model).items()},
    "EWC, exact": diagonal_fisher,
    "EWC, empirical": lambda model, part: diagonal_fisher(model, part, "empirical"),
}


def sequence(method: str, weight: float, seed: int, on: Part) -> tuple[Tensor, Tensor]:
    """Train on all tasks. Returns whether predictions are right after each task and at the end (task, example)."""
    training = parts()[0]
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(1000 * seed + t)) for t in range(TASKS)]
    model, generator = layered(seed), torch.Generator().manual_seed(seed)
    fishers: list[Any] = []
    anchors: list[Any] = []
    kept: list[Part] = []
    after = []
    for number, order in enumerate(orders):
        part = training.permuted(order)
        more = None
        if fishers:
            ewc = EWC(fishers, anchors, weight=weight)
            more = lambda ewc=ewc: ewc.penalty(model)  # noqa: E731
        elif kept:
            memory = Part(torch.cat([p.images for p in kept]), torch.cat([p.classes for p in kept]))
            more = lambda memory=memory: _replay(model, memory, generator)  # noqa: E731
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        train(model, part, optimizer, EPOCHS, seed * TASKS + number, more=more)
        after.append(correct(model, on.permuted(order)))
        if method in FISHERS:
            fishers.append(FISHERS[method](model, part))
            anchors.append(parameters(model))
        elif method == "replay":
            kept.append(part.some(torch.randperm(len(part.images), generator=generator)[:REPLAYED]))
    return torch.stack(after), torch.stack([correct(model, on.permuted(order)) for order in orders])


def _replay(model: nn.Module, memory: Part, generator: torch.Generator) -> Tensor:
    rows = torch.randperm(len(memory.images), generator=generator)[:BATCH]
    return nn.functional.cross_entropy(model(memory.images[rows]), memory.classes[rows])


def compared() -> dict[str, Any]:
    """Choose the weight of each penalty on the validation images, and measure on the test images with other seeds."""
    _, validation, test = parts()
    found: dict[str, Any] = {}
    final: dict[str, np.ndarray] = {}
    for method in ("none", *FISHERS, "replay"):
        weight, scores = 0.0, []
        if method in FISHERS:
            for candidate in WEIGHTS:
                ends = [sequence(method, candidate, seed, validation)[1] for seed in TUNING_SEEDS]
                scores.append(float(torch.stack(ends).mean()))
            weight = WEIGHTS[int(np.argmax(scores))]
        pairs = [sequence(method, weight, seed, test) for seed in SEEDS]
        after, ends = (torch.stack(column) for column in zip(*pairs, strict=True))  # seed, task, example
        final[method] = ends.mean(1).numpy()
        found[method] = {
            "weight": weight,
            "validation": dict(zip(map(str, WEIGHTS), scores, strict=False)),
            "accuracy": float(ends.mean()),
            "accuracy_of_seeds": ends.mean((1, 2)).tolist(),
            "learned": float(after.mean()),
            "forgetting": float((after - ends)[:, :-1].mean()),
        }
        print(method, found[method], flush=True)
    images = np.tile(np.arange(len(test.images)), len(SEEDS))
    for method, values in final.items():
        interval = paired_difference(values.ravel(), final["none"].ravel(), images)
        found[method]["difference"] = [interval.mean, interval.low, interval.high]
    for name, pair in {
        "exact − empirical": ("EWC, exact", "EWC, empirical"),
        "exact − L2": ("EWC, exact", "L2"),
    }.items():
        interval = paired_difference(final[pair[0]].ravel(), final[pair[1]].ravel(), images)
        found[pair[0]][name] = [interval.mean, interval.low, interval.high]
    return found
