"""Natural gradients of a run: its gradient rows as an operator, whose products are distributed over workers.

Shapes: N examples, n rows, R rank, D sketch, k vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.execution.executor import Executor
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import ProgressDisplay
from npeff.stages.earlier_results import checksums_of, fingerprint_of
from npeff.stages.step.fisher_worker import Direction, FisherWorker, Part
from npeff.stages.worker_specs import model_spec, worker_spec
from npeff.store.fisher_store import FisherStore
from npeff.training import (
    DiagonalPreconditioner,
    ExactPreconditioner,
    KroneckerPreconditioner,
    KroneckerSums,
    LowRankPreconditioner,
    Preconditioner,
)
from npeff.training.low_rank import leading_eigenpairs, sketched_eigenvectors

Kind = Literal["diagonal", "kfac", "low_rank", "exact"]
KINDS: tuple[Kind, ...] = ("diagonal", "kfac", "low_rank", "exact")

_PARTS = 8
"""Largest number of parts of a pass. It does not depend on the workers, so neither does the rounding."""
_LARGEST = 8192
"""Largest number of rows of a matrix that is factorized. Above it, conjugate gradients are not preconditioned."""
_KEPT_BYTES = 2**30
"""Largest size in bytes of sketched rows that stay in memory. Larger ones are read again for each product."""


class RunRows:
    """The gradient rows B = A/√N of some examples of a run: the `FisherRows` of `npeff.training`.

    Args:
        run: the run.
        workers: the workers that compute the products.
        used_N: marks the examples of the mean Fisher. They must be valid.
        progress: display for the progress of each pass.
    """

    def __init__(
        self, run: RunDirectory, workers: Executor, used_N: NDArray[np.bool_], progress: ProgressDisplay
    ) -> None:
        self._workers, self._progress, self._used_N = workers, progress, used_N
        self._store, self._checksums = FisherStore.open(run.fishers), checksums_of(run)
        layout = self._store.attrs["parameter_layout"]
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in zip(layout["names"], layout["shapes"], strict=True)
        }
        self._spec = worker_spec(
            run,
            FisherWorker,
            model=model_spec(run, fingerprint_of(run)),
            labels=run.config.fishers.label_spec(run.config.seed),
            fishers=run.fishers,
            used_N=used_N,
            batch_size=self._store.attrs["batch_size"],
        )
        shards = np.array_split(np.arange(self._store.plan.n_shards), min(_PARTS, self._store.plan.n_shards))
        self._parts = [Part(number, tuple(each.tolist())) for number, each in enumerate(shards)]
        self._sizes = [self._n_used(part.shards) * self._store.rank for part in self._parts]
        self._kept: list[Tensor] | None = None

    @property
    def dim(self) -> int:
        """D, the number of coordinates of the sketch."""
        return int(self._store.dim)

    @property
    def n_rows(self) -> int:
        """n, the number of rows: R for each used example."""
        return sum(self._sizes)

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return B v (n,), float64."""
        return self.block_products({name: direction[name][None] for name in self.shapes})[0]

    def weighted_sum(self, weights_n: Tensor) -> Direction:
        """Return Bᵀ w."""
        return {name: values[0] for name, values in self.block_weighted_sums(weights_n[None]).items()}

    def block_products(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Return B v (k, n) for k vectors, tensors (k, *shape) by parameter name."""
        values = {name: values.detach().cpu() for name, values in directions.items()}
        items = [Part(part.number, part.shards, values) for part in self._parts]
        return torch.cat(self._passed("products", items), dim=1)

    def block_weighted_sums(self, weights_kn: Tensor) -> Direction:
        """Return Bᵀ w for k vectors of weights."""
        pairs = zip(self._parts, weights_kn.split(self._sizes, dim=1), strict=True)
        items = [Part(part.number, part.shards, weights_kn=weights) for part, weights in pairs]
        return _added(self._passed("weighted_sums", items))

    def diagonal(self) -> Direction:
        """Return the diagonal of the mean Fisher, float64."""
        count = int(self._used_N.sum())
        return {name: values / count for name, values in _added(self._passed("diagonal", self._parts)).items()}

    def kronecker(self) -> KroneckerSums:
        """Return the sums of the Kronecker factors."""
        first, *others = self._passed("kronecker", self._parts)
        for other in others:
            first.merge(other)
        result: KroneckerSums = first
        return result

    def sketched(self) -> Iterable[Tensor]:
        """Yield the stored sketched rows in order, one shard at a time (m, D): they are B Qᵀ for the sketch Q."""
        if self._kept is not None:
            return self._kept
        if self.n_rows * self._store.dim * 4 > _KEPT_BYTES:
            return self._read()
        self._kept = list(self._read())
        return self._kept

    def _read(self) -> Iterator[Tensor]:
        root = float(self._used_N.sum()) ** -0.5
        for shard in range(self._store.plan.n_shards):
            used_n = self._used_N[slice(*self._store.plan.bounds(shard))]
            if used_n.any():
                arrays = self._store.read_shard(shard, self._checksums[shard], ["factors", "frobenius_norms"])
                roots_n = torch.from_numpy(np.sqrt(arrays["frobenius_norms"][used_n]) * root)
                factors_nRD = torch.from_numpy(arrays["factors"][used_n])
                yield (factors_nRD * roots_n[:, None, None].to(factors_nRD)).flatten(0, 1)

    def _passed(self, method: str, items: list[Part]) -> list[Any]:
        """Return the results of the items in their order, whatever the order in which they are finished."""
        found: dict[int, Any] = {}
        with self._progress.stage("pass over the examples", len(items), "parts") as tick:
            for item, result in self._workers.map(self._spec, method, items, keep_going=True):
                found[item.number] = result
                tick(len(found))
        return [found[item.number] for item in items]

    def _n_used(self, shards: tuple[int, ...]) -> int:
        return sum(int(self._used_N[slice(*self._store.plan.bounds(shard))].sum()) for shard in shards)


def preconditioner(
    rows: RunRows, kind: Kind, damping: float, rank: int, tolerance: float, max_iterations: int
) -> Preconditioner:
    """Return the natural gradient of the rows. See `npeff.stages.natural_gradient.natural_gradient`."""
    if kind == "diagonal":
        return DiagonalPreconditioner(rows.diagonal(), damping=damping)
    if kind == "kfac":
        return KroneckerPreconditioner(rows.kronecker(), damping=damping)
    size = min(rows.n_rows, rows.dim)
    if kind == "low_rank":
        if size > _LARGEST:
            raise RunDirectoryError(
                f"the kind low_rank needs the eigenvectors of a matrix of {size:,} rows, more than {_LARGEST:,}",
                "use the kind kfac, or a run with a fishers.sketch of fewer dimensions",
            )
        vectors_kn = sketched_eigenvectors(rows.sketched, rank)
        values_k, directions = leading_eigenpairs(vectors_kn, rows.block_weighted_sums, rows.block_products)
        return LowRankPreconditioner(values_k, directions, damping=damping)
    return ExactPreconditioner(
        rows,
        damping=damping,
        sketched_rows=rows.sketched if size <= _LARGEST else None,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


def _added(parts: list[Direction]) -> Direction:
    total = parts[0]
    for part in parts[1:]:
        for name, values in part.items():
            total[name] += values
    return total
