"""The worker of the kinds ``kmeans`` and ``pca``: components of the fitted examples, in one call on one worker.

Shapes: N examples, D sketch, K components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.factorization import InvalidProblemError, SolverOptions
from npeff.factorization.direct import Clusters, cluster, leading_eigenvectors
from npeff.stages.factorize.stored_factors import ShardRows, stored_factors
from npeff.stages.factorize.stored_rows import gradient_arrays, stored_gradients
from npeff.stages.fitted_examples import FittedExamples
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums


@dataclass(frozen=True)
class ClusteredExamples:
    """The result of ``kmeans``. Rows of invalid examples are NaN, and their losses and squares are 0."""

    components_KD: NDArray[np.float64]
    coefficients_NK: NDArray[np.float32]
    losses_N: NDArray[np.float64]
    """Squared distances to the nearest centre."""
    squares_N: NDArray[np.float64]
    """Squared lengths of the gradients: 1, or 0 for a zero gradient."""
    n_iter: int
    converged: bool


class DirectWorker:
    """Computes components of the fitted examples.

    Args:
        examples: the examples to fit on.
        checksums: checksum of every stored shard.
        options: number of components, seed, starts, iterations and tolerance.
        memory_limit_bytes: ``pca`` reads factors that need more memory in every pass. ``kmeans`` needs the gradients of
            the fitted examples, and a copy, in this memory.
        device: device of the factors for ``pca``.
    """

    def __init__(
        self,
        examples: FittedExamples,
        checksums: dict[int, ShardChecksums],
        options: SolverOptions,
        memory_limit_bytes: int,
        device: str,
    ) -> None:
        self._store, self._checksums, self._options = FisherStore.open(examples.fishers), checksums, options
        self._splits, _ = examples.read()
        self._memory_limit_bytes, self._device = memory_limit_bytes, torch.device(device)

    def components(self, kind: Literal["pca"]) -> NDArray[np.float64]:
        """Compute the leading eigenvectors (K, D) of the sum of the fitted Fishers.

        Raises:
            InvalidProblemError: there are more components than coordinates.
            StoreError: a shard is missing or damaged.
        """
        shards = [
            ShardRows(shard, checksum, np.flatnonzero(self._splits.fit_N[slice(*self._store.plan.bounds(shard))]))
            for shard, checksum in sorted(self._checksums.items())
        ]
        source = stored_factors(self._store, shards, self._device, self._memory_limit_bytes)
        return leading_eigenvectors(source, self._options.n_components, self._options.seed)

    def clusters(self, kind: Literal["kmeans"]) -> ClusteredExamples:
        """Compute clusters of the gradients of the fitted examples, and the coefficients of all valid examples.

        Raises:
            InvalidProblemError: the gradients are unknown or do not fit in the memory, or there are too few of them.
            StoreError: a shard is missing or damaged.
        """
        options, store, names = self._options, self._store, gradient_arrays(self._store)
        needed = 2 * 4 * store.dim * int(self._splits.fit_N.sum())
        if needed > self._memory_limit_bytes:
            raise InvalidProblemError(
                f"factorization.kind: kmeans keeps the gradients of the fitted examples in memory, which takes "
                f"{-(-needed // 2**20):,} MiB: set factorization.memory_limit_mb to this or more, or choose another "
                "kind"
            )
        rows = [self._gradients(shard, names)[self._fitted(shard)] for shard in sorted(self._checksums)]
        rows_MD = np.concatenate(rows)
        found = cluster(
            rows_MD[rows_MD.any(axis=1)],
            options.n_components,
            options.seed,
            n_starts=options.n_starts,
            max_iterations=options.max_iterations,
            tolerance=options.tolerance,
        )
        return self._assigned(found, names)

    def _assigned(self, found: Clusters, names: tuple[str, ...]) -> ClusteredExamples:
        n_examples = self._store.plan.n_examples
        coefficients_NK = np.full((n_examples, self._options.n_components), np.nan, np.float32)
        losses_N, squares_N = np.zeros(n_examples), np.zeros(n_examples)
        valid_N = self._splits.fit_N | self._splits.held_out_N | self._splits.others_N
        for shard in sorted(self._checksums):
            start, stop = self._store.plan.bounds(shard)
            chosen = start + np.flatnonzero(valid_N[start:stop])
            rows_nD = self._gradients(shard, names)[chosen - start].astype(np.float64)
            coefficients_NK[chosen] = found.coefficients(rows_nD)
            losses_N[chosen] = found.nearest(rows_nD)[1]
            squares_N[chosen] = np.square(rows_nD).sum(axis=1)
        return ClusteredExamples(
            found.components_KD, coefficients_NK, losses_N, squares_N, found.n_iter, found.converged
        )

    def _gradients(self, shard: int, names: tuple[str, ...]) -> NDArray[np.float32]:
        arrays = self._store.read_shard(shard, self._checksums[shard], names)
        return stored_gradients(arrays).float().numpy()

    def _fitted(self, shard: int) -> NDArray[np.bool_]:
        fitted: NDArray[np.bool_] = self._splits.fit_N[slice(*self._store.plan.bounds(shard))]
        return fitted
