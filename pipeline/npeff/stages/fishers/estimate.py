"""Estimate of a run's time and memory, from a short trial on one worker that leaves no files."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import torch

from npeff.execution.executor import result_of
from npeff.models.batch_size import peak_bytes
from npeff.runs.config import RunConfig
from npeff.stages.factorize.stored_factors import kept_precision
from npeff.stages.fishers.trial import Trial, TrialWorker
from npeff.stages.fishers.unit_times import stage_seconds
from npeff.stages.inputs.trial import largest_number, passes_per_example
from npeff.stages.lift.memory import fitting_directions
from npeff.stages.registry import STAGES
from npeff.stages.validation import validate_for_workers
from npeff.stages.worker_specs import device_of, new_executor, trial_spec
from npeff.store.fisher_arrays import fisher_store_bytes

_MOST_SHARDS = 2_000
"""Number of shards above which larger ones are advised: every stage reads the record of each shard."""
_SHARD_BYTES = 128 * 2**20
"""Largest size of the arrays of an advised shard. A worker holds three: one is computed, and one is written."""
_DRIVER_EXAMPLE_BYTES = 500
"""Memory of the driver for each example, in bytes. A million examples took 254 in `factorize`, and about 400 in the
report."""


@dataclass(frozen=True)
class Estimate:
    """Estimated times in seconds and sizes in bytes, of the stage `fishers` unless stated otherwise."""

    trial: Trial
    workers: int
    start_up_seconds: float
    """Time until the first shard begins: a worker starts, and prepares and inspects the task."""
    seconds: float
    """Time until the last shard is written."""
    store_bytes: int
    solver_bytes: int
    """Size of the Fishers in the memory of each worker of the solver. 0 if they are read again in every pass."""
    direction_bytes: int
    """Size of the lifted directions on disk."""
    n_shards: int
    shard_size: int
    """Advised number of examples of a shard, at least that of the run file."""
    driver_bytes: int | None
    """Memory of the driver; None if it is the worker too."""


def estimate(config: RunConfig) -> Estimate:
    """Estimate a run's time and memory: load the task on one worker in a temporary folder and compute a few batches.

    Raises the errors that the stage `fishers` raises before its first shard.
    """
    wanted, began = config.fishers, time.monotonic()
    validate_for_workers(config)
    spec = trial_spec(config, TrialWorker)
    with new_executor(config) as executor:
        trial: Trial = result_of(executor, spec, "try_out", None)
        start_up = time.monotonic() - began - trial.trial_seconds
    facts = trial.facts
    n_examples = facts.n_examples
    store_bytes = fisher_store_bytes(
        n_examples=n_examples,
        shard_size=wanted.shard_size,
        rank=facts.rank,
        dim=facts.sketch_dim,
        n_classes=facts.n_classes,
        store_dtype=wanted.store_dtype,
        with_logits=facts.with_logits,
        top_entries=wanted.diagonal.top_entries,
        n_groups=facts.n_groups if wanted.diagonal.groups else None,
    )
    n_shards = -(-n_examples // wanted.shard_size)
    workers = config.executor.workers
    share = -(-n_shards // workers) / n_shards  # the last round of shards keeps some workers waiting
    return Estimate(
        trial=trial,
        workers=workers,
        start_up_seconds=start_up,
        seconds=start_up + trial.seconds_per_example * n_examples * share,
        store_bytes=store_bytes,
        solver_bytes=_solver_bytes(config, trial),
        direction_bytes=_direction_bytes(config, facts.layout.size),
        n_shards=n_shards,
        shard_size=advised_shard_size(n_examples, store_bytes // n_examples, workers, wanted.shard_size),
        driver_bytes=_driver_bytes(n_examples) if trial.process != os.getpid() else None,
    )


def advised_shard_size(n_examples: int, example_bytes: int, workers: int, shard_size: int) -> int:
    """Return the smallest power of two times `shard_size` that gives at most `_MOST_SHARDS` shards.

    A shard has at most `_SHARD_BYTES`, and every worker has at least four shards.
    """
    advised = shard_size
    while (
        n_examples > _MOST_SHARDS * advised
        and 2 * advised * example_bytes <= _SHARD_BYTES
        and n_examples >= 4 * workers * 2 * advised
    ):
        advised *= 2
    return advised


def _driver_bytes(n_examples: int) -> int:
    """Return the memory of the driver: that of this process, which has imported the same, and of the examples."""
    return peak_bytes(torch.device("cpu")) + _DRIVER_EXAMPLE_BYTES * n_examples


def _direction_bytes(config: RunConfig, n_parameters: int) -> int:
    lifted = config.lift.components
    n_lifted = config.factorization.n_components if lifted is None else len(lifted)
    return n_lifted * n_parameters * {"float32": 4, "float16": 2}[config.lift.dtype]


def _solver_bytes(config: RunConfig, trial: Trial) -> int:
    """Return the size of the data that a worker of the solver keeps: Fishers, or rows of diagonals or of examples in
    float32."""
    wanted, facts = config.factorization, trial.facts
    share = math.ceil(facts.n_examples * (1 - wanted.held_out_fraction) / config.executor.workers)
    match wanted.kind:
        case "diagonal_groups":
            return share * 4 * facts.n_groups
        case "diagonal_entries":
            return share * 8 * (config.fishers.diagonal.top_entries or 0)
        case "gradients":
            return share * 8 * facts.sketch_dim
        case "squared":
            return share * 4 * facts.sketch_dim
        case "kmeans":  # on one worker, with a copy
            return share * config.executor.workers * 8 * facts.sketch_dim
        case "random":
            return 0
    n_numbers, limit = share * facts.rank * facts.sketch_dim, wanted.memory_limit_mb * 2**20
    kept = kept_precision(n_numbers, config.fishers.store_dtype, device_of(config), limit)
    return n_numbers * kept.itemsize if kept is not None else 0


def rows(found: Estimate, config: RunConfig) -> list[tuple[str, str]]:
    """Return the estimate as pairs of a name and a formatted value."""
    trial, facts = found.trial, found.trial.facts
    n_examples = facts.n_examples
    where = "GPU" if device_of(config) == "cuda" else "process"
    left_out = f"; {len(facts.left_out)} tensors left out" if facts.left_out else ""
    return [
        ("examples", f"{n_examples:,} of rank {facts.rank}, {facts.n_classes:,} classes"),
        ("parameters", f"{facts.layout.size:,} in {len(facts.layout.names)} tensors{left_out}"),
        ("batch size", str(facts.batch_size)),
        ("memory of a worker", f"{_size(trial.peak_bytes)} ({where})"),
        *([] if found.driver_bytes is None else [("memory of the driver", _size(found.driver_bytes))]),
        ("shards", f"{found.n_shards:,} of {config.fishers.shard_size:,} examples{_advice(found, config)}"),
        ("start", _duration(found.start_up_seconds)),
        ("one example", f"{1e3 * trial.seconds_per_example:.3g} ms"),
        (f"fishers, {found.workers} worker{'s' if found.workers > 1 else ''}", _duration(found.seconds)),
        *_input_rows(found, config),
        ("fishers.zarr", _size(found.store_bytes)),
        (
            "Fishers in memory of a solver's worker",
            _size(found.solver_bytes) if found.solver_bytes else "none: streamed",
        ),
        ("directions.zarr", _size(found.direction_bytes)),
        *_stage_rows(found, config),
    ]


def _advice(found: Estimate, config: RunConfig) -> str:
    if found.shard_size == config.fishers.shard_size:
        return ""
    return f"; set fishers.shard_size to {found.shard_size}"


def _stage_rows(found: Estimate, config: RunConfig) -> list[tuple[str, str]]:
    """Return the times of the stages after `fishers`, their sum, and the stages whose time is not estimated."""
    times = _later_stages(found, config)
    total = found.seconds + (_input_seconds(found, config) or 0.0) + sum(times.values())
    shown = [(f"{name}, roughly", _duration(seconds)) for name, seconds in times.items()]
    timed = ("fishers", "inputs", *times)
    others = [stage.name for stage in STAGES if stage.in_run(config) and stage.name not in timed]
    rest = [("no estimate of the time of", ", ".join(others))] if others else []
    return [*shown, ("npeff run, roughly", _duration(total)), *rest]


def _later_stages(found: Estimate, config: RunConfig) -> dict[str, float]:
    """Return the estimated times in seconds of the stages of `npeff run` after `fishers`, except `inputs`."""
    facts = found.trial.facts
    times = stage_seconds(
        config,
        found.trial.units,
        n_examples=facts.n_examples,
        rank=facts.rank,
        dim=facts.sketch_dim,
        fitting=fitting_directions(config, facts.layout.size),
    )
    if config.factorization.kind != "fishers":
        del times["factorize"]
    included = [stage.name for stage in STAGES if stage.in_run(config)]
    return {name: seconds for name, seconds in times.items() if name in included}


def _input_rows(found: Estimate, config: RunConfig) -> list[tuple[str, str]]:
    """Return the row of the stage `inputs`, if the run file has its section."""
    if (seconds := _input_seconds(found, config)) is None:
        return []
    n_explained = largest_number(config, found.trial.facts.n_examples)
    without = ", without faithfulness" if config.inputs_or_default.faithfulness.examples else ""
    return [(f"inputs, up to {n_explained:,} examples{without}", _duration(seconds))]


def _input_seconds(found: Estimate, config: RunConfig) -> float | None:
    if (seconds := found.trial.seconds_per_input_pass) is None:
        return None
    facts = found.trial.facts
    return largest_number(config, facts.n_examples) * passes_per_example(config, facts.rank) * seconds / found.workers


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
