"""The entry point of the ``npeff`` command: exit codes, signals, and errors as one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from npeff.cli import (
    demo_command,
    factorization_commands,
    file_commands,
    job_commands,
    query_commands,
    stage_commands,
)
from npeff.cli.app import app
from npeff.cli.job_commands import EXIT_INTERRUPTED
from npeff.errors import NpeffError, printable, printable_traceback, without_values

COMMANDS = (demo_command, stage_commands, factorization_commands, file_commands, job_commands, query_commands)
"""Modules that add commands to `app`."""

EXIT_USER_ERROR = 2
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; finished work is kept: free some space and run the same command again to resume",
    errno.EDQUOT: "the disk quota is exceeded; finished work is kept: free some space and run the same command again",
    errno.EACCES: "permission denied: change the permissions, or choose another path",
    errno.EPERM: "permission denied: change the permissions, or choose another path",
    errno.EROFS: "the file system is read-only: choose a path on a writable file system",
}


class _WithoutPandas(MetaPathFinder):
    """Import hook that hides pandas from pyarrow.

    If pandas is installed, pyarrow imports it before the first conversion of a value. The import takes a second, and no
    query needs pandas.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not used here", name=name)


def command() -> NoReturn:
    """Run the ``npeff`` command as a process: the entry point of the console script."""
    # Torch's threads sleep while they wait for each other. Spinning threads would take cores from other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.argv[1:2] == ["query"]:
        sys.meta_path.insert(0, _WithoutPandas())
    sys.excepthook = _show_defect
    main()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0, success; 1, `check` found damage; 2, a user error, which prints one line with the fix; 130,
    interrupted and resumable.

    Args:
        arguments: Command-line arguments without the program name; by default, those of the process.
    """

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # zarr leaves a coroutine that is never awaited if it is interrupted while it starts a write
    warnings.filterwarnings("ignore", "coroutine '_runner' was never awaited", RuntimeWarning)
    sys.path.insert(0, os.getcwd())  # a task given by import path may be in the current directory
    try:
        code = app(arguments, prog_name="npeff", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer turns the exception into an exit code
            raise KeyboardInterrupt
        raise SystemExit(code)
    except NpeffError as error:
        _fail(str(error))
    except TyperException as error:
        _fail(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        print("npeff: interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'writing'}: {_DISK_ERRORS[error.errno]}")


def _show_defect(_kind: object, error: BaseException, _trace: object) -> None:
    """Print the traceback of a defect of this package, without values of environment variables of the run file."""
    print(printable_traceback(error), end="", file=sys.stderr)


def _usage(error: TyperException) -> str:
    """Return a description of a usage error with the help command to run."""
    message = error.format_message().replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    command = context.command_path.replace("{", "").replace("}", "")
    return f"{message.rstrip('.')} (see: {command} --help)"


def _fail(message: str) -> NoReturn:
    print("npeff: error: " + printable(" ".join(without_values(message).split())), file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR)
