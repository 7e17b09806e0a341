"""Results of a factorization of any kind, with its components in the sketch.

Shapes: N examples, n of a shard, D dimension of a component, K components, E columns of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.execution.executor import Executor
from npeff.factorization import canonical_order, canonical_signs, explained
from npeff.factorization.direct import random_components
from npeff.factorization.rows import unfolded
from npeff.options.kinds import DirectKind
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import ProgressDisplay
from npeff.stages.factorize.direct_worker import ClusteredExamples, DirectWorker
from npeff.stages.factorize.driver import SolverRun
from npeff.stages.factorize.packed_rows import mapped_rows
from npeff.stages.principal import stored_principal_direction
from npeff.stages.transform.shards import over_shards
from npeff.stages.transform.worker import ShardCoefficients
from npeff.stages.worker_specs import device_of, fitted_examples, worker_spec
from npeff.store.fisher_store import FisherStore
from npeff.store.layout import ShardPlan
from npeff.store.shard_records import ShardChecksums
from npeff.store.splits import Splits

PRINCIPAL_EXAMPLES = 256
"""Number of top examples of a component of kind ``squared`` whose principal direction is its component in the sketch.
There are fewer, but at least 16, if their factors in float64 need more than `_PRINCIPAL_BYTES`."""

_PRINCIPAL_BYTES = 2**28


@dataclass(frozen=True)
class Found:
    """A factorization. Coefficients and evidence have one array (n, K) for each shard, in order."""

    components_KD: NDArray[np.float64]
    coefficients: list[NDArray[np.float32]]
    evidence: list[NDArray[np.float32]] | None
    loss: float
    objective: float
    explained: float
    explained_held_out: float | None
    n_iter: int
    stopped: str
    history: list[dict[str, Any]] = field(default_factory=list)
    columns_D: NDArray[np.int64] | None = None


def found_by_solver(solved: SolverRun, folder: Path, plan: ShardPlan) -> Found:
    """Return the result of the solver. The coefficients and the evidence stay in the files of the workers."""
    result = solved.result
    return Found(
        components_KD=result.components_KD,
        coefficients=mapped_rows(folder, "coefficients", solved.workers, plan),
        evidence=mapped_rows(folder, "evidence", solved.workers, plan) if result.has_evidence else None,
        loss=result.loss,
        objective=result.objective,
        explained=result.explained,
        explained_held_out=result.explained_held_out,
        n_iter=solved.history[-1]["iteration"],
        stopped=solved.stopped,
        history=solved.history,
        columns_D=result.columns_D,
    )


class SketchedKinds:
    """The kinds whose components are in the sketch, besides ``fishers``.

    Args:
        run: the run.
        workers: executor of the work.
        checksums: checksum of every stored shard.
        progress: display for the progress.
    """

    def __init__(
        self, run: RunDirectory, workers: Executor, checksums: dict[int, ShardChecksums], progress: ProgressDisplay
    ) -> None:
        self._run, self._workers, self._checksums, self._progress = run, workers, checksums, progress
        self._splits, _ = fitted_examples(run).read()

    def compute(self, kind: DirectKind) -> Found:
        """Compute a factorization without the solver.

        Raises:
            InvalidProblemError: the kind cannot factorize the stored Fishers, or there are too many components.
        """
        wanted, seed = self._run.config.factorization, self._run.config.seed
        if kind == "kmeans":
            return self._of_clusters(self._on_one_worker("clusters", kind))
        if kind == "pca":
            components_KD = self._on_one_worker("components", kind)
            components_KD = _with_canonical_signs(components_KD)
        else:
            components_KD = random_components(wanted.n_components, FisherStore.open(self._run.fishers).dim, seed)
        parts: list[ShardCoefficients] = self._over_shards("transform", components_KD)
        losses_N, squares_N = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("losses_N", "squares_N")
        )
        return Found(
            components_KD,
            [part.coefficients_NK for part in parts],
            [part.evidence_NK for part in parts],
            **_scores(losses_N, squares_N, self._splits),
            n_iter=0,
            stopped="computed",
        )

    def in_the_sketch(self, found: Found) -> Found:
        """Return a factorization of kind ``gradients`` or ``squared`` with its components in the sketch.

        The components of ``squared`` are principal directions of Σ_i W_ij F̂_i over their fitted top examples.
        """
        if self._run.config.factorization.kind == "gradients":
            components, lengths_K = unfolded(torch.from_numpy(found.components_KD))
            factors_K = lengths_K.numpy().astype(np.float32)
            found = replace(
                found, components_KD=components.numpy(), coefficients=[rows * factors_K for rows in found.coefficients]
            )
            found = self._by_energy(found)
        else:
            found = replace(found, components_KD=self._principal_directions(found.coefficients))
        return replace(found, evidence=self._over_shards("evidence", found.components_KD))

    def _of_clusters(self, found: ClusteredExamples) -> Found:
        plan = FisherStore.open(self._run.fishers).plan
        clusters = Found(
            found.components_KD,
            [found.coefficients_NK[slice(*plan.bounds(shard))] for shard in sorted(self._checksums)],
            None,
            **_scores(found.losses_N, found.squares_N, self._splits),
            n_iter=found.n_iter,
            stopped="converged" if found.converged else "max_iterations",
        )
        clusters = self._by_energy(clusters)
        return replace(clusters, evidence=self._over_shards("evidence", clusters.components_KD))

    def _on_one_worker(self, method: str, kind: str) -> Any:
        config = self._run.config
        spec = worker_spec(
            self._run,
            DirectWorker,
            examples=fitted_examples(self._run),
            checksums=self._checksums,
            options=config.factorization.solver_options(config.seed),
            memory_limit_bytes=config.factorization.memory_limit_mb * 2**20,
            device=device_of(config),
        )
        with self._progress.stage("factorize", 1, kind) as tick:
            (_, found), *_ = self._workers.map(spec, method, [kind])
            tick(1)
        return found

    def _over_shards(self, method: Literal["transform", "evidence"], components_KD: NDArray[np.float64]) -> list[Any]:
        arguments = self._run, self._workers, self._progress, method, self._checksums, components_KD
        return over_shards(*arguments, title="coefficients")

    def _by_energy(self, found: Found) -> Found:
        """Return the factorization with its components by descending energy, as those of the solver."""
        energies_K = torch.from_numpy(_energies(found.coefficients, self._splits.fit_N))
        order_K = canonical_order(torch.from_numpy(found.components_KD), energies_K)[0].numpy()
        return replace(
            found,
            components_KD=found.components_KD[order_K],
            coefficients=[rows_NK[:, order_K] for rows_NK in found.coefficients],
        )

    def _principal_directions(self, coefficients: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        store, fit_N = FisherStore.open(self._run.fishers), self._splits.fit_N
        fitting = _PRINCIPAL_BYTES // (8 * store.rank * store.dim)
        count = min(PRINCIPAL_EXAMPLES, max(16, fitting))
        directions = []
        for component in range(coefficients[0].shape[1]):
            w_N = np.nan_to_num(np.concatenate([rows_NK[:, component] for rows_NK in coefficients]).astype(np.float64))
            directions.append(stored_principal_direction(store, w_N, fit_N, count).numpy())
        return _with_canonical_signs(np.stack(directions))


def _with_canonical_signs(components_KD: NDArray[np.float64]) -> NDArray[np.float64]:
    signs_K: NDArray[np.float64] = canonical_signs(torch.from_numpy(components_KD)).numpy()
    return components_KD * signs_K[:, None]


def _energies(coefficients: Sequence[NDArray[np.float32]], fit_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return Σ_i W_ij² (K,) over the fitted examples."""
    start, energies_K = 0, np.zeros(coefficients[0].shape[1])
    for rows_NK in coefficients:
        energies_K += np.square(rows_NK[fit_N[start : start + len(rows_NK)]].astype(np.float64)).sum(axis=0)
        start += len(rows_NK)
    return energies_K


def _scores(losses_N: NDArray[np.float64], squares_N: NDArray[np.float64], splits: Splits) -> dict[str, Any]:
    """Return the fields of `Found` for the loss of the fitted and of the held-out examples."""
    loss = float(losses_N[splits.fit_N].sum())
    held_out_squares = float(squares_N[splits.held_out_N].sum())
    return {
        "loss": loss,
        "objective": loss,
        "explained": explained(loss, float(squares_N[splits.fit_N].sum())),
        "explained_held_out": (
            explained(float(losses_N[splits.held_out_N].sum()), held_out_squares) if held_out_squares > 0 else None
        ),
    }
