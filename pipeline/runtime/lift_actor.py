"""Stage 3, first half, on a worker: components in the sketch become directions in parameter space.

One task is a block of components: one pass over the examples that they were fitted on, in which every Fisher row is
formed once per parameter and added to all directions of the block. Blocks need nothing from each other, so a finished
direction is written where it stays, and a crash costs the blocks in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.fisher import GradientCollector, LabelSpec, SketchSpec, make_sketch
from pipeline.runtime.fitted_examples import FittedExamples
from pipeline.runtime.model import ModelSpec
from pipeline.store import DirectionStore, FisherStore, open_factorization, read_json, write_json_atomically
from pipeline.verification import accumulate_directions, cosine, lift_weights, zero_directions


@dataclass(frozen=True)
class LiftPaths:
    factorization: Path
    directions: Path
    results: Path
    """Folder of one JSON file per finished component."""


class LiftWorker:
    """Lifts blocks of components, one call each."""

    def __init__(
        self,
        model: ModelSpec,
        labels: LabelSpec,
        sketch: SketchSpec,
        examples: FittedExamples,
        paths: LiftPaths,
        checksums: dict[int, str],
        batch_size: int,
    ) -> None:
        self._loaded = model.load()
        self._collector = GradientCollector(self._loaded.model, self._loaded.logits, self._loaded.layout, labels)
        self._sketch = make_sketch(sketch, self._loaded.layout)
        self._fishers = FisherStore.open(examples.fishers)
        self._directions = DirectionStore.open(paths.directions)
        factorization = open_factorization(paths.factorization)
        self._components_KD = torch.from_numpy(factorization.read_components())
        self._coefficients_NK = torch.from_numpy(factorization.read_coefficients())
        splits, weights_N = examples.read()
        self._fit_N = torch.from_numpy(splits.fit_N)
        self._coefficients_NK[~self._fit_N] = 0.0
        self._weighted_NK = self._coefficients_NK * torch.from_numpy(weights_N)[:, None]
        self._paths, self._checksums, self._batch_size = paths, checksums, batch_size

    def lift(self, block: tuple[int, ...]) -> list[dict[str, Any]]:
        """Write these components' unit directions; per component, what is worth knowing of its direction.

        Those that are written already, by a worker that was lost before it had done them all, stay.
        """
        files = {component: self._result(component) for component in block}
        facts = {component: read_json(file) for component, file in files.items() if file.exists()}
        missing = tuple(component for component in block if component not in facts)
        facts |= self._lift(missing) if missing else {}
        return [facts[component] for component in block]

    def _lift(self, block: tuple[int, ...]) -> dict[int, dict[str, Any]]:
        directions = zero_directions(self._loaded.layout, len(block), self._loaded.device)
        gram_KK = self._coefficients_NK.double().T @ self._weighted_NK
        for shard, checksum in sorted(self._checksums.items()):
            start, stop = self._fishers.plan.bounds(shard)
            arrays = self._fishers.read_shard(shard, checksum)
            weights_kNR = lift_weights(
                torch.from_numpy(arrays["factors"]),
                self._weighted_NK[start:stop],
                self._components_KD,
                gram_KK,
                block,
                torch.from_numpy(arrays["frobenius_norms"]),
            )
            used = (start + weights_kNR.abs().amax(dim=(0, 2)).nonzero()[:, 0]).tolist()
            for examples in self._batches(range(start, stop), used):
                batch = self._loaded.batch(examples)
                weights_kBR = weights_kNR[:, torch.tensor(examples) - start]
                targets = self._loaded.targets(batch, examples)
                accumulate_directions(self._collector, batch, weights_kBR, directions, examples, targets)
        facts = {}
        for position, component in enumerate(block):
            direction = {name: tensor[position] for name, tensor in directions.items()}
            facts[component] = self._write(component, direction, self._cosine(component, direction))
        return facts

    def _batches(self, shard: range, used: list[int]) -> list[list[int]]:
        """Batches of a shard with the examples that are used.

        Where labels are drawn they are those that the Fishers were computed in: with other padding a logit could round
        to another draw.
        """
        if self._collector.labels.kind != "sampled":
            return self._loaded.batches(used, self._batch_size)
        batches = self._loaded.batches(shard, self._batch_size)
        return [examples for examples in batches if not set(used).isdisjoint(examples)]

    def _cosine(self, component: int, direction: Mapping[str, Tensor]) -> float:
        """Of the component and the direction, sketched again."""
        sketched_D = self._sketch.apply_dense({name: tensor[None] for name, tensor in direction.items()})[0]
        return cosine(sketched_D, self._components_KD[component])

    def _write(self, component: int, direction: Mapping[str, Tensor], cosine: float) -> dict[str, Any]:
        squares = {name: float(tensor.double().square().sum()) for name, tensor in direction.items()}
        total = sum(squares.values())
        unit = {name: tensor / total**0.5 if total > 0 else tensor for name, tensor in direction.items()}
        dtype: torch.dtype = getattr(torch, self._directions.dtype)  # torch rounds much faster than numpy does
        self._directions.write(component, {name: tensor.to(dtype).cpu().numpy() for name, tensor in unit.items()})
        facts = {
            "component": component,
            "cosine": cosine,
            "energy": {name: square / total if total > 0 else 0.0 for name, square in squares.items()},
        }
        write_json_atomically(self._result(component), facts)
        return facts

    def _result(self, component: int) -> Path:
        return self._paths.results / f"{component:05d}.json"
