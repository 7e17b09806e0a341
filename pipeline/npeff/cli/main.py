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

from npeff.cli import file_commands, job_commands, query_commands, stage_commands
from npeff.cli.app import app
from npeff.cli.job_commands import EXIT_INTERRUPTED
from npeff.errors import NpeffError

COMMANDS = (stage_commands, file_commands, job_commands, query_commands)
"""Modules that add commands to `app`."""

EXIT_USER_ERROR = 2
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, what is finished is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, what is finished is kept",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}


class _WithoutPandas(MetaPathFinder):
    """Hides pandas from pyarrow, which imports it, where it is installed, before the first conversion of a value. That
    takes a second, and no answer needs it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not used here", name=name)


def command() -> NoReturn:
    """The process of the ``npeff`` command."""
    if sys.argv[1:2] == ["query"]:
        sys.meta_path.insert(0, _WithoutPandas())
    main()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0, done; 1, `check` found damage; 2, a user error, explained in one line; 130, interrupted and
    resumable.
    """

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # zarr leaves a coroutine behind where it is interrupted as it hands over a write, which is not done then
    warnings.filterwarnings("ignore", "coroutine '_runner' was never awaited", RuntimeWarning)
    sys.path.insert(0, os.getcwd())  # tasks named by import path may lie beside the run file's user
    try:
        code = app(arguments, prog_name="npeff", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer has made an exit code of the exception
            raise KeyboardInterrupt
        raise SystemExit(code)
    except NpeffError as error:
        _fail(str(error))
    except TyperException as error:
        _fail(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        print("npeff: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'writing'}: {_DISK_ERRORS[error.errno]}")


def _usage(error: TyperException) -> str:
    """What is wrong with the command line, and which help to read."""
    message = error.format_message().replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    command = context.command_path.replace("{", "").replace("}", "")
    return f"{message.rstrip('.')} (see: {command} --help)"


def _fail(message: str) -> NoReturn:
    print("npeff: error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR)
