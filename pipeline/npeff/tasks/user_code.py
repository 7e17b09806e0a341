"""Errors in a user's own code, said in one line: what was asked of it, what it raised, and where in it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from npeff.errors import as_one_line
from npeff.tasks.base import TaskError

_PASSED_ON: tuple[type[Exception], ...] = (TaskError, MemoryError, torch.OutOfMemoryError)
"""Clear as they are, or not the code's fault."""
_LONGEST_REASON = 400


@contextmanager
def user_code(what: str, module: str, passed_on: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn whatever the body raises, `SystemExit` too, into a `TaskError`; its cause is what was raised.

    Args:
        what: is done in the body, such as "task 'my_task:MyTask': logits()".
        module: whose line is named, the deepest one that was being executed.
        passed_on: further exceptions to leave as they are.
    """
    try:
        yield
    except (*_PASSED_ON, *passed_on):
        raise
    except (Exception, SystemExit) as error:
        shown = as_one_line(error, _LONGEST_REASON)
        raise TaskError(f"{what} raised {type(error).__name__}: {shown}{_place(error, module)}") from error


def _place(error: BaseException, module: str) -> str:
    if isinstance(error, SyntaxError):  # which names the place itself
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    source = getattr(sys.modules.get(module), "__file__", frames[-1].filename)  # absent where it cannot be imported
    lines = [frame.lineno for frame in frames if frame.filename == source]
    return f" ({Path(source).name}, line {lines[-1]})" if source and lines else ""
