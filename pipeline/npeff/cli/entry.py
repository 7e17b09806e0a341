"""The entry point of the ``npeff`` command, which can be interrupted while its modules are imported.

This module imports nothing else of this package, so that the handler is in place within milliseconds.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_INTERRUPTED = 130


def command() -> NoReturn:
    """Run the ``npeff`` command as a process."""
    with interruptible():
        from npeff.cli.main import command as run

        run()


@contextmanager
def interruptible() -> Iterator[None]:
    """Make an interrupt, or a request to terminate, end the process with one line and `EXIT_INTERRUPTED`."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("npeff: interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
