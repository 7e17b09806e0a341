"""Results of `TransformWorker` for all shards."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from npeff.execution.executor import Executor
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import ProgressDisplay
from npeff.stages.transform.worker import TransformWorker
from npeff.stages.worker_specs import device_of, worker_spec
from npeff.store.shard_records import ShardChecksums


def over_shards(
    run: RunDirectory,
    workers: Executor,
    progress: ProgressDisplay,
    method: Literal["transform", "evidence"],
    checksums: dict[int, ShardChecksums],
    components_KD: NDArray[np.floating],
    *,
    l1: float = 0.0,
    title: str,
) -> list[Any]:
    """Return the result of a method of `TransformWorker` for every shard, in order.

    Args:
        run: the run.
        workers: executor of the work.
        progress: display for the progress.
        method: the method.
        checksums: checksum of every stored shard.
        components_KD: the components, unit rows.
        l1: the penalty of the coefficients.
        title: name of the work in the display.

    Raises:
        StoreError: a shard is missing or damaged.
    """
    arguments = {"fishers": run.fishers, "checksums": checksums, "components_KD": components_KD, "l1": l1}
    worker, found = worker_spec(run, TransformWorker, **arguments, device=device_of(run.config)), dict[int, Any]()
    with progress.stage(title, len(checksums), "shards") as tick:
        for shard, part in workers.map(worker, method, sorted(checksums)):
            found[shard] = part
            tick(len(found))
    return [found[shard] for shard in sorted(found)]
