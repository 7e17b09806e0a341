"""What Ray prints while a run is connected to it.

Ray prints messages of its servers on the standard output of the driver, with ``log_to_driver=False`` too: a lost node,
a worker that was killed for its memory, or the end of a server. If its raylet ends, it prints the last twenty lines of
the log of the raylet, twice, nearly all of which are notes and statistics. These are left out, and what remains, errors
in the log included, is printed once, on standard error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ray._private import worker

_NO_ERROR = re.compile(r"\s*\[(\d{4}-\d\d-\d\d [\d:,]+ [DIW] |state-dump\])")
"""A line of the log of a server: a note or a warning, with its time and severity, or a part of a dump of statistics."""

_ANNOUNCEMENT = re.compile(r" Last \d+ lines of the \w+ logs:\Z")
"""What precedes lines of a log, if none of them is left."""

_print: Callable[..., None] = worker.print_to_stdstream


def without_notes(message: str) -> str:
    """Return a message of Ray without the notes in the log of a server that it quotes.

    Lines between two notes, such as those of a table of statistics, are part of the first one.
    """
    kept, in_note = list[str](), False
    for line in message.splitlines():
        if re.match(r"\s*\[", line):
            in_note = _NO_ERROR.match(line) is not None
        if not in_note and line.strip():
            kept.append(line)
    return _ANNOUNCEMENT.sub("", "\n".join(kept))


def shorten_messages() -> None:
    """Make Ray print its messages without notes, each once, on standard error, from now on in this process."""
    seen = set[str]()

    def printed(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        lines = [line for message in data["lines"] if (line := without_notes(message)) not in seen]
        seen.update(lines)
        if lines:
            _print({**data, "lines": lines, "is_err": True}, *arguments, **options)

    worker.print_to_stdstream = printed
