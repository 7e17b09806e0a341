"""Checks of a task that need neither its model nor its code: names and types of options, columns, files and labels.

Each check is also done where the value is used. Here, it is done in less than a second, before anything starts: this
module imports neither torch nor transformers.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any

from npeff.errors import did_you_mean
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.model_folder import ModelFolder, check_kind
from npeff.tasks.huggingface.options import MultipleChoiceOptions, PretrainedOptions
from npeff.tasks.labels import LabelOptions, distinct_names
from npeff.tasks.names import BUILT_IN, OPTIONS, how_to_import, present_path
from npeff.tasks.option_types import check_types
from npeff.tasks.tables import TableOptions

ROWS = 1000
"""Number of rows at the beginning of the data whose labels are checked."""

Facts = dict[str, str]
"""What a check has found, by its subject, for display."""


def check_task(name: str, options: Mapping[str, Any], *, files: bool = True) -> Facts:
    """Check a task.

    Args:
        name: A built-in name, or the import path ``my_package.my_task:MyTask``.
        options: Keyword arguments of the task.
        files: Whether this machine has the files of the data and of the model. Otherwise, only the options are checked.

    Returns:
        What the checks have found.

    Raises:
        TaskError: The task does not exist or does not take these options, a file or a column is missing, a label is not
            a class, or the model is one for another task.
    """
    if name not in BUILT_IN and ":" not in name:
        raise TaskError(
            f"unknown task {name!r}{did_you_mean(name, BUILT_IN)}: use one of {', '.join(BUILT_IN)}, or the import "
            "path my_package.my_task:MyTask"
        )
    if name not in OPTIONS:
        return _check_source(name, present_path(BUILT_IN.get(name, name)), options, files)
    made = _made(name, options)
    facts = {"task": f"{name}, {len(options)} options"}
    return facts | (_check_files(name, made) if files else {})


def _made(name: str, options: Mapping[str, Any]) -> TableOptions:
    """Return the options of a built-in task, checked."""
    module, _, class_name = OPTIONS[name].partition(":")
    kind = getattr(importlib.import_module(module), class_name)
    known = {each.name: each for each in fields(kind)}
    _check_names(name, options, known)
    required = [each for each, field in known.items() if field.default is MISSING and each not in options]
    if required:
        raise TaskError(f"task {name!r} needs task.options.{required[0]}: add this key")
    check_types(name, kind, options)
    made: TableOptions = kind(**options)
    return made


def _check_names(name: str, options: Collection[str], known: Collection[str]) -> None:
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) or f" (it takes: {', '.join(known) or 'none'})"
            raise TaskError(f"task {name!r} does not take task.options.{option}{hint}")


def _check_files(name: str, options: TableOptions) -> Facts:
    facts, model = {}, None
    if isinstance(options, PretrainedOptions):
        model = ModelFolder.read(options.model)
        facts["model"] = f"{options.model}: on the hub, not checked" if model is None else model.describe()
        if model is not None and options.adapter is None:
            check_kind(name, model)
    head = options.head(ROWS)
    if head is None:
        return facts | {"data": f"{options.data}: not checked"}
    shown = ", ".join(head.column_names)
    facts["data"] = f"{options.data}: columns {shown}"
    if isinstance(options, LabelOptions):
        column = options.named_columns().get("label_column", [])
        names = options.label_names or (model.class_names if model is not None else None)
        if column and names and not isinstance(options, MultipleChoiceOptions):
            found = options.labels(head, column[0], distinct_names(names))
            known = len(found) - found.null_count
            facts["labels"] = f"{known:,} of the first {len(head):,} rows have one of {len(names):,} classes"
    return facts


def _check_source(name: str, path: str, options: Mapping[str, Any], files: bool) -> Facts:
    """Check the class and the names of the options against the source of the task, which is not imported."""
    module, _, class_name = path.partition(":")
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        if files:
            raise TaskError(f"cannot import task {name!r}: there is no module {module}: {how_to_import(module)}")
        return {"task": f"{name}: {module} is not found here, not checked"}
    source = importlib.util.decode_source(found.loader.get_data(found.origin)) if _is_source(found) else ""  # type: ignore[union-attr]
    classes = _names_in(source)
    if classes and class_name not in classes:
        meant = did_you_mean(class_name, classes)
        raise TaskError(f"cannot import task {name!r}: {module} has no {class_name}{meant}: correct the name")
    parameters = _parameters_of(source, class_name)
    if parameters is None:
        return {"task": f"{name}: its options are checked when it starts"}
    _check_names(name, options, parameters)
    return {"task": f"{name}, {len(options)} options"}


def _is_source(spec: Any) -> bool:
    return bool(spec.origin.endswith(".py")) and hasattr(spec.loader, "get_data")


def _names_in(source: str) -> set[str]:
    """Return the names that a module may define; empty if its source does not show them."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return set()
    imported = [alias for node in nodes if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names]
    if any(alias.name == "*" for alias in imported):
        return set()
    defined = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = defined | assigned | {alias.asname or alias.name for alias in imported}
    return set() if "__getattr__" in names else names


def _parameters_of(source: str, class_name: str) -> list[str] | None:
    """Return the parameters of the constructor of a class; None if the source does not show them."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and each.name == "__init__" and each.args.kwarg is None:
                    return [argument.arg for argument in (*each.args.args[1:], *each.args.kwonlyargs)]
    return None
