"""The live view: a read-only web server of a run with its current report and query forms.

The server listens on the loopback interface only. A page of another site can still make a browser send requests to it.
Therefore,

- the Host header must contain the address of this server, which prevents DNS rebinding;
- requests that another site caused are refused, by their headers Sec-Fetch-Site and Origin;
- only GET and HEAD are supported, other sites cannot frame, cache or read a response, and the content security policy
  forbids every script except that of the report.

`Limits` bounds what a client can use. Python's HTTP server suffices, because each connection is one request of the
user's browser, and because a thread can wait for the client and for the result of the query at the same time.

Other users of the same machine can connect, so do not serve a run that they must not see.
"""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from npeff.errors import hidden_variables, printable_traceback
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.reports.limits import CallLimits, LimitExceededError, call_limited, prepare
from npeff.reports.pages import MODULES, QUESTIONS, TEXT, Page, View, answer, forms, style

LOOPBACK = "127.0.0.1"

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
"""The report also contains its own policy with the hash of its script. The browser enforces both policies."""

_MOST_PARAMETERS = 20


_QUERY = CallLimits(seconds=30, memory_bytes=2 * 2**30, result_bytes=16 * 2**20)
_REPORT = CallLimits(seconds=300, memory_bytes=8 * 2**30, result_bytes=512 * 2**20)


@dataclass(frozen=True)
class Limits:
    """Limits of the server."""

    connections: int = 32
    """Connections at the same time. Further ones are closed."""
    request_s: float = 10
    """Time in seconds in which a client must have sent its request."""
    response_s: float = 300
    """Time in seconds in which a client must have read the response."""
    queries: int = 4
    """Queries at the same time. Further ones wait."""
    query: CallLimits = _QUERY
    report: CallLimits = _REPORT


def serve(
    run_dir: str | Path,
    port: int,
    top_examples: int,
    say: Callable[[str], None],
    *,
    factorization: str | None = None,
    beside: str | None = None,
) -> None:
    """Serve a run until Ctrl-C.

    Args:
        run_dir: The run directory.
        port: Port to listen on; 0 chooses a free port.
        top_examples: Number of top examples on a card of the report.
        say: Prints a line, such as the address.
        factorization: Name of the factorization. The default is as in `ComponentStore.open`.
        beside: Directory of another run, whose groups of inputs the report shows beside those of this run.

    Raises:
        QueryError: The path is not a run directory, or the port is not available.
    """
    ComponentStore.open(run_dir, factorization)
    with make_server(run_dir, port, top_examples, factorization, beside) as server:
        try:
            say(f"serving {run_dir} at http://{LOOPBACK}:{server.server_port}/ until Ctrl-C")
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


class Server(http.server.ThreadingHTTPServer):
    """The server of one run. Requests in progress do not delay its end."""

    daemon_threads = True

    def __init__(self, view: View, port: int, limits: Limits) -> None:
        self.view, self.limits = view, limits
        self.queries = threading.BoundedSemaphore(limits.queries)
        self._connections = threading.BoundedSemaphore(limits.connections)
        self.cached_report, self._rendering = Page(HTTPStatus.OK, "", b""), threading.Lock()
        super().__init__((LOOPBACK, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection, or close the connection if there are too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore closed connections."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def report(self, client: socket.socket) -> Page:
        """Return the report. It is rendered if the run has changed since the last request."""
        with self._rendering:
            known = self.cached_report.state
            page = _read(call_limited(answer, (self.view, "/report", {}, known), self.limits.report, client))
            if page.state and page.state != known:
                self.cached_report = page
            return self.cached_report if page.state else page


def make_server(
    run_dir: str | Path,
    port: int,
    top_examples: int,
    factorization: str | None = None,
    beside: str | None = None,
    limits: Limits | None = None,
) -> Server:
    """Return a listening server, which the caller must close. Raises `QueryError` if the port is not available."""
    view = View(str(run_dir), factorization, top_examples, beside, hidden_variables())
    try:
        server = Server(view, port, limits or Limits())
    except OSError as error:
        reason = "is in use" if not isinstance(error, PermissionError) else "needs more permissions"
        raise QueryError(f"port {port} {reason}: choose another port, or --port 0 for a free one") from error
    prepare(MODULES)
    return server


class Handler(http.server.BaseHTTPRequestHandler):
    """Handler of one request."""

    server: Server
    server_version, sys_version = "npeff", ""

    def setup(self) -> None:
        super().setup()
        self._deadline = threading.Timer(self.server.limits.request_s, self._end)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> None:
        self._deadline.cancel()
        super().finish()

    def parse_request(self) -> bool:
        """Read the header of the request, which must end before the deadline."""
        try:
            return super().parse_request()
        finally:
            self._deadline.cancel()
            self.connection.settimeout(self.server.limits.response_s)

    def _end(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the client has closed it
            return

    def do_GET(self) -> None:
        if (refusal := self._refusal()) is not None:
            return self._refuse(*refusal)
        try:
            page = self._answer()
        except ConnectionError:
            raise
        except Exception as error:
            print(printable_traceback(error), end="", file=sys.stderr)
            page = _DEFECT
        self._send(page)

    do_HEAD = do_GET

    def _refusal(self) -> tuple[HTTPStatus, str] | None:
        """Return the reason why a request must not be answered, if there is one."""
        port = self.server.server_port
        hosts = [f"{name}:{port}" for name in (LOOPBACK, "localhost")]
        hosts += [LOOPBACK, "localhost"] if port == 80 else []
        if [host.lower() for host in self.headers.get_all("Host", [])] not in [[host] for host in hosts]:
            return HTTPStatus.MISDIRECTED_REQUEST, "This server accepts requests to its own address only."
        from_here = all(site in ("same-origin", "none") for site in self.headers.get_all("Sec-Fetch-Site", []))
        own = {f"http://{host}" for host in hosts}
        if not from_here or any(origin.lower() not in own for origin in self.headers.get_all("Origin", [])):
            return HTTPStatus.FORBIDDEN, "Requests from other sites are refused. Enter the address in a new tab."
        return None

    def _answer(self) -> Page:
        try:
            address = urlsplit(self.path)
        except ValueError:  # an absolute address with brackets, or with characters that look like others
            return _text(HTTPStatus.BAD_REQUEST, "This is not an address.")
        path = address.path
        try:
            asked = parse_qs(address.query, max_num_fields=_MOST_PARAMETERS)
        except ValueError:
            return _text(HTTPStatus.BAD_REQUEST, "The address has too many parameters.")
        if path == "/style.css":
            return style()
        first = {name: values[0].strip() for name, values in asked.items()}
        if path == "/":
            return forms(self.server.view, path, first, HTTPStatus.OK)
        if path not in (*QUESTIONS, "/report", "/image"):
            return _text(HTTPStatus.NOT_FOUND, "This page does not exist.")
        return self._limited(path, first)

    def _limited(self, path: str, asked: dict[str, str]) -> Page:
        """Return a page that is computed in another process."""
        server, limits = self.server, self.server.limits.query
        if not server.queries.acquire(timeout=limits.seconds):
            return _text(HTTPStatus.SERVICE_UNAVAILABLE, "Other queries are still running. Try again later.")
        try:
            if path == "/report":
                return server.report(self.connection)
            return _read(call_limited(answer, (server.view, path, asked, ""), limits, self.connection))
        except LimitExceededError as error:
            if path in QUESTIONS:
                problem = f"the query {error}: select fewer rows or columns, or use `npeff query`, which has no limits"
                return forms(server.view, path, asked, HTTPStatus.BAD_REQUEST, problem=problem)
            return _text(HTTPStatus.SERVICE_UNAVAILABLE, f"This page {error}. Use `npeff report` to write the report.")
        finally:
            server.queries.release()

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(_text(status, reason))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that is not valid HTTP, or that has another method."""
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def _send(self, page: Page) -> None:
        self.send_response(page.status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", _REPORT_POLICY if page.state else _POLICY)
        self.send_header("Content-Type", page.kind)
        self.send_header("Content-Length", str(len(page.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.content)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Log nothing, because queries may contain data."""


def _read(result: bytes) -> Page:
    return Page.from_bytes(result) if result else _DEFECT


def _text(status: HTTPStatus, text: str) -> Page:
    return Page(status, TEXT, f"{text}\n".encode())


_DEFECT = _text(
    HTTPStatus.INTERNAL_SERVER_ERROR, "An internal error has occurred. The terminal of the command shows it."
)
