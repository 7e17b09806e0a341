"""Stage 3, first half, on a worker: components in the sketch become directions in parameter space.

One task is a block of components: one pass over the examples that they were fitted on, in which every Fisher row is
formed once per parameter and added to all directions of the block. Blocks need nothing from each other, so a finished
direction is written where it stays, and a crash costs the blocks in flight.

A polishing step is two such passes: `score` leaves a block's products with all rows, and with all directions, in files;
once those of all components are there, `polish` makes the block's directions anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.fisher import GradientCollector, LabelSpec, SketchSpec, make_sketch
from pipeline.runtime.fitted_examples import FittedExamples
from pipeline.runtime.model import ModelSpec
from pipeline.store import (
    DirectionStore,
    FisherStore,
    open_factorization,
    read_json,
    write_file_atomically,
    write_json_atomically,
)
from pipeline.verification import (
    accumulate_directions,
    cosine,
    inner_product,
    lift_weights,
    polish_weights,
    row_products,
    zero_directions,
)


@dataclass(frozen=True)
class LiftPaths:
    factorization: Path
    directions: Path
    results: Path
    """Folder of one JSON file per finished component."""

    def scores_file(self, step: int, component: int) -> Path:
        """Of a component's direction before that step of polishing."""
        return self.results / "polish" / f"{step:03d}" / f"{component:05d}.safetensors"


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
        self._gram_KK = self._coefficients_NK.double().T @ self._weighted_NK
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

    def score(self, request: tuple[int, tuple[int, ...]]) -> None:
        """Products of a block's directions with the rows of all examples, and with all directions, for a step."""
        step, block = request
        missing = [component for component in block if not self._paths.scores_file(step, component).exists()]
        if not missing:
            return
        own = [self._unit_direction(component) for component in missing]
        gram_kK = torch.zeros(len(missing), len(self._components_KD), dtype=torch.float64)
        for other in range(len(self._components_KD)):
            direction = self._unit_direction(other)
            gram_kK[:, other] = torch.tensor([inner_product(each, direction) for each in own], dtype=torch.float64)
        device = self._loaded.device
        directions = {name: torch.stack([each[name] for each in own]).to(device) for name in self._loaded.layout.names}
        del own
        products_kNR = torch.zeros(len(missing), len(self._coefficients_NK), self._fishers.rank, dtype=torch.float64)
        for shard in sorted(self._checksums):
            start, stop = self._fishers.plan.bounds(shard)
            used = (start + self._coefficients_NK[start:stop].any(1).nonzero()[:, 0]).tolist()
            for examples in self._batches(range(start, stop), used):
                batch = self._loaded.batch(examples)
                targets = self._loaded.targets(batch, examples)
                products_BRk = row_products(self._collector, batch, directions, examples, targets)
                products_kNR[:, examples, : products_BRk.shape[1]] = products_BRk.permute(2, 0, 1).cpu()
        for component, products_NR, gram_K in zip(missing, products_kNR, gram_kK, strict=True):
            content = save({"products": products_NR.contiguous(), "gram": gram_K.contiguous()})
            write_file_atomically(self._paths.scores_file(step, component), partial(_put, content=content))

    def polish(self, request: tuple[int, tuple[int, ...]]) -> list[dict[str, Any]]:
        """Write the block's directions after a step; what is worth knowing of them. Those that are there stay."""
        step, block = request
        facts = {component: read_json(self._result(component)) for component in block}
        missing = tuple(component for component in block if facts[component].get("polished", 0) < step)
        if missing:
            files = [self._paths.scores_file(step, component) for component in range(len(self._components_KD))]
            scores = [load(file.read_bytes()) for file in files]
            products_NRK = torch.stack([each["products"] for each in scores], dim=2)
            cosines_KK = torch.stack([each["gram"] for each in scores])

            def weights(examples: slice, arrays: Mapping[str, Tensor]) -> Tensor:
                norms_N, weighted_NK = arrays["frobenius_norms"], self._weighted_NK[examples]
                return polish_weights(products_NRK[examples], weighted_NK, cosines_KK, self._gram_KK, missing, norms_N)

            facts |= self._added_up(missing, weights, step)
        return [facts[component] for component in block]

    def _unit_direction(self, component: int) -> dict[str, Tensor]:
        """As it is stored, at full length again after rounding."""
        stored = {name: torch.from_numpy(array).float() for name, array in self._directions.read(component).items()}
        length = max(inner_product(stored, stored) ** 0.5, 1e-300)
        return {name: tensor / length for name, tensor in stored.items()}

    def _lift(self, block: tuple[int, ...]) -> dict[int, dict[str, Any]]:
        def weights(examples: slice, arrays: Mapping[str, Tensor]) -> Tensor:
            norms_N, weighted_NK = arrays["frobenius_norms"], self._weighted_NK[examples]
            return lift_weights(arrays["factors"], weighted_NK, self._components_KD, self._gram_KK, block, norms_N)

        return self._added_up(block, weights)

    def _added_up(
        self, block: tuple[int, ...], weights_of: Callable[[slice, Mapping[str, Tensor]], Tensor], step: int = 0
    ) -> dict[int, dict[str, Any]]:
        """The directions of a block, from the weights (k, N, R) of each shard's rows."""
        directions = zero_directions(self._loaded.layout, len(block), self._loaded.device)
        for shard, checksum in sorted(self._checksums.items()):
            start, stop = self._fishers.plan.bounds(shard)
            stored = self._fishers.read_shard(shard, checksum)
            weights_kNR = weights_of(
                slice(start, stop), {name: torch.from_numpy(each) for name, each in stored.items()}
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
            facts[component] = self._write(component, direction, self._cosine(component, direction), step)
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

    def _write(self, component: int, direction: Mapping[str, Tensor], cosine: float, step: int = 0) -> dict[str, Any]:
        squares = {name: float(tensor.double().square().sum()) for name, tensor in direction.items()}
        total = sum(squares.values())
        unit = {name: tensor / total**0.5 if total > 0 else tensor for name, tensor in direction.items()}
        dtype: torch.dtype = getattr(torch, self._directions.dtype)  # torch rounds much faster than numpy does
        self._directions.write(component, {name: tensor.to(dtype).cpu().numpy() for name, tensor in unit.items()})
        facts = {
            "component": component,
            "cosine": cosine,
            "polished": step,
            "energy": {name: square / total if total > 0 else 0.0 for name, square in squares.items()},
        }
        write_json_atomically(self._result(component), facts)
        return facts

    def _result(self, component: int) -> Path:
        return self._paths.results / f"{component:05d}.json"


def _put(stream: BinaryIO, content: bytes) -> None:
    stream.write(content)
