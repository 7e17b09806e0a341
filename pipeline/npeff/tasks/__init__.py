"""The interface of a task (`Task`), and the built-in tasks."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from npeff.tasks.base import IGNORED, UNKNOWN, Examples, Inputs, Task, TaskError, Token, to_device
from npeff.tasks.embedded_tokens import TokenTable, token_inputs
from npeff.tasks.option_types import check_types
from npeff.tasks.user_code import user_code

__all__ = [
    "IGNORED",
    "UNKNOWN",
    "Examples",
    "Inputs",
    "Task",
    "TaskError",
    "Token",
    "TokenTable",
    "load_task",
    "to_device",
    "token_inputs",
    "user_code",
]

_HUGGING_FACE = "npeff.tasks.huggingface"
_BUILT_IN = {
    "digits": "npeff.tasks.digits:DigitsTask",
    "sklearn-table": "npeff.tasks.sklearn_table:SklearnTableTask",
    "gaussian-textures": "npeff.tasks.gaussian_textures:GaussianTexturesTask",
    "compiled-rules": "npeff.tasks.planted.compiled:CompiledRulesTask",
    "trained-rules": "npeff.tasks.planted.trained:TrainedRulesTask",
    "tracr-program": "npeff.tasks.planted.tracr:TracrProgramTask",
    "coloured-digits": "npeff.tasks.planted.coloured_digits:ColouredDigitsTask",
    "planted-heuristics": "npeff.tasks.planted.heuristics:PlantedHeuristicsTask",
    "huggingface-sequence-classification": f"{_HUGGING_FACE}.sequence_classification:SequenceClassificationTask",
    "huggingface-token-classification": f"{_HUGGING_FACE}.token_classification:TokenClassificationTask",
    "huggingface-image-classification": f"{_HUGGING_FACE}.image_classification:ImageClassificationTask",
    "huggingface-causal-lm": f"{_HUGGING_FACE}.causal_lm:CausalLMTask",
    "huggingface-seq2seq-lm": f"{_HUGGING_FACE}.seq2seq_lm:Seq2SeqLMTask",
    "huggingface-multiple-choice": f"{_HUGGING_FACE}.multiple_choice:MultipleChoiceTask",
}


_MOVED = {
    "pipeline.tasks.compiled": "npeff.tasks.planted.compiled",
    "pipeline.tasks.heuristics": "npeff.tasks.planted.heuristics",
}
"""Modules of tasks that have moved since version 0.1, when the package was called ``pipeline``."""


def _present_path(path: str) -> str:
    """Return the current import path of a task, for a path that a run of version 0.1 may have stored."""
    module, separator, name = path.partition(":")
    if module.partition(".")[0] == "pipeline":
        module = _MOVED.get(module, module.replace("pipeline.", "npeff.", 1))
    return module + separator + name


def load_task(name: str, options: dict[str, Any]) -> Task:
    """Construct a task.

    Args:
        name: A built-in name, or the import path ``my_package.my_task:MyTask``.
        options: Keyword arguments of the task.

    Raises:
        TaskError: The task does not exist, does not take these options, or its code raised an exception.
    """
    path = _present_path(_BUILT_IN.get(name, name))
    module_name, _, class_name = path.partition(":")
    if not class_name or not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        known = ", ".join(_BUILT_IN)
        raise TaskError(f"unknown task {name!r}: use one of {known}, or the import path my_package.my_task:MyTask")
    try:
        with user_code(f"task {name!r}: importing {module_name}", module_name, passed_on=(ModuleNotFoundError,)):
            task_class = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        raise TaskError(f"cannot import task {name!r}: {error}: {_how_to_import(error.name or '')}") from None
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
    if name in _BUILT_IN:
        check_types(name, task_class, options)
    with user_code(f"task {name!r}: {class_name}()", task_class.__module__):
        task: Task = task_class(**options)
    return task


def _how_to_import(module: str) -> str:
    if module in ("transformers", "tokenizers"):
        return "pip install 'npeff-pipeline[hf]'"
    if module.partition(".")[0] == "pipeline":
        return "the package is imported as npeff: from npeff.tasks import Task, Examples"
    return f"install it, or run npeff in the folder that contains {module}, or add that folder to PYTHONPATH"
