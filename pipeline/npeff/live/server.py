"""The server of the live view, on the loopback interface.

`npeff.live.access` describes who may ask, `npeff.live.connections` the limits of connections, and `npeff.live.limits`
those of queries. Other users of the same machine can connect, but have no token.
"""

from __future__ import annotations

import functools
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn

from npeff.errors import hidden_variables
from npeff.live.access import LOOPBACK, Access
from npeff.live.app import Limits, Live
from npeff.live.connections import LimitedConnection
from npeff.live.limits import prepare
from npeff.live.pages import View
from npeff.live.queries import MODULES
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.runs.directory import RunDirectory

_BACKLOG = 64
_ENDS_S = 1
"""Time in seconds that requests in progress have when the server is stopped."""


def serve(
    run_dir: str | Path,
    port: int,
    top_examples: int,
    say: Callable[[str], None],
    *,
    factorization: str | None = None,
    beside: str | None = None,
    edit: bool = False,
) -> None:
    """Serve a run until Ctrl-C.

    Args:
        run_dir: The run directory.
        port: Port to listen on; 0 chooses a free port.
        top_examples: Number of top examples on a card.
        say: Prints a line, such as the address.
        factorization: Name of the factorization. The default is as in `ComponentStore.open`.
        beside: Directory of another run, whose groups of inputs the report shows beside those of this run.
        edit: Whether names and notes of components can be changed.

    Raises:
        QueryError: The path is not a run directory, or the port is not available.
    """
    ComponentStore.open(run_dir, factorization)
    with make_server(run_dir, port, top_examples, factorization, beside, edit=edit) as server:
        try:
            say(f"serving {run_dir} at {server.address} until Ctrl-C")
            server.serve()
        except KeyboardInterrupt:
            say("stopped")


def serve_run(run: RunDirectory, port: int, say: Callable[[str], None], *, edit: bool = False) -> None:
    """Serve a run as `serve` does, with the settings of its run file."""
    serve(run.path, port, say=say, factorization=run.name, edit=edit, **run.config.report.arguments())


class LiveServer:
    """A listening server of one run. Use it as a context, which closes it."""

    def __init__(self, view: View, port: int, limits: Limits) -> None:
        self.socket = socket.socket()
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((LOOPBACK, port))
            self.socket.listen(_BACKLOG)
        except BaseException:
            self.socket.close()
            raise
        self.port: int = self.socket.getsockname()[1]
        self.token = secrets.token_urlsafe(24)
        self.live = Live(view, limits)
        config = uvicorn.Config(
            Access(self.live.app(), self.port, self.token),
            http=functools.partial(LimitedConnection, limits.connection),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,  # queries may contain data
            log_level=logging.CRITICAL + 1,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_ENDS_S,
        )
        self._server = uvicorn.Server(config)

    @property
    def address(self) -> str:
        """The address to open, with the token."""
        return f"http://{LOOPBACK}:{self.port}/?token={self.token}"

    def serve(self) -> None:
        """Answer requests until `stop`, or Ctrl-C."""
        threading.Thread(target=self.live.workspace.warm, name="warm", daemon=True).start()
        self._server.run(sockets=[self.socket])

    def stop(self) -> None:
        """Let `serve` return, from another thread."""
        self._server.should_exit = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
        self.live.close()


def make_server(
    run_dir: str | Path,
    port: int,
    top_examples: int,
    factorization: str | None = None,
    beside: str | None = None,
    limits: Limits | None = None,
    edit: bool = False,
) -> LiveServer:
    """Return a listening server, which the caller must close. Raises `QueryError` if the port is not available."""
    view = View(str(run_dir), factorization, top_examples, beside, hidden_variables(), edit)
    try:
        server = LiveServer(view, port, limits or Limits())
    except OSError as error:
        reason = "is in use" if not isinstance(error, PermissionError) else "needs more permissions"
        raise QueryError(f"port {port} {reason}: choose another port, or --port 0 for a free one") from error
    prepare(MODULES)
    return server
