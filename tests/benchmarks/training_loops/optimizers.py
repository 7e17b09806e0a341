"""AdamW and FAdam with equal tuning: digits from the start, and a trained network on images turned by a quarter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.statistics.paired_bootstrap import paired_difference
from npeff.training import FAdam
from torch import Tensor, nn

from training_loops.digits import BATCH, Part, convolutional, diagonal_fisher, losses, parts, train
from training_loops.kept import kept

RATES, DECAYS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), (0.01, 0.1)
FEW_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
INITIAL_STEPS = (10, 100)
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
EPOCHS, FEW, FEW_EPOCHS = 12, 100, 20

Make = Callable[[nn.Module, dict[str, float]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer with its 12 trials."""

    name: str
    make: Make
    trials: list[dict[str, float]]


def from_the_start(other: type | None, folder: Path) -> dict[str, Any]:
    """Train the network of the digits with each method."""
    training, validation, test = parts()
    trials = [{"lr": lr, "weight_decay": decay} for lr, decay in itertools.product(RATES, DECAYS)]
    methods = [
        Method("AdamW", lambda model, o: torch.optim.AdamW(model.parameters(), **o), trials),
        Method("FAdam", lambda model, o: FAdam(model.parameters(), **o), trials),
        Method(
            "FAdam, debiased momentum", lambda model, o: FAdam(model.parameters(), debias_momentum=True, **o), trials
        ),
    ]
    if other is not None:
        methods.append(Method("FAdam of pytorch_optimizer", lambda model, o: other(model.parameters(), **o), trials))

    def trained(method: Method, options: dict[str, float], seed: int, on: Part) -> Tensor:
        model = convolutional(seed)
        optimizer = method.make(model, options)
        return torch.stack(train(model, training, optimizer, EPOCHS, seed, after_epoch=lambda: losses(model, on)))

    return compared(methods, trained, validation, test, folder)


def fine_tuned(folder: Path) -> dict[str, Any]:
    """Adapt a trained network to turned images, of which there are few."""
    training, validation, test = parts()
    few = training.some(torch.arange(FEW)).turned()
    before = convolutional(0)
    train(before, training, torch.optim.AdamW(before.parameters(), lr=4e-3), EPOCHS, 0)
    fisher, weights = diagonal_fisher(before, training), before.state_dict()
    trials = [{"lr": lr, "weight_decay": decay} for lr, decay in itertools.product(FEW_RATES, DECAYS)]
    with_steps = [{"lr": lr, "initial_steps": steps} for lr, steps in itertools.product(FEW_RATES, INITIAL_STEPS)]

    def initial(model: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
        named = model.named_parameters()
        return FAdam(named, initial_fisher=fisher, batch_size=BATCH, weight_decay=0.01, **options)

    methods = [
        Method("AdamW", lambda model, o: torch.optim.AdamW(model.parameters(), **o), trials),
        Method("FAdam", lambda model, o: FAdam(model.parameters(), **o), trials),
        Method("FAdam, initial Fisher", initial, with_steps),
    ]

    def trained(method: Method, options: dict[str, float], seed: int, on: Part) -> Tensor:
        model = convolutional(0)
        model.load_state_dict(weights)
        optimizer = method.make(model, options)
        return torch.stack(train(model, few, optimizer, FEW_EPOCHS, seed, after_epoch=lambda: losses(model, on)))

    return compared(methods, trained, validation.turned(), test.turned(), folder)


def compared(
    methods: list[Method],
    trained: Callable[[Method, dict[str, float], int, Part], Tensor],
    validation: Part,
    test: Part,
    folder: Path,
) -> dict[str, Any]:
    """Choose the options of each method on the validation part, and measure the last loss on the test part.

    Args:
        methods: The methods.
        trained: Trains with a method, its options and a seed. Returns the losses of a part, (epoch, example).
        validation: The part to choose on.
        test: The part to measure on.
        folder: Folder of the losses of every training, from which an interrupted benchmark continues.
    """

    def losses_of(method: Method, options: dict[str, float], seed: int, on: str) -> np.ndarray:
        part = validation if on == "validation" else test
        name = f"{method.name} {options} {seed} {on}"
        return kept(folder, name, lambda: trained(method, options, seed, part).numpy())

    found: dict[str, Any] = {}
    last: dict[str, np.ndarray] = {}
    for method in methods:
        scores = []
        for options in method.trials:
            scores.append(np.mean([losses_of(method, options, seed, "validation")[-1] for seed in TUNING_SEEDS]))
        options, rates = method.trials[int(np.nanargmin(scores))], sorted(trial["lr"] for trial in method.trials)
        curves = np.stack([losses_of(method, options, seed, "test") for seed in SEEDS]).astype(float)
        last[method.name] = curves[:, -1]  # of seed, epoch, example
        found[method.name] = {
            "options": options,
            "at_the_edge": options["lr"] in (rates[0], rates[-1]),
            "loss": float(curves[:, -1].mean()),
            "loss_of_seeds": curves[:, -1].mean(1).tolist(),
            "curve": curves.mean((0, 2)).tolist(),
            "low": curves.mean(2).min(0).tolist(),
            "high": curves.mean(2).max(0).tolist(),
        }
    examples = np.tile(np.arange(len(test.images)), len(SEEDS))
    for name, values in last.items():
        interval = paired_difference(values.ravel(), last["AdamW"].ravel(), examples)
        found[name]["difference"] = [interval.mean, interval.low, interval.high]
        found[name]["difference_of_seeds"] = (values - last["AdamW"]).mean(1).tolist()
    return found
