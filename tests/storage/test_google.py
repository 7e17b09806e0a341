"""The requests for Google Cloud Storage, at a stand-in on the loopback interface that honours generation conditions.

The stand-in is written from the documentation of the XML interface. It shows what obstore sends and how this package
takes the answers; it does not show how Google's servers answer.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from lock_of_providers import assert_a_lock_changes_hands
from npeff.storage import object_lock, objects
from npeff.storage.buckets import forget_clients
from npeff.storage.errors import ObjectStoreError
from npeff.storage.location import location

RUN = "gs://runs/some/run"


class Objects(BaseHTTPRequestHandler):
    """The objects of one bucket, ``runs``: key to content, generation and time."""

    stored: ClassVar[dict[str, tuple[bytes, int, float]]] = {}
    lock = threading.Lock()

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/runs").lstrip("/")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.startswith("/runs/"):
            self._refuse(404, "NoSuchBucket")
            return
        with self.lock:
            known = self.stored.get(self._key())
            wanted = self.headers.get("x-goog-if-generation-match")
            if wanted is not None and int(wanted) != (known[1] if known else 0):
                self._refuse(412, "PreconditionFailed")
                return
            generation = time.time_ns()
            self.stored[self._key()] = content, generation, time.time()
        self._answer(200, ETag=f'"{generation}"', x_goog_generation=str(generation))

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if not self._key():
            prefix = query.get("prefix", [""])[0]
            found = [(key, each) for key, each in sorted(self.stored.items()) if key.startswith(prefix)]
            listed = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><ETag>{generation}</ETag><LastModified>"
                f"{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(changed))}</LastModified></Contents>"
                for key, (content, generation, changed) in found
            )
            self._answer(200, f"<ListBucketResult>{listed}</ListBucketResult>".encode())
            return
        if self._key() not in self.stored:
            self._refuse(404, "NoSuchKey")
            return
        content, generation, changed = self.stored[self._key()]
        headers = {"Last_Modified": formatdate(changed, usegmt=True), "ETag": f'"{generation}"'}
        self._answer(200, content, x_goog_generation=str(generation), **headers)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        if self.stored.pop(self._key(), None) is None:
            self._refuse(404, "NoSuchKey")
        else:
            self._answer(204)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[bytes, int, float]]]:
    Objects.stored = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Objects)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    account = {"gcs_base_url": f"http://127.0.0.1:{server.server_port}", "disable_oauth": True}
    account |= {"client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_BASE_URL", account["gcs_base_url"])
    monkeypatch.setattr(object_lock, "_POLL_S", 0.02)
    forget_clients()
    try:
        yield Objects.stored
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        forget_clients()


def test_objects_are_written_listed_and_deleted(google: dict[str, tuple[bytes, int, float]]) -> None:
    folder = location(RUN)
    objects.put_all({folder / name: name.encode() for name in ("a", "deep/b")})
    assert set(google) == {"some/run/a", "some/run/deep/b"}
    assert sorted(objects.files(folder)) == ["a", "deep/b"]
    assert objects.read_all([folder / "a", folder / "nothing"]) == [b"a", None]
    objects.remove_directory(folder)
    objects.delete([folder / "a"])
    assert google == {}
    with pytest.raises(ObjectStoreError, match=r"gs://elsewhere/a .*the bucket does not exist"):
        objects.put(location("gs://elsewhere/a"), b"")


def test_writes_are_conditional_on_the_generation(google: dict[str, tuple[bytes, int, float]]) -> None:
    path = location(f"{RUN}/a")
    assert objects.create(path, b"first")
    assert not objects.create(path, b"second")
    found = objects.find(path)
    assert found is not None
    assert found.version.version == str(google["some/run/a"][1])
    newer = objects.put_if(path, b"third", found.version)
    assert newer is not None
    assert objects.put_if(path, b"fourth", found.version) is None
    assert objects.put_if(path, b"fourth", newer) is not None
    assert path.read_bytes() == b"fourth"


def test_a_lock_is_held_by_one_released_and_taken_over(google: dict[str, tuple[bytes, int, float]]) -> None:
    assert_a_lock_changes_hands(location(f"{RUN}/.lock"))
