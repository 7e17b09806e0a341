"""A server of the live view in a thread, and requests to it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from npeff.live.server import LiveServer, make_server


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str


def running(path: Path, limits: Any = None, **options: Any) -> Iterator[LiveServer]:
    with make_server(path, 0, top_examples=4, limits=limits, **options) as made:
        thread = threading.Thread(target=made.serve)
        thread.start()
        try:
            yield made
        finally:
            made.stop()
            thread.join()


def served(path: Path) -> tuple[subprocess.Popen[str], str]:
    """A process of the live view in a group of its own, as a terminal starts it, and the line with its address."""
    script = (
        "import sys; from npeff.live.server import serve\n"
        "serve(sys.argv[1], 0, 4, lambda line: print(line, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ), start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout.readline()


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit code, the rest of the output and the complaints of a process after Ctrl-C in its terminal."""
    os.killpg(process.pid, signal.SIGINT)
    rest, complaints = process.communicate(timeout=60)
    return process.returncode, rest, complaints


def cookie(server: LiveServer) -> str:
    return f"npeff-{server.port}={server.token}"


def ask(server: LiveServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str | None) -> Reply:
    """Send a request with the cookie; a header of None is left out."""
    given = {name.replace("_", "-"): value for name, value in ({"Cookie": cookie(server)} | headers).items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, body, {name: value for name, value in given.items() if value is not None})
    answer = connection.getresponse()
    content = answer.read().decode("utf-8", errors="replace")
    connection.close()
    return Reply(answer.status, {name.title(): value for name, value in answer.getheaders()}, content)


def header(server: LiveServer) -> bytes:
    return f"Host: 127.0.0.1:{server.port}\r\nCookie: {cookie(server)}\r\n\r\n".encode()


def raw(server: LiveServer, request: bytes) -> bytes:
    """What the server sends before it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))
