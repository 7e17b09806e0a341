"""AdamW and FAdam with equal tuning: digits from the start, and a trained network on images turned by a quarter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from npeff.statistics.paired_bootstrap import paired_difference
from npeff.training import FAdam
from torch import Tensor, nn

from training_loops.digits import BATCH, Part, convolutional, diagonal_fisher, losses, parts, train

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


def from_the_start(other: type | None) -> dict[str, Any]:
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

    return _compared(methods, trained, validation, test)


def fine_tuned() -> dict[str, Any]:
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

    return _compared(methods, trained, validation.turned(), test.turned())


def _compared(
    methods: list[Method],
    trained: Callable[[Method, dict[str, float], int, Part], Tensor],
    validation: Part,
    test: Part,
) -> dict[str, Any]:
    """Choose the options of each method on the validation images, and measure the last loss on the test images."""
    found: dict[str, Any] = {}
    last: dict[str, np.ndarray] = {}
    for method in methods:
        scores = []
        for options in method.trials:
            scores.append(float(np.mean([trained(method, options, s, validation)[-1].mean() for s in TUNING_SEEDS])))
        options, rates = method.trials[int(np.nanargmin(scores))], sorted(trial["lr"] for trial in method.trials)
        curves = torch.stack([trained(method, options, seed, test) for seed in SEEDS]).double()  # seed, epoch, example
        last[method.name] = curves[:, -1].numpy()
        found[method.name] = {
            "options": options,
            "at_the_edge": options["lr"] in (rates[0], rates[-1]),
            "loss": float(curves[:, -1].mean()),
            "loss_of_seeds": curves[:, -1].mean(1).tolist(),
            "curve": curves.mean((0, 2)).tolist(),
            "low": curves.mean(2).amin(0).tolist(),
            "high": curves.mean(2).amax(0).tolist(),
        }
    images = np.tile(np.arange(len(test.images)), len(SEEDS))
    for name, values in last.items():
        interval = paired_difference(values.ravel(), last["AdamW"].ravel(), images)
        found[name]["difference"] = [interval.mean, interval.low, interval.high]
        found[name]["difference_of_seeds"] = (values - last["AdamW"]).mean(1).tolist()
    return found
