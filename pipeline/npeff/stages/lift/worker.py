"""The worker of the stage `lift`: compute the components' directions in parameter space.

An item is a block of components. The worker makes one pass over the fitted examples, in which every gradient row is
computed once per parameter and added to all sums of the block. A `LiftRule` defines the sums of each kind of Fisher.
Blocks are independent: finished directions are written to the store, and a crash loses only the blocks in progress. The
last bits of a direction depend on its block, because the shapes of the matrix products differ. If there are more
workers than blocks of the size that memory allows, each block is summed in parts, each over some of the shards
(`add_up`). The sums of the parts are stored in files until all are complete, and then combined (`finish`).

Whitened directions (`npeff.directions.whitening`) are other sums of the same rows. Before the pass, `sketch_sums` and
`product_sums` read the stored factors. From their results, the driver computes the combinations of the components' sums
and the sketches of all directions, and stores them in a file.

A polishing step consists of two such passes. `score` stores the products of a block's directions with all rows and with
all directions in files. When the files of all components exist, `polish` recomputes the block's directions. Polished
directions are whitened after the last step, from the products of the polished directions: a further `score`, and a
further `polish` that repeats the last step with the weights of the combinations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from npeff.directions import (
    Whitening,
    inner_product,
    lifted_sketches,
    polish_weights,
    product_sums,
    row_products,
    whitening,
    zero_directions,
)
from npeff.directions.lift import inverse_roots
from npeff.fisher import GroupLayout
from npeff.gradients import GradientCollector, LabelSpec
from npeff.models.loaded import ModelSpec
from npeff.options.kinds import DiagonalKind
from npeff.stages.earlier_results import sketch_of
from npeff.stages.fitted_examples import FittedExamples
from npeff.stages.lift.diagonals import DiagonalLift
from npeff.stages.lift.factors import (
    Direction,
    FactorLift,
    Lifted,
    LiftRule,
    RowWeights,
    Solution,
    WeightsOf,
)
from npeff.stages.lift.files import LiftBlock, LiftPaths, read_tensors, write_tensors
from npeff.stages.shard_batches import batches_of_shard
from npeff.storage.atomic import is_committed
from npeff.storage.checksums import read_json, write_json_atomically
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore, read_sums, write_sums
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums

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
        examples: selection of the examples that the components were fitted on.
        paths: paths of the factorization and of the results.
        checksums: checksum of every stored shard.
        batch_size: number of examples in a batch.
        kind: kind of the factorized Fishers.
        damping: damping λ of whitened directions; None for own directions.
        polished: whether the directions are whitened only after polishing steps.
        lineage: what the directions are made from, see `npeff.runs.lineage`.
    """

    def __init__(
        self,
        model: ModelSpec,
        labels: LabelSpec,
        examples: FittedExamples,
        paths: LiftPaths,
        checksums: dict[int, ShardChecksums],
        batch_size: int,
        kind: Literal["fishers"] | DiagonalKind = "fishers",
        damping: float | None = None,
        polished: bool = False,
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
        self._damping, self._polishing = damping, polished
        self._sketch = sketch_of(self._fishers.attrs, self._loaded.layout)
        factorization = open_factorization(paths.factorization)
        components_KD, coefficients_NK = factorization.read_components(), factorization.read_coefficients()
        self._solution = _solution(torch.from_numpy(components_KD), torch.from_numpy(coefficients_NK), examples)
        self._rule: LiftRule
        if kind == "fishers":
            self._rule = FactorLift(self._solution, None if polished else paths.combinations)
        else:
            groups, columns_D = GroupLayout.of(self._loaded.model, self._loaded.layout), factorization.read_columns()
            columns = None if columns_D is None else torch.from_numpy(columns_D)
            self._rule = DiagonalLift(kind, self._solution, self._fishers, groups, columns, damping is not None)

    def sketch_sums(self, request: tuple[tuple[int, ...]]) -> Tensor:
        """Return the sum over some shards of the sketches of all directions, see `lifted_sketches`."""
        (shards,), solution = request, self._solution
        total_KD = torch.zeros(solution.components_KD.shape, dtype=torch.float64)
        for shard in shards:
            examples, arrays = slice(*self._fishers.plan.bounds(shard)), self._arrays(shard, ("factors",))
            arguments = solution.weighted_NK[examples], solution.components_KD, solution.gram_KK
            total_KD += lifted_sketches(arrays["factors"], *arguments)
        return total_KD

    def product_sums(self, request: tuple[tuple[int, ...], Tensor]) -> Tensor:
        """Return the sum over some shards of the products of the unit sketches (K, D), see `product_sums`."""
        shards, sketches_KD = request
        total_KK = torch.zeros(len(sketches_KD), len(sketches_KD), dtype=torch.float64)
        for shard in shards:
            examples, arrays = slice(*self._fishers.plan.bounds(shard)), self._arrays(shard, ("factors",))
            products_NRK = arrays["factors"] @ sketches_KD.to(arrays["factors"]).T
            total_KK += product_sums(products_NRK, self._solution.weights_N[examples])
        return total_KK

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
                facts[component] = self._write(component, self._rule.direction(component, vectors), vectors)
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
        return self._write(component, self._rule.direction(component, vectors), vectors)

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
            write_tensors(self._paths.scores_file(step, component), products=products_NR, gram=gram_K)

    def polish(self, request: tuple[int, tuple[int, ...]]) -> list[dict[str, Any]]:
        """Write the block's directions after a polishing step, except those already written. Returns their facts.

        Args:
            request: the polishing step, and the components of the block.
        """
        step, block = request
        facts = {component: read_json(self._result(component)) for component in block}
        missing = tuple(component for component in block if facts[component].get("polished", 0) < step)
        if missing:
            sums = self._polished(step, missing, None)
            for position, component in enumerate(missing):
                polished = [{name: tensor[position] for name, tensor in sums.items()}]
                facts[component] = self._write(component, self._rule.direction(component, polished), polished, step)
        return [facts[component] for component in block]

    def whiten(self, request: tuple[int, tuple[int, ...]]) -> list[dict[str, Any]]:
        """Write the block's whitened directions after the last polishing step, as `polish`."""
        step, block = request
        facts = {component: read_json(self._result(component)) for component in range(len(self._solution.gram_KK))}
        missing = tuple(component for component in block if not facts[component].get("whitened"))
        if missing:
            found = self._whitening_of_polished(*self._all_scores(step + 1))
            lengths_K = torch.tensor([fact["length"] for fact in facts.values()], dtype=torch.float64)
            inverse_lengths_K = lengths_K.reciprocal().where(lengths_K > 0, 0)
            sums = self._polished(step, missing, found.combinations_KK * inverse_lengths_K)
            for position, component in enumerate(missing):
                vectors = [{name: tensor[position] for name, tensor in sums.items()}]
                whitened = Lifted(vectors[0], float(found.cosines_K[component]))
                facts[component] = self._write(component, whitened, vectors, step, facts[component])
        return [facts[component] for component in block]

    def _whitening_of_polished(self, products_NRK: Tensor, gram_KK: Tensor) -> Whitening:
        assert self._damping is not None
        shards = sorted(self._checksums)
        norms = [self._arrays(shard, ("frobenius_norms",))["frobenius_norms"] for shard in shards]
        normalized_NRK = products_NRK * inverse_roots(torch.cat(norms))[:, None, None]
        return whitening(gram_KK, product_sums(normalized_NRK, self._solution.weights_N), self._damping)

    def _polished(self, step: int, block: tuple[int, ...], combinations_KK: Tensor | None) -> Direction:
        """Return the sums of a polishing step, or combinations of them."""
        solution, (products_NRK, gram_KK) = self._solution, self._all_scores(step)

        def weights(examples: slice, arrays: Mapping[str, Tensor]) -> RowWeights:
            found = products_NRK[examples], solution.weighted_NK[examples], gram_KK, solution.gram_KK
            return RowWeights(polish_weights(*found, block, arrays["frobenius_norms"], combinations_KK))

        return self._added_up(len(block), sorted(self._checksums), weights, ("frobenius_norms",))

    def _all_scores(self, step: int) -> tuple[Tensor, Tensor]:
        """Read what `score` wrote for all directions: products with the rows (N, R, K) and with each other (K, K)."""
        (n_examples, K), rank = self._solution.coefficients_NK.shape, self._fishers.rank
        products_NRK, gram_KK = torch.zeros(n_examples, rank, K), torch.zeros(K, K, dtype=torch.float64)
        for component in range(K):
            file = self._paths.scores_file(step, component)
            products_NRK[:, :, component], gram_KK[component] = read_tensors(file, "products", "gram")
        return products_NRK, gram_KK

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
        return batches_of_shard(self._loaded, self._collector.labels, shard, used, self._batch_size)

    def _write(
        self,
        component: int,
        lifted: Lifted,
        vectors: list[Direction],
        step: int = 0,
        own: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write a direction and its facts.

        Args:
            component: the component.
            lifted: its direction.
            vectors: the sums from which the direction is made.
            step: the polishing step.
            own: facts of the component's own direction, if it was written before the whitened direction.
        """
        squares = {name: float(tensor.double().square().sum()) for name, tensor in lifted.direction.items()}
        total = sum(squares.values())
        unit = {name: tensor / total**0.5 if total > 0 else tensor for name, tensor in lifted.direction.items()}
        dtype: torch.dtype = getattr(torch, self._directions.dtype)  # torch rounds much faster than numpy does
        arrays = {name: tensor.to(dtype).cpu().numpy() for name, tensor in unit.items()}
        sketch_D = self._sketch.apply_dense({name: tensor[None] for name, tensor in unit.items()})[0].double().cpu()
        stored_D = sketch_D if lifted.sketch_D is None else lifted.sketch_D
        checksum = self._directions.write(component, arrays, stored_D.numpy())
        facts = {
            "component": component,
            "cosine": own["cosine"] if own else self._rule.lift_cosine(component, vectors, sketch_D),
            "cosine_own": lifted.cosine_own if total > 0 else 0.0,
            "whitened": own is not None or (self._damping is not None and not self._polishing),
            "polished": step,
            "length": own["length"] if own else total**0.5,
            "energy": {name: square / total if total > 0 else 0.0 for name, square in squares.items()},
            "checksum": checksum,
            **({} if self._lineage is None else {"lineage": self._lineage}),
        }
        write_json_atomically(self._result(component), facts)
        return facts

    def _result(self, component: int) -> Path:
        return self._paths.results / f"{component:05d}.json"


def _solution(components_KD: Tensor, coefficients_NK: Tensor, examples: FittedExamples) -> Solution:
    splits, given_N = examples.read()
    fit_N, weights_N = torch.from_numpy(splits.fit_N), torch.from_numpy(given_N)
    coefficients_NK[~fit_N] = 0.0
    weighted_NK = coefficients_NK * weights_N[:, None]
    gram_KK = coefficients_NK.double().T @ weighted_NK
    return Solution(components_KD, coefficients_NK, weighted_NK, gram_KK, fit_N, weights_N * fit_N)
