"""Models whose batches differ in what the examples do in them, and the errors of their Fishers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from gradients import dense_definition
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn

LENGTHS = (8, 8, 8, 8, 4, 12, 8, 8, 3, 5, 7, 9, 6, 6, 6, 6)
"""The first four texts are equally long; the next four have as many words as if they were."""


class Text(nn.Module):
    """A classifier of padded texts. The classes below differ in what is between the words and the sum over words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids > 0
        logits: Tensor = self.head((self.mixed(self.words(ids), mask) * mask[..., None]).sum(1))
        return logits

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(values))


class Experts(Text):
    """Words go to experts, by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.router = nn.Linear(6, 3)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    found = model(input_ids=ids, attention_mask=ids > 0).logits if hasattr(model, "config") else model(ids)
    return found if isinstance(found, Tensor) else found[0]


def texts(lengths: tuple[int, ...] = LENGTHS) -> Callable[[list[int]], Tensor]:
    generator = torch.Generator().manual_seed(1)
    each = [torch.randint(1, 20, (length,), generator=generator) for length in lengths]
    return lambda places: nn.utils.rnn.pad_sequence([each[place] for place in places], batch_first=True)


def errors(
    model: nn.Module,
    size: int,
    include: list[str] | None = None,
    batch: Callable[[list[int]], Any] | None = None,
    n_examples: int = len(LENGTHS),
) -> Tensor:
    """Relative errors of the Fishers of all examples, against plain autograd for one example at a time in float64.

    The examples are texts unless `batch` is given.
    """
    model = model.to(
        torch.float32 if hasattr(model, "config") else torch.float64
    ).eval()  # grouped products need float32
    batch, layout = batch or texts(), select_parameters(model, include or ["*"])
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    fishers = PerExampleFishers(model, logits_of, layout, sketch, one=lambda number: (batch([number]), None))
    fishers(batch([0, 1]), [0, 1])  # two texts of equal length, as at the inspection of a task
    found = []
    for start in range(0, n_examples, size):
        examples = list(range(start, min(start + size, n_examples)))
        result = fishers(batch(examples), examples)
        found.append(result.factors_BRD.mT @ result.factors_BRD)
    expected = dense_definition.dense_fishers(
        copy.deepcopy(model), logits_of, layout, [batch([n]) for n in range(n_examples)]
    )
    return (torch.cat(found) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
