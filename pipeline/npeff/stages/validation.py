"""Checks of a run file that need neither the model nor the code of the task, before Ray starts or weights are loaded.

This module imports neither torch nor Ray.
"""

from __future__ import annotations

from pathlib import Path

from npeff.execution.ray.jobs import in_job
from npeff.options.labels import MOST_CLASSES
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.config_sections import IMPORTED_TASK
from npeff.tasks.checks import Facts, check_task
from npeff.tasks.huggingface.model_folder import ModelFolder
from npeff.tasks.names import LANGUAGE_MODELS
from npeff.variables import literal, resolved

_FILES = ("verification.ablation_origin", "step.towards")
"""Keys whose values are files."""


def validate(config: RunConfig, *, files: bool = True) -> Facts:
    """Check a run file.

    Args:
        config: The configuration.
        files: Whether this machine has the files and the environment variables of the workers. Otherwise, only the
            names and types of options are checked.

    Returns:
        What the checks have found, by subject, for display.

    Raises:
        TaskError: As in `check_task`.
        ConfigError: A file is missing, or the labels do not fit the model.
        VariableError: An environment variable is not set.
    """
    name, options = config.task.name, config.task.options
    if name == IMPORTED_TASK:
        return {"task": "imported from a file, without a model"}
    if not files:
        if literal([name, options]) != [name, options]:
            return {"task": f"{name}: not checked"}
        check_task(name, options, files=False)
        return {"task": f"{name}: options only checked"}
    name, options = resolved(name, "task.name"), resolved(options, "task.options")
    facts = check_task(name, options)
    if name in LANGUAGE_MODELS:
        _check_labels(config, name, options["model"])
    for key in _FILES:
        if (path := config.resolved(key)) is not None and "://" not in path and not Path(path).is_file():
            raise ConfigError(f"{key}: there is no file {path}: correct the path, or remove the key")
    return facts


def validate_for_workers(config: RunConfig) -> None:
    """Check the run file with `validate`. Workers of a cluster may have other files than this machine.

    Raises the errors of `validate`.
    """
    local = config.executor.kind == "serial" or config.resolved("executor.address") == "local"
    validate(config, files=local and not in_job())


def _check_labels(config: RunConfig, name: str, model: str) -> None:
    """Check that labels of a language model do not need an entry for each of too many tokens."""
    folder = ModelFolder.read(model)
    vocabulary = None if folder is None else folder.vocabulary
    if vocabulary is not None and vocabulary > MOST_CLASSES and config.fishers.labels in ("exact", "truncated"):
        raise ConfigError(
            f"fishers.labels: {config.fishers.labels} supports at most {MOST_CLASSES:,} classes, and the vocabulary of "
            f"{name} has {vocabulary:,} tokens: set fishers.labels: sampled and fishers.rank: 4"
        )
