"""The process with the model, as the server sees it. It starts with the first request, and stays."""

from __future__ import annotations

import json
import signal
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from npeff.errors import NpeffError
from npeff.live.limits import PROCESSES
from npeff.live.pages import View

PATIENCE_S = 300.0
"""Time in seconds after which a request fails. The first one loads the model."""

_ENDS_S = 2.0
"""Time in seconds that the process has to end itself."""


class ModelError(NpeffError):
    """The model cannot answer a request."""


class ModelProcess:
    """The process. Its requests are answered one at a time.

    Args:
        view: What is served.
    """

    def __init__(self, view: View) -> None:
        self._view, self._lock = view, threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the result of a method of `npeff.live.model.RunModel`.

        Args:
            do: The request, see `npeff.live.model.answer_requests`.
            arguments: Its arguments, which are sent as JSON.

        Raises:
            ModelError: The model cannot answer, or takes too long, or its process has ended.
        """
        with self._lock:
            connection = self._connection or self._start()
            try:
                connection.send_bytes(json.dumps({"do": do, **arguments}).encode())
                if not connection.poll(PATIENCE_S):
                    self.close()
                    raise ModelError(f"the model takes more than {PATIENCE_S:g} s: use the commands of npeff")
                answer: dict[str, Any] = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                self.close()
                raise ModelError(
                    "the process of the model has ended, perhaps because the memory is full: try again"
                ) from None
        if "found" in answer:
            found: dict[str, Any] = answer["found"]
            return found
        raise ModelError(answer["problem"] or "an internal error has occurred; the terminal of the command shows it")

    def close(self) -> None:
        """End the process. The next request starts it again."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is not None:
            process.terminate()  # which lets it release what the operating system keeps, such as semaphores
            process.join(_ENDS_S)
            process.kill()
            process.join()
        if connection is not None:
            connection.close()

    def _start(self) -> Connection:
        here, there = PROCESSES.Pipe()
        arguments = (there, self._view.run_dir, self._view.factorization, self._view.hidden)
        self._process = PROCESSES.Process(target=_answer_requests, args=arguments, daemon=True)
        self._process.start()
        there.close()
        self._connection = here
        return here


def _answer_requests(*arguments: Any) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    from npeff.live.model import answer_requests  # imports torch, which the other processes do not need

    answer_requests(*arguments)
