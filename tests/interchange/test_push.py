"""`npeff push` against a stub of the hub on this machine: what is sent, and what is said if the hub refuses."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from in_process import command, refused
from npeff.runs.directory import RunDirectory

TOKEN = "hf_secretsecretsecret"
OID = "0" * 40


class StubHub(ThreadingHTTPServer):
    """The part of the hub's interface that an upload uses. It takes every file within the commit itself."""

    daemon_threads = True

    def __init__(self) -> None:
        self.received: list[tuple[str, str, Any]] = []
        self.refuses: int | None = None
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> dict[str, bytes]:
        """The files of the commit."""
        (lines,) = [body for _, path, body in self.received if "/commit/" in path]
        rows = [json.loads(line) for line in lines.splitlines()]
        files = [each["value"] for each in rows if each["key"] == "file"]
        return {each["path"]: base64.b64decode(each["content"]) for each in files}


class _Handler(BaseHTTPRequestHandler):
    server: StubHub

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.received.append((self.headers.get("Authorization", ""), self.path, content))
        if self.server.refuses is not None:
            return self._answer(self.server.refuses, {"error": f"{TOKEN} may not write"})
        if self.path.endswith("/repos/create"):
            return self._answer(200, {"url": f"{self.server.address}/datasets/owner/name", "id": "owner/name"})
        if "/preupload/" in self.path:
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for each in json.loads(content)["files"]]  # fmt: skip
            return self._answer(200, {"files": files})
        if "/commit/" in self.path:
            return self._answer(
                200, {"commitUrl": f"{self.server.address}/datasets/owner/name/commit/{OID}", "commitOid": OID}
            )
        return self._answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._answer(200, {"id": "owner/name", "siblings": [], "sha": "0" * 40})

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    with StubHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield server
        server.shutdown()


def test_a_push_creates_a_private_repository_and_sends_the_bundle_in_one_commit(
    lifted_run: RunDirectory, hub: StubHub, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("push", lifted_run.path, "hf://owner/name", "--no-texts", "--license", "mit") == 0
    assert f"push: complete, at {hub.address}/datasets/owner/name" in capfd.readouterr().out
    (created,) = [json.loads(body) for _, path, body in hub.received if path.endswith("/repos/create")]
    assert (created["name"], created["organization"], created["type"]) == ("name", "owner", "dataset")
    assert created.get("private") or created.get("visibility") == "private"  # by the version of the client
    assert {authorization for authorization, *_ in hub.received} == {f"Bearer {TOKEN}"}
    files = hub.files()
    assert {"index.html", "README.md", "run.yaml", "tables/components.parquet"} <= files.keys()
    assert files["README.md"].decode().startswith("---\nlicense: mit\n")
    assert not any(TOKEN.encode() in content for content in files.values())


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_of_the_hub_is_one_line_without_the_token(
    lifted_run: RunDirectory, hub: StubHub, capfd: pytest.CaptureFixture[str], status: int
) -> None:
    hub.refuses = status
    line = refused(capfd, "push", lifted_run.path, "hf://owner/name")
    assert line.startswith("npeff: error: cannot push to hf://owner/name: ")
    assert TOKEN not in line


def test_without_a_token_or_an_address_nothing_is_sent(
    lifted_run: RunDirectory, hub: StubHub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("owner/name", "hf://name", "hf://a/b/c", "s3://a/b", "hf://models/a/b/"):
        assert "is not an address of the hub: give hf://OWNER/NAME" in refused(capfd, "push", lifted_run.path, address)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no access token of the hub" in refused(capfd, "push", lifted_run.path, "hf://owner/name")
    assert hub.received == []


def test_a_hub_that_cannot_be_reached_is_one_line(
    lifted_run: RunDirectory, hub: StubHub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of discard, where nothing listens
    assert "cannot push to hf://owner/name: " in refused(capfd, "push", lifted_run.path, "hf://owner/name")
