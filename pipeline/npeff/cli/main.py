"""The ``npeff`` command. It parses, calls `npeff.stages`, and prints; every mistake of a user ends in one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from npeff.cli.app import HELP, app
from npeff.cli.job_commands import EXIT_INTERRUPTED, status, submit
from npeff.cli.query_commands import query_app
from npeff.cli.stage_commands import stage_command
from npeff.errors import NpeffError
from npeff.stages import pipeline as stages

app.add_typer(query_app, name="query", context_settings=HELP)

EXIT_USER_ERROR = 2
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, what is finished is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, what is finished is kept",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}


for _name, _stage in stages.STAGES.items():
    if _name not in ("factorize", "lift", "report"):
        stage_command(_name, _stage)


app.command("status")(status)
app.command("submit")(submit)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; exit code 0 done, 1 `check` found damage, 2 a mistake that one line explains, 130
    interrupted and resumable."""

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


if __name__ == "__main__":
    main()
