"""One-line errors for exceptions in the user's code: the call, the exception and the line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from npeff.errors import as_one_line, hide_values, shows_values
from npeff.tasks.errors import TaskError

_PASSED_ON: tuple[type[Exception], ...] = (TaskError, MemoryError, torch.OutOfMemoryError)
"""Exceptions that are not converted, because they have a clear message or are not caused by the code."""
_LONGEST_REASON = 400


@contextmanager
def user_code(what: str, module: str, passed_on: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Convert an exception of the body, including `SystemExit`, to a `TaskError` with the exception as its cause.

    The error shows no value of an environment variable of the run file. An exception that shows one is not its cause.

    Args:
        what: Description of the body, such as "task 'my_task:MyTask': logits()".
        module: The module of the user. The message contains the innermost line of this module in the traceback.
        passed_on: Further exceptions that are not converted.
    """
    try:
        yield
    except (*_PASSED_ON, *passed_on) as error:
        hide_values(error)
        raise
    except (Exception, SystemExit) as error:
        shown = as_one_line(error, _LONGEST_REASON)
        problem = f"{what} raised {type(error).__name__}: {shown}{_place(error, module)}"
        raise TaskError(problem) from (None if shows_values(error) else error)


def _place(error: BaseException, module: str) -> str:
    if isinstance(error, SyntaxError):  # its message contains the line
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    source = getattr(
        sys.modules.get(module), "__file__", frames[-1].filename
    )  # absent if the module cannot be imported
    lines = [frame.lineno for frame in frames if frame.filename == source]
    return f" ({Path(source).name}, line {lines[-1]})" if source and lines else ""
