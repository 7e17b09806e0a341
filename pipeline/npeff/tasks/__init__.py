"""The interface of a task (`Task`), and the built-in tasks.

Public names are imported on first use: reading the options of a task needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npeff.tasks.base import IGNORED as IGNORED
    from npeff.tasks.base import UNKNOWN as UNKNOWN
    from npeff.tasks.base import Examples as Examples
    from npeff.tasks.base import Inputs as Inputs
    from npeff.tasks.base import Task as Task
    from npeff.tasks.base import Token as Token
    from npeff.tasks.base import to_device as to_device
    from npeff.tasks.embedded_tokens import TokenTable as TokenTable
    from npeff.tasks.embedded_tokens import token_inputs as token_inputs
    from npeff.tasks.errors import TaskError as TaskError
    from npeff.tasks.loading import load_task as load_task
    from npeff.tasks.user_exceptions import user_code as user_code

_MODULES = {
    "IGNORED": "base",
    "UNKNOWN": "base",
    "Examples": "base",
    "Inputs": "base",
    "Task": "base",
    "TaskError": "errors",
    "Token": "base",
    "TokenTable": "embedded_tokens",
    "load_task": "loading",
    "to_device": "base",
    "token_inputs": "embedded_tokens",
    "user_code": "user_exceptions",
}
"""Public names, and the modules of this package that define them."""


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(_MODULES)
