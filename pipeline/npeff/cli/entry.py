"""The entry point of the ``npeff`` command, which can be interrupted while its modules are imported."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def command() -> NoReturn:
    """Run the ``npeff`` command as a process."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        from npeff.cli.main import command as run
    except KeyboardInterrupt:
        print("npeff: interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None
    run()
