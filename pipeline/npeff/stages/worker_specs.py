"""What the run file means to a worker of a stage."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from npeff.execution.create import make_executor
from npeff.execution.executor import Executor, WorkerSpec
from npeff.models.loaded import ModelSpec
from npeff.options.sketch import SketchSpec
from npeff.runs.config import RunConfig
from npeff.runs.config_sections import IMPORTED_TASK
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.fitted_examples import FittedExamples


def executor_for(run: RunDirectory, given: Executor | None) -> AbstractContextManager[Executor]:
    """``given``, which its owner closes, or the one that the run asks for."""
    return nullcontext(given) if given is not None else make_executor(**run.config.executor.model_dump())


def worker_spec(run: RunDirectory, worker_class: type, **arguments: Any) -> WorkerSpec:
    """A worker of this run, which the next command waits for if this one is killed."""
    return WorkerSpec(worker_class, arguments, run.worker_lease)


def device_of(config: RunConfig) -> str:
    return "cuda" if config.executor.gpus_per_worker > 0 else "cpu"


def model_of(config: RunConfig, cache: Path, fingerprint: str | None) -> ModelSpec:
    """The model of a run file, whose task keeps what it prepares in ``cache``."""
    return ModelSpec(
        task=config.task.name,
        options=config.task.options,
        cache=cache,
        include=config.parameters.include,
        exclude=config.parameters.exclude,
        device=device_of(config),
        fingerprint=fingerprint,
    )


def model_spec(run: RunDirectory, fingerprint: str | None) -> ModelSpec:
    """The model as a worker loads it; it must be the one of the fingerprint, where there is one already."""
    config = run.config
    if config.task.name == IMPORTED_TASK:
        raise RunDirectoryError(
            f"{run.path} was imported from a file and has no model: only factorize, query and report"
        )
    return model_of(config, run.task_cache, fingerprint)


def fitted_examples(run: RunDirectory) -> FittedExamples:
    """Which examples components are fitted on, as the run file says."""
    wanted = run.config.factorization
    return FittedExamples(run.fishers, run.table("examples"), wanted.examples == "mispredicted", wanted.example_weights)


def inspection_of(config: RunConfig) -> tuple[SketchSpec, int | Literal["auto"], int]:
    """What `TaskWorker.inspect` is asked: the sketch, the batch size, and the bytes that a batch may take."""
    return config.fishers.sketch, config.fishers.batch_size, config.fishers.memory_limit_mb * 2**20
