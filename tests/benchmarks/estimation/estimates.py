"""The estimators, each as rows whose products are the estimated matrix.

Legend: n rows, N examples, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from npeff.gradients import GradientCollector, LabelSpec, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn
from training_loops.digits import Part

BATCH = 32


@dataclass(frozen=True)
class Estimator:
    """An estimator of the mean Fisher."""

    name: str
    passes: float
    """Backward passes of an example."""
    rows: Callable[[nn.Module, Part, int], Tensor]
    """From a model, examples and a seed: rows (n, P) in float32 whose sum of outer products is the estimate."""
    random: bool = True


def of_labels(spec: Callable[[int], LabelSpec]) -> Callable[[nn.Module, Part, int], Tensor]:
    """The package's rows for a kind of labels, which depends on the seed."""

    def rows(model: nn.Module, part: Part, seed: int) -> Tensor:
        layout = select_parameters(model)
        sketch = make_sketch(SketchSpec("identity"), layout, 0)
        collector = GradientCollector(model, lambda network, images: network(images), layout, spec(seed))
        found = []
        for numbers in torch.arange(len(part.images)).split(100):
            collected = collector.collect(part.images[numbers], numbers.tolist(), part.classes[numbers])
            scales_B11 = collected.labels.scales_B[:, None, None]
            rows_BRP = sketch.apply(collected.contributions) * scales_B11.float()
            found.append(rows_BRP.flatten(0, 1))
        return torch.cat(found) / len(part.images) ** 0.5

    return rows


def batch_means(scale: float) -> Callable[[nn.Module, Part, int], Tensor]:
    """The gradients of the mean loss of mini-batches, times √scale, in a random order of the examples.

    The mean of their squares is the formula of avalanche's EWC plugin (`compute_importances`), which other
    implementations of EWC share.
    """

    def rows(model: nn.Module, part: Part, seed: int) -> Tensor:
        order = torch.randperm(len(part.images), generator=torch.Generator().manual_seed(seed))
        found = []
        for batch in order.split(BATCH):
            loss = nn.functional.cross_entropy(model(part.images[batch]), part.classes[batch])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return torch.stack(found) * (scale / len(found)) ** 0.5

    return rows


ESTIMATORS = [
    Estimator("exact", 9, of_labels(lambda seed: LabelSpec("exact")), random=False),
    *(
        Estimator(f"truncated({rank})", rank, of_labels(lambda seed, r=rank: LabelSpec("truncated", r)), random=False)
        for rank in (1, 2, 4)
    ),
    *(
        Estimator(f"sampled({rank})", rank, of_labels(lambda seed, r=rank: LabelSpec("sampled", r, seed=seed)))
        for rank in (1, 2, 4, 9)
    ),
    Estimator("empirical", 1, of_labels(lambda seed: LabelSpec("empirical")), random=False),
    Estimator("batch mean squared", 1, batch_means(1.0)),
    Estimator(f"batch mean squared × {BATCH}", 1, batch_means(BATCH)),
]
