"""Construction of the task that a run file names."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from npeff.tasks.base import Task
from npeff.tasks.errors import TaskError
from npeff.tasks.names import BUILT_IN, how_to_import, present_path
from npeff.tasks.option_types import check_types
from npeff.tasks.user_exceptions import user_code


def load_task(name: str, options: dict[str, Any]) -> Task:
    """Construct a task.

    Args:
        name: A built-in name, or the import path ``my_package.my_task:MyTask``.
        options: Keyword arguments of the task.

    Raises:
        TaskError: The task does not exist, does not take these options, or its code raised an exception.
    """
    path = present_path(BUILT_IN.get(name, name))
    module_name, _, class_name = path.partition(":")
    if not class_name or not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        known = ", ".join(BUILT_IN)
        raise TaskError(f"unknown task {name!r}: use one of {known}, or the import path my_package.my_task:MyTask")
    try:
        with user_code(f"task {name!r}: importing {module_name}", module_name, passed_on=(ModuleNotFoundError,)):
            task_class = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        raise TaskError(f"cannot import task {name!r}: {error}: {how_to_import(error.name or '')}") from None
    if task_class is None:
        raise TaskError(f"cannot import task {name!r}: {module_name} has no {class_name}: correct the name")
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise TaskError(f"task {name!r} is not a subclass of npeff.tasks.Task: derive it from this class")
    if inspect.isabstract(task_class):
        undefined = ", ".join(sorted(task_class.__abstractmethods__))
        raise TaskError(f"task {name!r} does not define {undefined}: define each of them")
    signature = inspect.signature(task_class)
    try:
        signature.bind(**options)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "none"
        raise TaskError(f"task {name!r} does not take these task.options: {error} (it takes: {takes})") from None
    if name in BUILT_IN:
        check_types(name, getattr(task_class, "Options", None) or vars(task_class)["__init__"], options)
    with user_code(f"task {name!r}: {class_name}()", task_class.__module__):
        task: Task = task_class(**options)
    return task
