"""Connections with limits: their number, the time to send a request, and the time to read the answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections of a server."""

    connections: int = 32
    """Connections at the same time. Further ones are closed."""
    request_s: float = 10
    """Time in seconds in which a client must have sent the header of its request."""
    response_s: float = 300
    """Time in seconds in which a client must have read the answer, or sent the rest of a form."""


class LimitedConnection(H11Protocol):
    """One connection. It carries one request, because every answer closes it; what follows the request is not read."""

    def __init__(self, limits: ConnectionLimits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            transport.close()
        self._allow(self._limits.request_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._allow(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_read:
            return
        has_header = self.cycle is not None
        super().data_received(data)
        if self._is_read:
            self._allow(None)
            self.flow.resume_reading()  # to notice that the client leaves
        elif self.cycle is not None and not has_header:
            self._allow(self._limits.response_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._allow(self._limits.response_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._allow(None)

    def on_response_complete(self) -> None:
        self._allow(self._limits.response_s)
        super().on_response_complete()

    @property
    def _is_read(self) -> bool:
        """Whether the request has been read."""
        return self.cycle is not None and not self.cycle.more_body

    def _allow(self, seconds: float | None) -> None:
        """End the connection after this time; None for no deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
