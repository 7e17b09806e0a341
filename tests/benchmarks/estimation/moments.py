"""The network of the task `digits` at three moments of its training, and its dense Fisher matrix by autograd.

Legend: N examples, C classes, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from training_loops.digits import Part, convolutional, correct, losses, parts, train

N, EPOCHS, LR = 100, 40, 4e-3
"""The Fishers are means over the first N training images."""


@dataclass(frozen=True)
class Moment:
    """A network, and how far it is trained."""

    name: str
    model: nn.Module
    epochs: int
    loss: float
    accuracy: float
    """Mean loss of the training images, and share of right predictions."""

    @property
    def images(self) -> Part:
        return parts()[0].some(torch.arange(N))


def moments(seed: int) -> Iterator[Moment]:
    """Yield the network at initialization, half-trained and converged.

    Half-trained: the first epoch whose mean training loss is below half of that at initialization. Converged: after
    all epochs.
    """
    training = parts()[0]
    model = convolutional(seed)
    initial = float(losses(model, training).mean())
    yield _moment("initialization", model, training, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    half = False
    for epoch in range(EPOCHS):
        train(model, training, optimizer, 1, 1000 * seed + epoch)
        if not half and float(losses(model, training).mean()) < initial / 2:
            half = True
            yield _moment("half-trained", model, training, epoch + 1)
    yield _moment("converged", model, training, EPOCHS)


def _moment(name: str, model: nn.Module, training: Part, epochs: int) -> Moment:
    return Moment(name, model, epochs, float(losses(model, training).mean()), float(correct(model, training).mean()))


def dense_rows(moment: Moment) -> Tensor:
    """Return rows B (N·C, P), float64, with Bᵀ B = (1/N) Σ Jᵀ (diag p − p pᵀ) J, from Jacobians by autograd.

    Nothing of the package is used. The root of diag p − p pᵀ is that of its eigendecomposition.
    """
    model, images = moment.model, moment.images.images
    parameters = {name: value.detach().double() for name, value in model.named_parameters()}

    def logits(values: dict[str, Tensor], image: Tensor) -> Tensor:
        found: Tensor = functional_call(model, values, (image[None],))[0]
        return found

    rows = []
    for part in images.double().split(50):
        jacobians = vmap(jacrev(logits), (None, 0))(parameters, part)
        jacobian_nCP = torch.cat([jacobians[name].flatten(2) for name in parameters], 2)
        p_nC = vmap(logits, (None, 0))(parameters, part).softmax(1)
        values_nC, vectors_nCC = torch.linalg.eigh(p_nC.diag_embed() - p_nC[:, :, None] * p_nC[:, None])
        root_nCC = values_nC.clamp_min(0).sqrt()[:, :, None] * vectors_nCC.mT
        rows.append((root_nCC @ jacobian_nCP).flatten(0, 1))
    return torch.cat(rows) / len(images) ** 0.5
