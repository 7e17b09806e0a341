"""What a user supplies (`Task`), and the tasks that ship with the package."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.tasks.base import Examples, Task, TaskError, to_device

__all__ = ["Examples", "Task", "TaskError", "load_task", "to_device"]

_BUILT_IN = {
    "digits": "pipeline.tasks.digits:DigitsTask",
    "huggingface-sequence-classification": "pipeline.tasks.huggingface:SequenceClassificationTask",
}


def load_task(name: str, options: dict[str, Any]) -> Task:
    """The task ``name`` (a built-in name, or ``my_package.my_task:MyTask``), constructed with ``options``.

    Raises:
        TaskError: there is no such task, or it does not take these options.
    """
    path = _BUILT_IN.get(name, name)
    module_name, _, class_name = path.partition(":")
    if not class_name:
        known = ", ".join(_BUILT_IN)
        raise TaskError(f"unknown task {name!r}: use one of {known}, or the import path my_package.my_task:MyTask")
    try:
        task_class = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        hint = "; pip install 'npeff-pipeline[hf]'" if error.name in ("transformers", "tokenizers") else ""
        raise TaskError(f"cannot import task {name!r}: {error}{hint}") from None
    except AttributeError:
        raise TaskError(f"cannot import task {name!r}: {module_name} has no {class_name}") from None
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise TaskError(f"task {name!r} is not a subclass of pipeline.tasks.Task")
    try:
        task: Task = task_class(**options)
    except TypeError as error:
        raise TaskError(f"task {name!r} does not take these options: {error}") from None
    return task
