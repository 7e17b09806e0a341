"""The pages of the live view by their addresses.

A page with a fixed query is made in this process, from what is in memory (`npeff.live.workspace`). A query by a person
can take any time and memory, and runs in a process of its own with limits. So does the report. What needs the model
runs in one further process, which stays (`npeff.live.model_client`).
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from npeff.errors import NpeffError, without_values
from npeff.live.access import POLICY, REPORT_POLICY, STYLED_POLICY, first_values, text
from npeff.live.connections import ConnectionLimits
from npeff.live.limits import CallLimits, LimitExceededError, call_limited
from npeff.live.pages import Page, View
from npeff.live.queries import QUESTIONS, REPORT, answer, forms, is_fixed, whole
from npeff.live.templates import page, script, style
from npeff.live.with_model import ModelPages
from npeff.live.workspace import Workspace
from npeff.query.errors import QueryError

_MOST_PARAMETERS = 20
_FORM_BYTES = 2**17
_DEFECT = text(
    HTTPStatus.INTERNAL_SERVER_ERROR, "An internal error has occurred. The terminal of the command shows it."
)


@dataclass(frozen=True)
class Limits:
    """Limits of the server."""

    connection: ConnectionLimits = field(default_factory=ConnectionLimits)
    queries: int = 4
    """Queries at the same time. Further ones wait."""
    query: CallLimits = field(default_factory=lambda: CallLimits(30, 2 * 2**30, 16 * 2**20))
    upload_bytes: int = 16 * 2**20
    """Size of the largest example of one's own."""
    report: CallLimits = field(default_factory=lambda: CallLimits(300, 8 * 2**30, 512 * 2**20))


class Live:
    """The pages of one run.

    Args:
        view: What is served.
        limits: Limits of the queries.
    """

    def __init__(self, view: View, limits: Limits) -> None:
        self.view, self.limits = view, limits
        self._key = secrets.token_urlsafe(24)
        self.workspace = Workspace(view, self._key)
        self.model_pages = ModelPages(view, self.workspace, self._key)
        self.cached_report = Page(HTTPStatus.OK, "", b"")
        self._queries, self._rendering = asyncio.Semaphore(limits.queries), asyncio.Lock()
        self._model = asyncio.Lock()

    def app(self) -> Starlette:
        """Return the application."""
        pages = {
            "/": self.workspace.overview,
            "/component/{component}": self.workspace.component,
            "/example/{example:path}": self.workspace.example,
            "/image": self.workspace.image,
            "/try": self.model_pages.own_example,
        }
        routes = [Route(path, functools.partial(self._fixed, made)) for path, made in pages.items()]
        routes += [
            Route("/query", self._forms),
            Route("/query/{question}", self._question),
            Route("/report", self._report),
            Route("/style.css", _constant(style)),
            Route("/live.js", _constant(script)),
            Route("/step", self._step),
            Route("/try", self._tried, methods=["POST"]),
        ]
        if self.view.edit:
            routes.append(Route("/component/{component}", self._annotated, methods=["POST"]))
        handlers: dict[Any, Any] = {HTTPException: self._refused, Exception: lambda request, error: _DEFECT}
        return Starlette(routes=routes, exception_handlers=handlers)

    def close(self) -> None:
        """End the process of the model."""
        self.model_pages.process.close()

    async def _fixed(self, made: Callable[[dict[str, str]], Page], request: Request) -> Response:
        """Answer with a page that is made in a thread of this process."""
        asked = {**_asked(request), **request.path_params}
        return await self._made(made, asked)

    async def _tried(self, request: Request) -> Response:
        """Answer with the components of an example of one's own."""
        form = await self._form(request, self.limits.upload_bytes)
        given = {name.removeprefix("column:"): value for name, value in form.items() if name.startswith("column:")}
        return await self._with_model(request, self.model_pages.tried, given)

    async def _step(self, request: Request) -> Response:
        """Answer with the form of a step, or with what a step does."""
        return await self._with_model(request, self.model_pages.step, _asked(request))

    async def _with_model(self, request: Request, made: Callable[..., Page], asked: Any) -> Response:
        """Answer when the model is free, unless the client has left meanwhile, as a slider does that moves on."""
        async with self._model:
            if await request.is_disconnected():
                raise ConnectionAbortedError("the client has closed the connection")
            return await self._made(made, asked)

    async def _annotated(self, request: Request) -> Response:
        """Store the name and the note of a component, and send the browser back to its page."""
        form = await self._form(request, _FORM_BYTES)
        try:
            number = whole(request.path_params, "component")
            name, note = (value if isinstance(value := form.get(key, ""), str) else "" for key in ("name", "note"))
            await asyncio.to_thread(self.workspace.annotate, number, name, note)
        except NpeffError as error:
            return _response(self._problem(error))
        return RedirectResponse(f"/component/{number}", HTTPStatus.SEE_OTHER)

    async def _form(self, request: Request, most_bytes: int) -> dict[str, str | bytes]:
        """Return the fields of a form that this server has made."""
        length = request.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise HTTPException(HTTPStatus.LENGTH_REQUIRED)
        if int(length) > most_bytes:
            line = f"The form has more than {most_bytes / 2**20:.3g} MiB."
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, line)
        found: dict[str, str | bytes] = {}
        async with request.form(max_files=4, max_fields=_MOST_PARAMETERS, max_part_size=most_bytes) as form:
            for name, value in form.multi_items():
                text_of = value.replace("\r\n", "\n").strip() if isinstance(value, str) else await value.read()
                found.setdefault(name, text_of)
        key = found.pop("key", "")
        if not isinstance(key, str) or not secrets.compare_digest(key.encode("utf-8", "replace"), self._key.encode()):
            raise HTTPException(HTTPStatus.FORBIDDEN, "The form is not of this server: load its page again.")
        return found

    async def _made(self, made: Callable[..., Page], *arguments: Any) -> Response:
        try:
            return _response(await asyncio.to_thread(made, *arguments))
        except NpeffError as error:
            return _response(self._problem(error))
        except asyncio.CancelledError:  # the server ends, and must not wait for the model
            self.close()
            raise

    async def _forms(self, request: Request) -> Response:
        return _response(forms(self.view, "", {}, HTTPStatus.OK))

    async def _question(self, request: Request) -> Response:
        question, asked, limits = request.path_params["question"], _asked(request), self.limits.query
        if question not in QUESTIONS:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        if is_fixed(question, asked):
            return _response(await asyncio.to_thread(self.workspace.question, question, asked))
        try:
            async with self._turn():
                return _response(await self._limited(request, (self.view, question, asked, ""), limits))
        except LimitExceededError as error:
            problem = f"the query {error}: select fewer rows or columns, or use `npeff query`, which has no limits"
            return _response(forms(self.view, question, asked, HTTPStatus.BAD_REQUEST, problem=problem))

    async def _report(self, request: Request) -> Response:
        """Answer with the report. It is rendered if the run has changed since the last request."""
        try:
            async with self._turn(), self._rendering:
                known = self.cached_report.state
                made = await self._limited(request, (self.view, REPORT, {}, known), self.limits.report)
                if made.state and made.state != known:
                    self.cached_report = made
                return _response(self.cached_report if made.state else made)
        except LimitExceededError as error:
            line = f"This page {error}. Use `npeff report` to write the report."
            return text(HTTPStatus.SERVICE_UNAVAILABLE, line)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait until fewer queries are running."""
        try:
            await asyncio.wait_for(self._queries.acquire(), self.limits.query.seconds)
        except TimeoutError:
            line = "Other queries are still running. Try again later."
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, line) from None
        try:
            yield
        finally:
            self._queries.release()

    async def _limited(self, request: Request, arguments: tuple[Any, ...], limits: CallLimits) -> Page:
        """Return a page that is made in a process of its own, which ends when the client leaves."""
        async with _client(request) as client:
            found = await asyncio.to_thread(_call, arguments, limits, client)
        if not found:
            raise HTTPException(HTTPStatus.INTERNAL_SERVER_ERROR)
        return Page.from_bytes(found)

    async def _refused(self, request: Request, error: HTTPException) -> Response:
        if error.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
            return _DEFECT
        said = {HTTPStatus.NOT_FOUND: "This page does not exist."}
        return text(error.status_code, said.get(HTTPStatus(error.status_code), f"{error.detail}"))

    def _problem(self, error: NpeffError) -> Page:
        status = HTTPStatus.NOT_FOUND if isinstance(error, QueryError) else HTTPStatus.BAD_REQUEST
        return page("problem.html.j2", status, view=self.view, problem=without_values(str(error)))


def _call(arguments: tuple[Any, ...], limits: CallLimits, client: socket.socket) -> bytes:
    with client:
        return call_limited(answer, arguments, limits, client)


@asynccontextmanager
async def _client(request: Request) -> AsyncIterator[socket.socket]:
    """Yield a socket whose other end is closed when the client closes its connection. The callee closes the socket."""
    here, there = socket.socketpair()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        here.close()

    watching = asyncio.create_task(watch())
    try:
        yield there
    finally:
        watching.cancel()
        here.close()


def _asked(request: Request) -> dict[str, str]:
    """Return the parameters of the address."""
    pairs = request.query_params.multi_items()
    if len(pairs) > _MOST_PARAMETERS:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "The address has too many parameters.")
    return first_values(pairs)


def _response(made: Page) -> Response:
    policy = REPORT_POLICY if made.state else STYLED_POLICY if made.styled else POLICY
    return Response(made.content, made.status, {"Content-Security-Policy": policy}, made.kind)


def _constant(made: Callable[[], Page]) -> Callable[[Request], Any]:
    async def answered(request: Request) -> Response:
        return _response(made())

    return answered
