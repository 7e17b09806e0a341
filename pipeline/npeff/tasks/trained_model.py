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
    """Train on the cross entropy, as `trained` does.

    Args:
        model: The network, with its initial weights.
        inputs: Inputs of the network, examples first.
        targets: Class of each example, int64.
        epochs: Number of passes over the examples.
        seed: Seed of the order of the examples.

    Returns:
        The same network.
    """

    def loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(inputs[batch]), targets[batch])

    return trained(model, len(inputs), loss, epochs=epochs, seed=seed)


def trained(
    model: nn.Module,
    n_examples: int,
    loss: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    seed: int,
    learning_rate: float | None = None,
    largest_norm: float | None = None,
) -> nn.Module:
    """Train with AdamW on one thread, so that the weights do not depend on the number of cores.

    The functional form of AdamW is used because `torch.optim.Optimizer` imports ``torch._dynamo``, which takes longer
    than the training.

    Args:
        model: The network, with its initial weights.
        n_examples: Number of training examples.
        loss: Function of the numbers of the examples of a batch, int64, that returns a scalar.
        epochs: Number of passes over the examples.
        seed: Seed of the order of the examples.
        learning_rate: Step size. None: 0.003.
        largest_norm: A gradient with a larger norm is scaled to this norm. None: no gradient is scaled.

    Returns:
        The same network.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters: list[Tensor] = list(model.parameters())
    means, squares = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    steps = [torch.zeros(()) for _ in parameters]
    options = _ADAMW if learning_rate is None else _ADAMW | {"lr": learning_rate}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(epochs):
            for batch in torch.randperm(n_examples, generator=generator).split(_BATCH):
                gradients = list(torch.autograd.grad(loss(batch), parameters))
                with torch.no_grad():
                    if largest_norm is not None:
                        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
                        factor = largest_norm / norm.clamp_min(largest_norm)
                        gradients = [factor * gradient for gradient in gradients]
                    adamw(parameters, gradients, means, squares, [], steps, **options)
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
