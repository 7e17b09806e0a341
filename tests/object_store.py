"""An S3 server in a thread of the tests, on the loopback interface, whose answers a test can spoil.

`ObjectStore.faults` are asked, one after the other, for an answer to every request before the server is.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from npeff.storage.buckets import forget_clients
from werkzeug.serving import make_server

BUCKET = "runs"
Answer = tuple[str, str]
"""Status and error code."""

SLOW_DOWN: Answer = ("503 Slow Down", "SlowDown")
DENIED: Answer = ("403 Forbidden", "AccessDenied")
BROKEN: Answer = ("500 Internal Server Error", "InternalError")


@dataclass(frozen=True)
class Request:
    method: str
    key: str
    """Without the bucket."""
    query: dict[str, list[str]]

    @property
    def kind(self) -> str:
        """Such as PUT, LIST, DELETE many."""
        if self.method == "POST":
            return "DELETE many" if "delete" in self.query else "multipart"
        if self.method == "GET" and ("list-type" in self.query or "uploads" in self.query):
            return "LIST"
        return self.method


@dataclass
class ObjectStore:
    """The server; its URIs are ``s3://runs/...``."""

    endpoint: str = ""
    faults: list[Callable[[Request], Answer | None]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __call__(self, application: Any, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "").lstrip("/").partition("/")[2]
        request = Request(environ["REQUEST_METHOD"], path, parse_qs(environ["QUERY_STRING"], keep_blank_values=True))
        self.requests.append(request)
        for fault in list(self.faults):
            if (answer := fault(request)) is not None:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                body = f"<Error><Code>{answer[1]}</Code><Message>{answer[1]}, says the test</Message></Error>".encode()
                if request.method == "HEAD":  # has no body, and so no code
                    body = b""
                start_response(answer[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
                return [body]

        return application(environ, start_response)

    def objects(self) -> dict[str, Any]:
        """moto's own, by key."""
        return dict(get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys.items())

    def contents(self, uri: str) -> dict[str, bytes]:
        """Of all objects below a URI, by their path there."""
        prefix = uri.removeprefix(f"s3://{BUCKET}/").rstrip("/") + "/"
        return {k.removeprefix(prefix): v.value for k, v in self.objects().items() if k.startswith(prefix)}

    def released(self, lock: str) -> bool:
        """Whether nobody holds the lock with this key."""
        return lock not in self.objects() or json.loads(self.objects()[lock].value)["token"] == ""

    def uploads(self) -> list[Any]:
        """Multipart uploads in progress."""
        return list(get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].multiparts.values())

    @contextmanager
    def failing(
        self, answer: Answer, matches: Callable[[Request], bool], first: int = 0, count: int = 10**9
    ) -> Iterator[None]:
        """Answer so to `count` of the requests that match, from the `first` on."""
        seen = 0

        def fault(request: Request) -> Answer | None:
            nonlocal seen
            if not matches(request):
                return None
            seen += 1
            return answer if first < seen <= first + count else None

        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)


class _Handler(MotoRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serving() -> Iterator[ObjectStore]:
    store = ObjectStore()
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server(
        "127.0.0.1",
        0,
        lambda environ, start_response: store(application, environ, start_response),
        threaded=True,
        request_handler=_Handler,
    )
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(store: ObjectStore, cache: Path) -> dict[str, str]:
    """What a process that uses the server has in its environment."""
    return {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "XDG_CACHE_HOME": str(cache),
    }


@contextmanager
def emptied(store: ObjectStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """The server with an empty bucket, for this process."""
    for name, value in environment(store, cache).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    forget_clients()
    get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].reset()
    store.faults.clear()
    get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, "us-east-1")
    store.requests.clear()
    yield store
    store.faults.clear()


@contextmanager
def other_environment(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> Iterator[None]:
    """Clients, which are costly to make and kept, that have read other variables."""
    with monkeypatch.context() as changed:
        for name, value in variables.items():
            changed.delenv(name) if value is None else changed.setenv(name, value)
        forget_clients()
        yield
    forget_clients()
