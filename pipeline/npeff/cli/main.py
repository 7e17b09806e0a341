"""The entry point of the ``npeff`` command: exit codes, signals, and errors as one line."""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import MetaPathFinder
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from npeff.cli import (
    demo_command,
    export_command,
    factorization_commands,
    file_commands,
    job_commands,
    label_command,
    query_commands,
    scale_command,
    share_commands,
    stage_commands,
    start_commands,
)
from npeff.cli.app import DEBUG, app
from npeff.cli.entry import EXIT_INTERRUPTED, interruptible
from npeff.cli.help_texts import command_path
from npeff.errors import NpeffError, as_one_line, printable, printable_traceback, without_values

COMMANDS = (
    demo_command,
    start_commands,
    stage_commands,
    factorization_commands,
    file_commands,
    export_command,
    job_commands,
    query_commands,
    label_command,
    share_commands,
    scale_command,
)
"""Modules that add commands to `app`."""

EXIT_USER_ERROR, EXIT_DEFECT = 2, 70
_COLLECTIONS_PER_FULL_ONE = 100
_RESUME = "finished work is kept: run the same command again to resume"
_SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full; finished work is kept: free some space and run the same command again to resume",
    errno.EDQUOT: "the disk quota is exceeded; finished work is kept: free some space and run the same command again",
    errno.EFBIG: f"a file is larger than the file system or the limit of this process (ulimit -f) allows; {_RESUME}",
    errno.EACCES: "permission denied: change the permissions, or choose another path",
    errno.EPERM: "permission denied: change the permissions, or choose another path",
    errno.EROFS: "the file system is read-only: choose a path on a writable file system",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter path",
    errno.ELOOP: "there are too many symbolic links: choose another path",
    errno.EIO: f"the disk failed (input/output error); {_RESUME} when the disk works",
    errno.ESTALE: f"the network file system has lost the file; {_RESUME}",
    errno.EMFILE: f"too many files are open; raise the limit (ulimit -n); {_RESUME}",
    errno.ENFILE: f"too many files are open on this machine; {_RESUME} later",
    errno.ENOMEM: f"the memory of this machine is exhausted; {_RESUME} when more is free",
}


class _WithoutPandas(MetaPathFinder):
    """Import hook that hides pandas from pyarrow.

    If pandas is installed, pyarrow imports it before the first conversion of a value. The import takes a second, and
    neither a query nor the demo needs pandas.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not used here", name=name)


def command() -> NoReturn:
    """Run the ``npeff`` command as a process: the entry point of the console script."""
    atexit.register(_leave_objects_uncollected)
    # A full collection reads the objects of all modules. During the import of torch there would be four.
    gc.set_threshold(*gc.get_threshold()[:2], _COLLECTIONS_PER_FULL_ONE)
    # Torch's threads sleep while they wait for each other. Spinning threads would take cores from other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.argv[1:2] in (["query"], ["demo"]):
        sys.meta_path.insert(0, _WithoutPandas())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows ?
    main()


@interruptible()
def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0, success; 1, `check` found damage, or nobody reads the output; 2, a user error, which prints one line
    with the fix; 70, a defect of this package, which prints one line with the file of the traceback; 130, interrupted
    and resumable.

    Args:
        arguments: Command-line arguments without the program name; by default, those of the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    debug = DEBUG in (words[: words.index("--")] if "--" in words else words)
    # zarr leaves a coroutine that is never awaited if it is interrupted while it starts a write
    warnings.filterwarnings("ignore", "coroutine '_runner' was never awaited", RuntimeWarning)
    with suppress(FileNotFoundError):  # the current directory may have been deleted
        sys.path.insert(0, os.getcwd())  # a task given by import path may be in the current directory
    try:
        code = _command_line()(arguments, prog_name="npeff", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer turns the exception into an exit code
            raise KeyboardInterrupt
        if sys.stdout is not None:  # it is None if the caller has closed it
            sys.stdout.flush()
        raise SystemExit(code)
    except NpeffError as error:
        _fail(str(error), shown=error if debug else None)
    except TyperException as error:
        _fail(_usage(error), shown=error if debug else None)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except BrokenPipeError:
        _close_output()
        raise SystemExit(1) from None
    except MemoryError:
        _fail(_SYSTEM_ERRORS[errno.ENOMEM])
    except Exception as error:
        shown = error if debug else None
        if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
            _fail(f"{error.filename or 'writing'}: {_SYSTEM_ERRORS[error.errno]}", shown=shown)
        _fail(f"{type(error).__name__}: {as_one_line(error)} ({_logged(error)})", EXIT_DEFECT, shown)


def _leave_objects_uncollected() -> None:
    """Exclude all objects from the collection at the exit of the interpreter, which takes a second with torch."""
    if "duckdb" not in sys.modules:  # its bindings report objects that are not collected
        gc.freeze()


@functools.cache  # reading the annotations of all commands takes a tenth of a second
def _command_line() -> Callable[..., Any]:
    """Return the commands of `app`, for any number of command lines of this process."""
    return typer.main.get_command(app)


def _close_output() -> None:
    """Discard what is left to write, so that the interpreter does not try to write it to the closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _logged(error: Exception) -> str:
    """Write the traceback of a defect to a file, without values of environment variables of the run file.

    Returns:
        The advice to report the file.
    """
    text = printable_traceback(error)
    try:
        descriptor, name = tempfile.mkstemp(".log", "npeff-defect-")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError:
        return "a defect of npeff; set TMPDIR to a writable folder, and run the command again to record its cause"
    return f"a defect of npeff; please report it with {name}"


def _usage(error: TyperException) -> str:
    """Return a description of a usage error with the help command to run."""
    message = error.format_message().replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    return f"{message.rstrip('.')} (see: {command_path(context)} --help)"


def _fail(message: str, code: int = EXIT_USER_ERROR, shown: BaseException | None = None) -> NoReturn:
    """Print an error as one line and exit. With ``--debug``, the traceback of `shown` and its causes precedes it."""
    if shown is not None:
        print(printable_traceback(shown), end="", file=sys.stderr)
    print("npeff: error: " + printable(" ".join(without_values(message).split())), file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _close_output()  # otherwise, the interpreter fails at its exit with another message and code
    raise SystemExit(code)
