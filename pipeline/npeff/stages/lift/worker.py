"""The worker of the stage `lift`: compute the components' directions in parameter space.

An item is a block of components. The worker makes one pass over the fitted examples, in which every gradient row is
computed once per parameter and added to all sums of the block. A `LiftRule` defines the sums of each kind of Fisher.
Blocks are independent: finished directions are written to the store, and a crash loses only the blocks in progress. The
last bits of a direction depend on its block, because the shapes of the matrix products differ. If there are more
workers than blocks of the size that memory allows, each block is summed in parts, each over some of the shards
(`add_up`). The sums of the parts are stored in files until all are complete, and then combined (`finish`).

A polishing step consists of two such passes. `score` stores the products of a block's directions with all rows and with
all directions in files. When the files of all components exist, `polish` recomputes the block's directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from npeff.directions import inner_product, polish_weights, row_products, zero_directions
from npeff.fisher import GroupLayout
from npeff.gradients import GradientCollector, LabelSpec
from npeff.models.loaded import ModelSpec
from npeff.options.kinds import DiagonalKind
from npeff.sketches import SketchSpec, make_sketch
from npeff.stages.fitted_examples import FittedExamples
from npeff.stages.lift.diagonals import DiagonalLift
from npeff.stages.lift.factors import Direction, FactorLift, LiftRule, RowWeights, Solution, WeightsOf
from npeff.storage.atomic import is_committed, write_file_atomically
from npeff.storage.checksums import json_checksum, read_json, write_json_atomically
from npeff.storage.errors import StoreError
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore, read_sums, write_sums
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums


@dataclass(frozen=True)
class LiftBlock:
    """Components that are lifted together."""

    components: tuple[int, ...]
    part: int = 0
    parts: int = 1
    """Number of parts into which the stored shards are divided. ``part`` counts from 0."""


@dataclass(frozen=True)
class LiftPaths:
    factorization: Path
    directions: Path
    results: Path
    """Folder of one JSON file per finished component."""

    def scores_file(self, step: int, component: int) -> Path:
        """Return the file with the products of a component's direction before a polishing step."""
        return self.scores / f"{step:03d}" / f"{component:05d}.safetensors"

    @property
    def scores(self) -> Path:
        return self.results / "polish"

    @property
    def sums(self) -> Path:
        """Folder of the sums of parts of blocks."""
        return self.results / "sums"

    def sums_file(self, block: LiftBlock) -> Path:
        return self.sums / f"{json_checksum({'components': block.components})[:16]}-{block.part}-of-{block.parts}.f32"


_ARRAYS = {
    "fishers": ("factors", "frobenius_norms"),
    "diagonal_entries": ("factors", "frobenius_norms", "diagonal_norms"),
    "diagonal_groups": ("factors", "frobenius_norms", "diagonal_norms", "grouped_diagonal"),
}
"""Arrays of the Fisher store that the lift of each kind uses."""


class LiftWorker:
    """Lifts blocks of components, one block per call.

    Args:
        model: the model of the Fishers.
        labels: the labels of the gradient rows.
        sketch: the sketch of the Fishers.
        seed: seed of the sketch.
        examples: selection of the examples that the components were fitted on.
        paths: paths of the factorization and of the results.
        checksums: checksum of every stored shard.
        batch_size: number of examples in a batch.
        kind: kind of the factorized Fishers.
        lineage: what the directions are made from, see `npeff.runs.lineage`.
    """

    def __init__(
        self,
        model: ModelSpec,
        labels: LabelSpec,
        sketch: SketchSpec,
        seed: int,
        examples: FittedExamples,
        paths: LiftPaths,
        checksums: dict[int, ShardChecksums],
        batch_size: int,
        kind: Literal["fishers"] | DiagonalKind = "fishers",
        lineage: str | None = None,
    ) -> None:
        self._loaded = model.load()
        self._collector = GradientCollector(
            self._loaded.model, self._loaded.logits, self._loaded.layout, labels, self._loaded.one
        )
        self._fishers = FisherStore.open(examples.fishers)
        self._directions = DirectionStore.open(paths.directions)
        self._paths, self._checksums, self._batch_size, self._lineage = paths, checksums, batch_size, lineage
        self._names, self._verified = _ARRAYS[kind], set[int]()
        factorization = open_factorization(paths.factorization)
        components_KD, coefficients_NK = factorization.read_components(), factorization.read_coefficients()
        self._solution = _solution(torch.from_numpy(components_KD), torch.from_numpy(coefficients_NK), examples)
        self._rule: LiftRule
        if kind == "fishers":
            self._rule = FactorLift(self._solution, make_sketch(sketch, self._loaded.layout, seed))
        else:
            groups, columns_D = GroupLayout.of(self._loaded.model, self._loaded.layout), factorization.read_columns()
            columns = None if columns_D is None else torch.from_numpy(columns_D)
            self._rule = DiagonalLift(kind, self._solution, self._fishers, groups, columns)

    def lift(self, block: LiftBlock) -> list[dict[str, Any]]:
        """Write the unit directions of a block. Returns the facts of each direction, in the order of the components.

        Directions that a lost worker has already written are kept.
        """
        files = {component: self._result(component) for component in block.components}
        facts = {component: read_json(file) for component, file in files.items() if is_committed(file)}
        missing = tuple(component for component in block.components if component not in facts)
        if missing:
            sums = self._sums(missing, sorted(self._checksums))
            for component in missing:
                rows = self._rule.rows(missing, component)
                vectors = [{name: tensors[row] for name, tensors in sums.items()} for row in rows]
                facts[component] = self._write(component, *self._rule.direction(component, vectors))
        return [facts[component] for component in block.components]

    def add_up(self, block: LiftBlock) -> None:
        """Write the sums of a block over one part of the shards to a file, unless the file exists."""
        path, names = self._paths.sums_file(block), self._loaded.layout.names
        if not is_committed(path):
            sums = self._sums(block.components, sorted(self._checksums)[block.part :: block.parts])
            n_rows = len(sums[names[0]])
            write_sums(path, ((sums[name][row].cpu().numpy() for name in names) for row in range(n_rows)))

    def finish(self, request: tuple[LiftBlock, int]) -> dict[str, Any]:
        """Write the direction of one component from the sums of all parts of its block. Returns its facts as `lift`."""
        block, component = request
        if is_committed(self._result(component)):
            result: dict[str, Any] = read_json(self._result(component))
            return result
        layout, vectors = self._loaded.layout, []
        files = [self._paths.sums_file(replace(block, part=part)) for part in range(block.parts)]
        for row in self._rule.rows(block.components, component):
            total_P = sum(read_sums(file, row, layout.size) for file in files)
            pieces = zip(layout.names, layout.shapes, torch.as_tensor(total_P).split(layout.sizes), strict=True)
            vectors.append({name: piece.reshape(shape) for name, shape, piece in pieces})
        return self._write(component, *self._rule.direction(component, vectors))

    def score(self, request: tuple[int, tuple[int, ...]]) -> None:
        """Write the products of a block's directions with the rows of all examples and with all directions.

        Args:
            request: the polishing step, and the components of the block.
        """
        step, block = request
        missing = [component for component in block if not self._paths.scores_file(step, component).exists()]
        if not missing:
            return
        layout, device, K = self._loaded.layout, self._loaded.device, len(self._solution.components_KD)
        directions = zero_directions(layout, len(missing), device)
        for position, component in enumerate(missing):
            for name, tensor in self._unit_direction(component).items():
                directions[name][position] = tensor
        gram_kK = torch.zeros(len(missing), K, dtype=torch.float64)
        for other in range(K):
            for name, tensor in self._unit_direction(other).items():
                gram_kK[:, other] += (directions[name].flatten(1) @ tensor.flatten().to(device)).double().cpu()
        used_N = self._solution.coefficients_NK.any(1)
        products_kNR = torch.zeros(len(missing), len(used_N), self._fishers.rank)
        for shard in sorted(self._checksums):
            start, stop = self._fishers.plan.bounds(shard)
            for examples in self._batches(range(start, stop), (start + used_N[start:stop].nonzero()[:, 0]).tolist()):
                batch, targets = self._loaded.with_targets(examples)
                products_BRk = row_products(self._collector, batch, directions, examples, targets).float().cpu()
                live_B = used_N[examples]  # unused examples of the batch may have non-finite products
                found_kBR = products_BRk.where(live_B[:, None, None], 0).permute(2, 0, 1)
                products_kNR[:, examples, : found_kBR.shape[2]] = found_kBR
        for component, products_NR, gram_K in zip(missing, products_kNR, gram_kK, strict=True):
            content = save({"products": products_NR.contiguous(), "gram": gram_K.contiguous()})
            write_file_atomically(self._paths.scores_file(step, component), partial(_put, content=content))

    def polish(self, request: tuple[int, tuple[int, ...]]) -> list[dict[str, Any]]:
        """Write the block's directions after a polishing step, except those already written. Returns their facts.

        Args:
            request: the polishing step, and the components of the block.
        """
        step, block = request
        facts = {component: read_json(self._result(component)) for component in block}
        missing = tuple(component for component in block if facts[component].get("polished", 0) < step)
        if missing:
            solution, K = self._solution, len(self._solution.components_KD)
            products_NRK = torch.zeros(len(solution.coefficients_NK), self._fishers.rank, K)
            cosines_KK = torch.zeros(K, K, dtype=torch.float64)
            for component in range(K):
                products_NRK[:, :, component], cosines_KK[component] = self._scores(step, component)

            def weights(examples: slice, arrays: Mapping[str, Tensor]) -> RowWeights:
                found = products_NRK[examples], solution.weighted_NK[examples], cosines_KK, solution.gram_KK
                return RowWeights(polish_weights(*found, missing, arrays["frobenius_norms"]))

            directions = self._added_up(len(missing), sorted(self._checksums), weights, ("frobenius_norms",))
            for position, component in enumerate(missing):
                polished = [{name: tensor[position] for name, tensor in directions.items()}]
                facts[component] = self._write(component, *self._rule.direction(component, polished), step)
        return [facts[component] for component in block]

    def _scores(self, step: int, component: int) -> tuple[Tensor, Tensor]:
        """Read the products that `score` wrote for a component: with the rows (N, R) and with the directions (K,)."""
        file = self._paths.scores_file(step, component)
        try:
            found = load(file.read_bytes())
            return found["products"], found["gram"]
        except (OSError, KeyError, SafetensorError) as error:
            remedy = "delete it and run the same command again"
            raise StoreError(f"{file} is missing or damaged", remedy, path=file) from error

    def _unit_direction(self, component: int) -> Direction:
        """Return a stored direction, normalized again after rounding. The zero direction of an unused component stays
        zero."""
        stored = {name: torch.from_numpy(array).float() for name, array in self._directions.read(component).items()}
        length = inner_product(stored, stored) ** 0.5 or 1.0
        return {name: tensor / length for name, tensor in stored.items()}

    def _sums(self, block: tuple[int, ...], shards: list[int]) -> Direction:
        """Return the sums of a block over the examples of some shards, (rows, *shape) for each parameter."""
        return self._added_up(self._rule.n_rows(block), shards, self._rule.weights_of(block), self._names)

    def _added_up(self, n_rows: int, shards: list[int], weights_of: WeightsOf, names: Sequence[str]) -> Direction:
        """Return sums over the examples of some shards, with the weights that ``weights_of`` computes for each shard
        from its arrays ``names``."""
        sums = zero_directions(self._loaded.layout, n_rows, self._loaded.device)
        for shard in shards:
            start, stop = self._fishers.plan.bounds(shard)
            weights = weights_of(slice(start, stop), self._arrays(shard, names))
            used = (start + weights.used_N.nonzero()[:, 0]).tolist()
            for examples in self._batches(range(start, stop), used):
                batch, targets = self._loaded.with_targets(examples)
                places_B = torch.tensor(examples) - start
                weights.add(self._collector, batch, places_B, sums, examples, targets)
        return sums

    def _arrays(self, shard: int, names: Sequence[str]) -> dict[str, Tensor]:
        checksum: ShardChecksums | None = self._checksums[shard]
        if shard in self._verified and isinstance(checksum, str):
            checksum = None  # its verification reads all arrays
        stored = self._fishers.read_shard(shard, checksum, names)
        self._verified.add(shard)
        return {name: torch.from_numpy(array) for name, array in stored.items()}

    def _batches(self, shard: range, used: list[int]) -> list[list[int]]:
        """Return batches of a shard that contain the used examples.

        For sampled labels, the batches are those in which the Fishers were computed: with other padding, the logits
        could round differently and change a sampled label.
        """
        if self._collector.labels.kind != "sampled":
            return self._loaded.batches(used, self._batch_size)
        batches = self._loaded.batches(shard, self._batch_size)
        return [examples for examples in batches if not set(used).isdisjoint(examples)]

    def _write(self, component: int, direction: Mapping[str, Tensor], cosine: float, step: int = 0) -> dict[str, Any]:
        squares = {name: float(tensor.double().square().sum()) for name, tensor in direction.items()}
        total = sum(squares.values())
        unit = {name: tensor / total**0.5 if total > 0 else tensor for name, tensor in direction.items()}
        dtype: torch.dtype = getattr(torch, self._directions.dtype)  # torch rounds much faster than numpy does
        arrays = {name: tensor.to(dtype).cpu().numpy() for name, tensor in unit.items()}
        checksum = self._directions.write(component, arrays)
        facts = {
            "component": component,
            "cosine": cosine,
            "polished": step,
            "energy": {name: square / total if total > 0 else 0.0 for name, square in squares.items()},
            "checksum": checksum,
            **({} if self._lineage is None else {"lineage": self._lineage}),
        }
        write_json_atomically(self._result(component), facts)
        return facts

    def _result(self, component: int) -> Path:
        return self._paths.results / f"{component:05d}.json"


def _solution(components_KD: Tensor, coefficients_NK: Tensor, examples: FittedExamples) -> Solution:
    splits, weights_N = examples.read()
    fit_N = torch.from_numpy(splits.fit_N)
    coefficients_NK[~fit_N] = 0.0
    weighted_NK = coefficients_NK * torch.from_numpy(weights_N)[:, None]
    gram_KK = coefficients_NK.double().T @ weighted_NK
    return Solution(components_KD, coefficients_NK, weighted_NK, gram_KK, fit_N)


def _put(stream: BinaryIO, content: bytes) -> None:
    stream.write(content)
