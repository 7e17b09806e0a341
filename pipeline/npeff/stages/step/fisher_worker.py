"""The worker of natural gradients: products with the gradient rows of some examples, and sums over them.

An item has some shards. The worker passes over the used examples of the shards and computes their rows again, because
rows in all parameters are too large to store. The rows are those of the stored Fishers, divided by √N for N used
examples of all shards.

Shapes: B batch, R rank, k vectors, n rows of the item: R for each used example, in the order of the examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.directions import accumulate_directions, row_products, zero_directions
from npeff.fisher import diagonal_sum
from npeff.gradients import Collected, GradientCollector, LabelSpec
from npeff.models.loaded import ModelSpec
from npeff.stages.shard_batches import batches_of_shard
from npeff.store.fisher_store import FisherStore
from npeff.training import KroneckerSums, kronecker_layers

Direction = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Part:
    """An item: some shards, with the vectors of a product."""

    number: int
    shards: tuple[int, ...]
    directions: Mapping[str, Tensor] | None = None
    """Tensors (k, *shape) by parameter name."""
    weights_kn: Tensor | None = None


class FisherWorker:
    """Computes products with gradient rows.

    Args:
        model: the model of the Fishers.
        labels: the labels of the gradient rows.
        fishers: path of the Fisher store.
        used_N: marks the examples of the mean Fisher.
        batch_size: number of examples in a batch.
    """

    def __init__(
        self, model: ModelSpec, labels: LabelSpec, fishers: Path, used_N: NDArray[np.bool_], batch_size: int
    ) -> None:
        self._loaded, store = model.load(), FisherStore.open(fishers)
        self._rank, self._plan = store.rank, store.plan
        self._collector = GradientCollector(
            self._loaded.model, self._loaded.logits, self._loaded.layout, labels, self._loaded.one
        )
        self._used_N, self._batch_size = torch.from_numpy(used_N), batch_size
        self._scale = float(used_N.sum()) ** -0.5
        dtypes = {self._loaded.model.get_parameter(name).dtype for name in self._loaded.layout.names}
        self._dtype = torch.float64 if torch.float64 in dtypes else torch.float32

    def products(self, part: Part) -> Tensor:
        """Return B v (k, n) of the directions of the item, float64, on the CPU."""
        assert part.directions is not None
        directions = {name: values.to(self._loaded.device, self._dtype) for name, values in part.directions.items()}
        k, places = len(next(iter(directions.values()))), self._places(part.shards)
        found_knR = torch.zeros(k, len(places), self._rank, dtype=torch.float64)
        for examples in self._batches(part.shards):
            batch, targets = self._loaded.with_targets(examples)
            products_BRk = row_products(self._collector, batch, directions, examples, targets).cpu()
            used_B = self._used_N[examples]
            rows = torch.tensor([places[example] for example in examples if example in places])
            found_knR[:, rows, : products_BRk.shape[1]] = products_BRk[used_B].permute(2, 0, 1)
        found_knR *= self._scale
        return found_knR.flatten(1)

    def weighted_sums(self, part: Part) -> Direction:
        """Return Bᵀ w of the weights of the item: tensors (k, *shape) by parameter name, on the CPU."""
        assert part.weights_kn is not None
        places = self._places(part.shards)
        weights_knR = part.weights_kn.double().unflatten(1, (len(places), self._rank)) * self._scale
        sums = zero_directions(self._loaded.layout, len(weights_knR), self._loaded.device, self._dtype)
        for examples in self._batches(part.shards):
            batch, targets = self._loaded.with_targets(examples)
            weights_kBR = torch.zeros(len(weights_knR), len(examples), self._rank, dtype=torch.float64)
            here = [place for place, example in enumerate(examples) if example in places]
            weights_kBR[:, here] = weights_knR[:, [places[examples[place]] for place in here]]
            accumulate_directions(self._collector, batch, weights_kBR, sums, examples, targets)
        return {name: values.cpu() for name, values in sums.items()}

    def diagonal(self, part: Part) -> Direction:
        """Return the sum of the diagonals of the used examples, float64, on the CPU."""
        total = zero_directions(self._loaded.layout, 1, self._loaded.device, torch.float64)
        for collected, used_B in self._collected(part.shards):
            diagonal_sum(collected.contributions, collected.labels.scales_B, used_B[None].double(), total)
        return {name: values[0].cpu() for name, values in total.items()}

    def kronecker(self, part: Part) -> KroneckerSums:
        """Return the sums of the Kronecker factors over the used examples."""
        layout = self._loaded.layout
        sums = KroneckerSums.empty(kronecker_layers(self._loaded.model, layout), layout, self._loaded.device)
        for collected, used_B in self._collected(part.shards):
            sums.add(collected, used_B)
        return sums.cpu()

    def _collected(self, shards: Sequence[int]) -> Iterator[tuple[Collected, Tensor]]:
        for examples in self._batches(shards):
            batch, targets = self._loaded.with_targets(examples)
            yield self._collector.collect(batch, examples, targets), self._used_N[examples].to(self._loaded.device)

    def _places(self, shards: Sequence[int]) -> dict[int, int]:
        """Return the place of each used example among those of the item."""
        used = [example for shard in shards for example in self._used(shard)]
        return {example: place for place, example in enumerate(used)}

    def _used(self, shard: int) -> list[int]:
        start, stop = self._plan.bounds(shard)
        found: list[int] = (start + self._used_N[start:stop].nonzero()[:, 0]).tolist()
        return found

    def _batches(self, shards: Sequence[int]) -> Iterator[list[int]]:
        for shard in shards:
            bounds, used = range(*self._plan.bounds(shard)), self._used(shard)
            yield from batches_of_shard(self._loaded, self._collector.labels, bounds, used, self._batch_size)
