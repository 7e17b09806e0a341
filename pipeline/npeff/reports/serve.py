"""The live view: a read-only web page of a run with its current report and query forms.

The server listens on the loopback interface only. A page of another site can still make a browser send requests to it.
Therefore,

- the Host header must contain the address of this server, which prevents DNS rebinding;
- queries with a Sec-Fetch-Site header of another site are refused;
- only GET and HEAD are supported, other sites cannot frame, cache or read a response, and the content security policy
  forbids every script except that of the report.

Other users of the same machine can connect, so do not serve a run that they must not see.
"""

from __future__ import annotations

import http.server
import sys
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.reports.report import environment, render_report

LOOPBACK = "127.0.0.1"
ROWS_SHOWN = 500
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
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


def serve(
    run_dir: str | Path,
    port: int,
    top_examples: int,
    say: Callable[[str], None],
    *,
    factorization: str | None = None,
) -> None:
    """Serve a run until Ctrl-C.

    Args:
        run_dir: The run directory.
        port: Port to listen on; 0 chooses a free port.
        top_examples: Number of top examples on a card of the report.
        say: Prints a line, such as the address.
        factorization: Name of the factorization. The default is as in `ComponentStore.open`.

    Raises:
        QueryError: The path is not a run directory, or the port is not available.
    """
    ComponentStore.open(run_dir, factorization)
    with make_server(run_dir, port, top_examples, factorization) as server:
        try:
            say(f"serving {run_dir} at http://{LOOPBACK}:{server.server_port}/ until Ctrl-C")
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


class Server(http.server.ThreadingHTTPServer):
    """The server of one run. Requests in progress do not delay its end."""

    daemon_threads = True

    def __init__(self, run_dir: str | Path, port: int, top_examples: int, factorization: str | None = None) -> None:
        self.run_dir, self.factorization, self.top_examples = run_dir, factorization, top_examples
        self.templates = environment()
        super().__init__((LOOPBACK, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore closed connections."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def make_server(run_dir: str | Path, port: int, top_examples: int, factorization: str | None = None) -> Server:
    """Return a listening server, which the caller must close. Raises `QueryError` if the port is not available."""
    try:
        return Server(run_dir, port, top_examples, factorization)
    except OSError as error:
        reason = "is in use" if not isinstance(error, PermissionError) else "needs more permissions"
        raise QueryError(f"port {port} {reason}: choose another port, or --port 0 for a free one") from error


class Handler(http.server.BaseHTTPRequestHandler):
    """Handler of one request. It opens the store again, so that the response shows the current state of the run."""

    server: Server
    server_version, sys_version = "npeff", ""
    timeout = 60  # seconds without data on a connection

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if not self._host_is_ours():
            return self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "This server accepts requests to its own address only.")
        if address.query and self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            return self._refuse(HTTPStatus.FORBIDDEN, "Queries from other sites are refused.")
        asked = {name: values[0].strip() for name, values in parse_qs(address.query).items()}
        try:
            self._answer(address.path, asked)
        except QueryError as error:
            self._page(HTTPStatus.BAD_REQUEST, address.path, asked, problem=str(error))

    do_HEAD = do_GET

    def _answer(self, path: str, asked: dict[str, str]) -> None:
        store = ComponentStore.open(self.server.run_dir, self.server.factorization)
        if path == "/":
            self._page(HTTPStatus.OK, path, asked)
        elif path == "/report":
            page = render_report(store, self.server.top_examples)
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), _REPORT_POLICY)
        elif path == "/style.css":
            style = self.server.templates.get_template("report.css").render()
            style += self.server.templates.get_template("serve.css").render()
            self._send(HTTPStatus.OK, "text/css; charset=utf-8", style.encode())
        elif path == "/image":
            self._image(store, _whole(asked, "example"))
        elif path in QUESTIONS:
            self._page(HTTPStatus.OK, path, asked, answer=QUESTIONS[path](store, asked), store=store)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "This page does not exist.")

    def _image(self, store: ComponentStore, example: int) -> None:
        rows = store.tables.read("examples", ["image"], pc.field("example") == example)
        image = rows["image"][0].as_py() if len(rows) else None
        if image is None or not image.startswith(b"\x89PNG\r\n\x1a\n"):
            return self._refuse(HTTPStatus.NOT_FOUND, "This example has no image.")
        self._send(HTTPStatus.OK, "image/png", image)

    def _page(
        self,
        status: HTTPStatus,
        path: str,
        asked: dict[str, str],
        *,
        answer: pa.Table | None = None,
        store: ComponentStore | None = None,
        problem: str = "",
    ) -> None:
        """Send the page with the query forms, the current query, and its result or error."""
        page = self.server.templates.get_template("serve.html.j2").render(
            run_dir=str(self.server.run_dir),
            path=path,
            asked=asked,
            problem=problem,
            pictured=_pictured(store, answer) if path == "/top" and store and answer is not None else set(),
            **_shown(answer),
        )
        self._send(status, "text/html; charset=utf-8", page.encode())

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{reason}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes, policy: str = _POLICY) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _host_is_ours(self) -> bool:
        port = self.server.server_port
        hosts = [f"{name}:{port}" for name in (LOOPBACK, "localhost")]
        return self.headers.get("Host", "").lower() in (hosts if port != 80 else [*hosts, LOOPBACK, "localhost"])

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Log nothing, because queries may contain data."""


def _top(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    split, where = asked.get("split") or None, asked.get("where") or None
    return store.top_examples(_whole(asked, "component"), _whole(asked, "n", 20), split, where)


def _enriched(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.enriched(asked.get("where", ""), split=asked.get("split") or None)


def _example(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.example(asked.get("example", ""))


def _similar(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.similar_components(_whole(asked, "component"), _whole(asked, "n", 10))


def _sql(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.sql(asked.get("query", ""))


QUESTIONS: dict[str, Callable[[ComponentStore, dict[str, str]], pa.Table]] = {
    "/top": _top,
    "/enriched": _enriched,
    "/example": _example,
    "/similar": _similar,
    "/sql": _sql,
}


def _whole(asked: dict[str, str], name: str, default: int | None = None) -> int:
    text = asked.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or len(text) > 12:
        raise QueryError(f"{name} must be a whole number, not '{text}'")
    return int(text)


def _pictured(store: ComponentStore, answer: pa.Table) -> set[int]:
    """Return the examples of the result that have an image."""
    where = pc.field("example").isin(answer["example"].combine_chunks()) & pc.field("image").is_valid()
    return set(store.tables.read("examples", ["example"], where)["example"].to_pylist())


def _shown(answer: pa.Table | None) -> dict[str, Any]:
    """Return the first rows of a result, without empty columns."""
    if answer is None:
        return {"columns": None, "rows": [], "n_rows": 0}
    names = [name for name in answer.column_names if answer[name].null_count < len(answer)] or answer.column_names
    rows = answer.select(names).slice(0, ROWS_SHOWN).to_pylist()
    return {"columns": names, "rows": [[row[name] for name in names] for row in rows], "n_rows": len(answer)}
