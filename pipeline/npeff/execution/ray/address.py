"""The check that Ray answers at an address, before Ray connects to it."""

from __future__ import annotations

import os
import re
import socket

from npeff.execution.executor import ExecutorError

_HOST_AND_PORT = re.compile(r"([^/]+):([0-9]+)")
_CONNECTS_WITHIN_S = 10.0
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a client of gRPC sends first: the preface of HTTP/2 and an empty frame of settings (RFC 9113, section 3.4)."""
_SETTINGS = b"\4"
"""Type of the frame that a server of HTTP/2 sends first: its settings."""


def check_is_ray(address: str) -> None:
    """Check that a server of Ray's kind, one of gRPC, answers at an address of the form ``host:port``.

    Without any server, Ray retries for minutes and then ends this process. With a server of another kind, it waits.
    Other addresses are not checked.

    Raises:
        ExecutorError: No server answers, or one of another kind.
    """
    if (host_and_port := _HOST_AND_PORT.fullmatch(address)) is None:
        return
    host, port = host_and_port[1], int(host_and_port[2])
    remedy = "start it with `ray start --head`, or set executor.address: local"
    try:
        with socket.create_connection((host, port), timeout=_CONNECTS_WITHIN_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(4)
    except TimeoutError:
        answer = b""
    except (OSError, OverflowError) as error:
        raise ExecutorError(f"cannot reach Ray at {address!r} ({error}): {remedy}") from None
    if answer[3:4] != _SETTINGS:
        raise ExecutorError(f"the server at {address!r} is not Ray's (the port of `ray start` is 6379): {remedy}")
