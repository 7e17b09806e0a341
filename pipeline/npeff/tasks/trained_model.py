"""Models that a task trains itself, once for each run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.adamw import adamw

_BATCH = 32
_ADAMW: dict[str, Any] = {
    "lr": 3e-3,
    "weight_decay": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "amsgrad": False,
    "maximize": False,
    "foreach": False,
}


def trained_classifier(model: nn.Module, inputs: Tensor, targets: Tensor, *, epochs: int, seed: int) -> nn.Module:
    """Train with AdamW on one thread, so that the weights do not depend on the number of cores.

    The functional form of AdamW is used because `torch.optim.Optimizer` imports ``torch._dynamo``, which takes longer
    than the training.

    Args:
        model: The network, with its initial weights.
        inputs: Inputs of the network, examples first.
        targets: Class of each example, int64.
        epochs: Number of passes over the examples.
        seed: Seed of the order of the examples.

    Returns:
        The same network.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters: list[Tensor] = list(model.parameters())
    means, squares = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    steps = [torch.zeros(()) for _ in parameters]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs), generator=generator).split(_BATCH):
                loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
                gradients = list(torch.autograd.grad(loss, parameters))
                with torch.no_grad():
                    adamw(parameters, gradients, means, squares, [], steps, **_ADAMW)
    finally:
        torch.set_num_threads(threads)
    return model


def train_once(file: Path, train: Callable[[], nn.Module]) -> None:
    """Train a model and write its weights to a file, unless the file exists. An interruption leaves no file."""
    if not file.exists():
        temporary = file.with_suffix(".partial")
        save_file(train().state_dict(), temporary)
        os.replace(temporary, file)


def with_weights(model: nn.Module, file: Path) -> nn.Module:
    """Load the weights that `train_once` has written into a model. Returns the model."""
    model.load_state_dict(load_file(file))
    return model
