"""Five tasks one after another: the digits, with the pixels in another order in each task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.statistics.paired_bootstrap import paired_difference
from npeff.training import EWC
from torch import Tensor, nn

from training_loops.digits import BATCH, Part, correct, diagonal_fisher, layered, parameters, parts, train
from training_loops.kept import kept
from training_loops.low_rank import leading_rows, rest_of_diagonal, sketched_fisher

TASKS, EPOCHS, REPLAYED, LR = 5, 15, 50, 1e-3
WEIGHTS = (0.01, 0.1, 1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
MIDDLE = (1.0, 10.0, 30.0, 100.0, 300.0)
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Penalty:
    """A penalty for earlier tasks.

    ``fishers`` returns the Fishers of a task whose quadratic forms are added up, as arguments of `EWC`.
    """

    fishers: Callable[[nn.Module, Part], list[tuple[Any, dict[str, Any]]]]
    options: dict[str, Any] | None = None
    """Of every `EWC`."""
    weights: tuple[float, ...] = WEIGHTS

    def of(self, fishers: list[Any], anchors: list[Any], weight: float) -> list[EWC]:
        """Return the penalties of the tasks so far."""
        found = []
        for column in zip(*fishers, strict=True):
            options = {**(self.options or {}), **column[0][1]}
            found.append(EWC([fisher for fisher, _ in column], anchors, weight=weight, **options))
        return found


def _diagonal(kind: str) -> Callable[[nn.Module, Part], list[tuple[Any, dict[str, Any]]]]:
    return lambda model, part: [(diagonal_fisher(model, part, kind), {})]


def _ones(model: nn.Module, part: Part) -> list[tuple[Any, dict[str, Any]]]:
    return [({name: torch.ones_like(value) for name, value in parameters(model).items()}, {})]


def _leading(model: nn.Module, part: Part) -> list[tuple[Any, dict[str, Any]]]:
    return [(leading_rows(model, part), {"low_rank": True})]


def _leading_and_rest(model: nn.Module, part: Part) -> list[tuple[Any, dict[str, Any]]]:
    rows = leading_rows(model, part)
    return [(rows, {"low_rank": True}), (rest_of_diagonal(diagonal_fisher(model, part), rows), {})]


def _sketched(model: nn.Module, part: Part) -> list[tuple[Any, dict[str, Any]]]:
    return [(sketched_fisher(model, part, 1024), {"low_rank": True})]


PENALTIES = {
    "L2": Penalty(_ones),
    "EWC, exact": Penalty(_diagonal("exact")),
    "EWC, empirical": Penalty(_diagonal("empirical")),
    "EWC, exact, online": Penalty(_diagonal("exact"), {"mode": "online"}, MIDDLE),
    "EWC, low-rank, 100 directions": Penalty(_leading, weights=MIDDLE),
    "EWC, low-rank, 100 directions, and the diagonal of the rest": Penalty(_leading_and_rest, weights=MIDDLE),
    "EWC, low-rank, sketch of 1,024": Penalty(_sketched, weights=MIDDLE),
}


@functools.cache
def _first(method: str, seed: int) -> tuple[dict[str, Tensor], Any, Any]:
    """The network after the first task, which no penalty changes, its generator, and its Fishers."""
    model, generator = layered(seed), torch.Generator().manual_seed(seed)
    part = parts()[0].permuted(_orders(seed)[0])
    train(model, part, torch.optim.Adam(model.parameters(), lr=LR), EPOCHS, seed * TASKS)
    fishers = PENALTIES[method].fishers(model, part) if method in PENALTIES else None
    return parameters(model), generator.get_state(), fishers


def _orders(seed: int) -> list[Tensor]:
    return [torch.randperm(64, generator=torch.Generator().manual_seed(1000 * seed + t)) for t in range(TASKS)]


def sequence(method: str, weight: float, seed: int, on: Part) -> tuple[Tensor, Tensor]:
    """Train on all tasks. Returns whether predictions are right after each task and at the end (task, example)."""
    training, orders = parts()[0], _orders(seed)
    model, generator = layered(seed), torch.Generator().manual_seed(seed)
    fishers: list[Any] = []
    anchors: list[Any] = []
    kept: list[Part] = []
    after = []
    for number, order in enumerate(orders):
        part = training.permuted(order)
        if number == 0:
            values, state, first = _first(method, seed)
            model.load_state_dict(values)
            generator.set_state(state)
        else:
            more = None
            if fishers:
                penalties = PENALTIES[method].of(fishers, anchors, weight)
                more = lambda penalties=penalties: sum(each.penalty(model) for each in penalties)  # noqa: E731
            elif kept:
                memory = Part(torch.cat([p.images for p in kept]), torch.cat([p.classes for p in kept]))
                more = lambda memory=memory: _replay(model, memory, generator)  # noqa: E731
            optimizer = torch.optim.Adam(model.parameters(), lr=LR)
            train(model, part, optimizer, EPOCHS, seed * TASKS + number, more=more)
        after.append(correct(model, on.permuted(order)))
        if method in PENALTIES and number < TASKS - 1:
            fishers.append(first if number == 0 else PENALTIES[method].fishers(model, part))
            anchors.append(parameters(model))
        elif method == "replay":
            kept.append(part.some(torch.randperm(len(part.images), generator=generator)[:REPLAYED]))
    return torch.stack(after), torch.stack([correct(model, on.permuted(order)) for order in orders])


def _replay(model: nn.Module, memory: Part, generator: torch.Generator) -> Tensor:
    rows = torch.randperm(len(memory.images), generator=generator)[:BATCH]
    return nn.functional.cross_entropy(model(memory.images[rows]), memory.classes[rows])


def accuracies(method: str, weight: float, seed: int, on: str, folder: Path) -> np.ndarray:
    """The result of `sequence` on the validation or the test images: (after each task or at the end, task, example)."""
    part = {"validation": parts()[1], "test": parts()[2]}[on]
    name = f"{method} {weight} {seed} {on}"
    return kept(folder, name, lambda: torch.stack(sequence(method, weight, seed, part)).numpy())


def measured(method: str, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Choose the weight of a penalty on the validation images, and measure on the test images with other seeds.

    Returns:
        The results, and the accuracy at the end of each seed and example.
    """
    weight, scores, weights = 0.0, [], PENALTIES[method].weights if method in PENALTIES else ()
    for candidate in weights:
        ends = [accuracies(method, candidate, seed, "validation", folder)[1] for seed in TUNING_SEEDS]
        scores.append(float(np.mean(ends)))
    if scores:
        weight = weights[int(np.argmax(scores))]
    found = np.stack([accuracies(method, weight, seed, "test", folder) for seed in SEEDS])
    after, ends = found[:, 0], found[:, 1]  # seed, task, example
    row = {
        "weight": weight,
        "validation": dict(zip(map(str, weights), scores, strict=True)),
        "accuracy": float(ends.mean()),
        "accuracy_of_seeds": ends.mean((1, 2)).tolist(),
        "learned": float(after.mean()),
        "forgetting": float((after - ends)[:, :-1].mean()),
    }
    print(method, row, flush=True)
    return row, ends.mean(1)


def compared(folder: Path) -> dict[str, Any]:
    """Measure every method, and compare it with no penalty."""
    found, final = {}, {}
    for method in ("none", "replay", *PENALTIES):
        found[method], final[method] = measured(method, folder)
    images = np.tile(np.arange(final["none"].shape[1]), len(SEEDS))
    for method, values in final.items():
        interval = paired_difference(values.ravel(), final["none"].ravel(), images)
        found[method]["difference"] = [interval.mean, interval.low, interval.high]
        exact = paired_difference(values.ravel(), final["EWC, exact"].ravel(), images)
        found[method]["minus_exact"] = [exact.mean, exact.low, exact.high]
    return found
