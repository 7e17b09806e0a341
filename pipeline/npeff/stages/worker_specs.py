"""Arguments of executors and workers, from the run file."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from npeff.execution.create import make_executor
from npeff.execution.executor import Executor, WorkerSpec
from npeff.execution.ray.jobs import in_job
from npeff.models.helper import ModelHelper
from npeff.models.loaded import ModelSpec
from npeff.options.sketch import SketchSpec
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.config_sections import IMPORTED_TASK
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.fitted_examples import FittedExamples
from npeff.stages.validation import validate_for_workers


def executor_for(run: RunDirectory, given: Executor | None) -> AbstractContextManager[Executor]:
    """Return a context with the executor ``given``, which stays open, or with a new one as set in the run file."""
    return nullcontext(given) if given is not None else new_executor(run.config)


def model_executor_for(run: RunDirectory, given: Executor | None) -> AbstractContextManager[Executor]:
    """Return a context as `executor_for` does, for a stage whose workers load the model.

    A new executor is made only if the run file passes `validate_for_workers`.
    """
    if given is None:
        validate_for_workers(run.config)
    return executor_for(run, given)


def refuse_divided(config: RunConfig, stage: str) -> None:
    """Refuse a divided model for a stage whose workers need all parameters at once.

    Raises:
        ConfigError: `executor.devices_per_model` is not 1.
    """
    if config.executor.devices_per_model > 1:
        raise ConfigError(
            f"npeff {stage} does not divide the model among processes: set executor.devices_per_model to 1 in the run "
            "file for this command"
        )


def new_executor(config: RunConfig) -> AbstractContextManager[Executor]:
    """Return a context with a new executor, as set in the run file."""
    address = "auto" if in_job() else config.resolved("executor.address")  # a job has its own cluster
    return make_executor(**config.executor.model_dump() | {"address": address})


def worker_spec(run: RunDirectory, worker_class: type, **arguments: Any) -> WorkerSpec:
    """Return the spec of a worker of this run. If this command is killed, the next one waits until the worker ends.

    If a worker has several processes, all of them run the worker if its argument ``spread`` is true. Otherwise, the
    first process runs it, and the others keep their parts of the model for it.
    """
    helper = None if arguments.get("spread") else _helper(arguments.get("model"))
    return WorkerSpec(worker_class, arguments, run.worker_lease, helper=helper)


def trial_spec(config: RunConfig, worker_class: type) -> WorkerSpec:
    """Return the spec of a worker that tries the task of a run file, without a run."""
    model = model_of(config, Path(), None)
    return WorkerSpec(worker_class, {"model": model, "config": config}, helper=_helper(model))


def _helper(model: ModelSpec | None) -> WorkerSpec | None:
    return None if model is None else WorkerSpec(ModelHelper, {"model": model})


def device_of(config: RunConfig) -> str:
    return "cuda" if config.executor.gpus_per_worker > 0 else "cpu"


def model_of(config: RunConfig, cache: Path, fingerprint: str | None) -> ModelSpec:
    """Return the spec of the model of a run file. The task stores the files that it prepares in ``cache``."""
    return ModelSpec(
        task=config.task.name,
        options=config.task.options,
        cache=cache,
        include=config.resolved("parameters.include"),
        exclude=config.resolved("parameters.exclude"),
        device=device_of(config),
        fingerprint=fingerprint,
    )


def model_spec(run: RunDirectory, fingerprint: str | None) -> ModelSpec:
    """Return the spec of a run's model. If a fingerprint is given, the loaded model must have that fingerprint.

    Raises:
        RunDirectoryError: the run was imported and has no model.
    """
    config = run.config
    if config.task.name == IMPORTED_TASK:
        raise RunDirectoryError(
            f"{run.path} was imported from a file and has no model: use only factorize, query and report"
        )
    return model_of(config, run.task_cache, fingerprint)


def fitted_examples(run: RunDirectory) -> FittedExamples:
    """Return the selection of the fitted examples from the run file."""
    wanted, weights = run.config.factorization, run.config.resolved("factorization.example_weights")
    return FittedExamples(run.fishers, run.table("examples"), wanted.examples, wanted.max_probability, weights)


def inspection_of(config: RunConfig) -> tuple[SketchSpec, int | Literal["auto"], int]:
    """Return the argument of `TaskWorker.inspect`: sketch, batch size, and memory limit of a batch in bytes."""
    return config.fishers.sketch, config.fishers.batch_size, config.fishers.memory_limit_mb * 2**20
