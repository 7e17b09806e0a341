"""Access to the live view: who may ask, and what a browser may do with an answer.

The server listens on the loopback interface only. A page of another site can still make a browser send requests to it,
and other users of the machine can connect to it. Therefore,

- the Host header must contain the address of this server, which prevents DNS rebinding;
- requests that another site caused are refused, by their headers Sec-Fetch-Site and Origin;
- a request needs the token of this server, which is in the printed address. The first request with the token in its
  address sets a cookie, and is sent on to the address without the token;
- a request that sends something must come from a page of this server, by its Origin header and the key in its form;
- other sites cannot frame, cache or read an answer, and the content security policy allows only this server's script.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npeff.errors import printable_traceback

LOOPBACK = "127.0.0.1"
READING = ("GET", "HEAD")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Connection": "close",
}
_POLICY = (
    "default-src 'none'; style-src {styles}; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
POLICY = _POLICY.format(styles="'self'")
STYLED_POLICY = _POLICY.format(styles="'self' 'unsafe-inline'")
"""Policy of pages with bars or pictures of a card, which have styles of their own."""
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
"""The report also contains its own policy with the hash of its script. The browser enforces both policies."""

_DEFECT = "An internal error has occurred. The terminal of the command shows it."


class Access:
    """Middleware that answers a request only if it is allowed.

    Args:
        app: The application with the pages.
        port: The port of the server.
        token: The token, which the address or the cookie must contain.
    """

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self._app, self._port, self._token = app, port, token
        self._cookie = f"npeff-{port}"  # a cookie is sent to all ports of a host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", POLICY)
            await send(message)

        if scope["type"] != "http":
            return
        answer = self._refusal(request := Request(scope, receive)) or self._entrance(request)
        try:
            await (answer or self._app)(scope, receive, with_headers)
        except ConnectionError:  # the client has left
            return
        except Exception as error:
            print(printable_traceback(error), end="", file=sys.stderr)
            if not started:
                await text(HTTPStatus.INTERNAL_SERVER_ERROR, _DEFECT)(scope, receive, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """Return the refusal of a request that this server must not answer, whoever sent it."""
        hosts = [f"{name}:{self._port}" for name in (LOOPBACK, "localhost")]
        hosts += [LOOPBACK, "localhost"] if self._port == 80 else []
        if [host.lower() for host in request.headers.getlist("Host")] not in [[host] for host in hosts]:
            return text(HTTPStatus.MISDIRECTED_REQUEST, "This server accepts requests to its own address only.")
        sites, origins = (request.headers.getlist(name) for name in ("Sec-Fetch-Site", "Origin"))
        own = {f"http://{host}" for host in hosts}
        from_here = all(site in ("same-origin", "none") for site in sites)
        if not from_here or any(origin.lower() not in own for origin in origins):
            return text(HTTPStatus.FORBIDDEN, "Requests from other sites are refused. Enter the address in a new tab.")
        if request.method not in READING and not origins and "same-origin" not in sites:
            return text(HTTPStatus.FORBIDDEN, "A form must be sent from a page of this server.")
        return None

    def _entrance(self, request: Request) -> Response | None:
        """Return the answer to a request without a valid cookie; None for one that has it."""
        given = request.query_params.get("token")
        if given is not None and self._is_token(given):
            others = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
            path = "/" + request.scope["path"].lstrip("/")  # a second slash would be the address of a host
            response = RedirectResponse(path + ("?" + urlencode(others) if others else ""), HTTPStatus.SEE_OTHER)
            response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
            return response
        if self._is_token(request.cookies.get(self._cookie, "")):
            return None
        return text(HTTPStatus.FORBIDDEN, "Open the address that the command has printed: it contains a token.")

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode("utf-8", "surrogateescape"), self._token.encode())


def text(status: int, line: str) -> PlainTextResponse:
    """Return an answer of one line."""
    return PlainTextResponse(f"{line}\n", status)


def first_values(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the first value of every parameter, without spaces around it."""
    found: dict[str, str] = {}
    for name, value in pairs:
        found.setdefault(name, value.strip())
    return found
