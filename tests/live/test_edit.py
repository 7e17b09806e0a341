"""Names and notes of components, which the live view changes with ``--edit`` only."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlencode

import pytest
from live_server import Reply, ask, running
from npeff.live.server import LiveServer
from npeff.query.components import ComponentStore

pytestmark = pytest.mark.process

HOSTILE = """<script>alert(1)</script>"'><img src=x>"""


def key_of(server: LiveServer) -> str:
    return re.findall(r'name="key" value="([^"]+)"', ask(server, "/component/1").text)[0]


def send(server: LiveServer, path: str = "/component/1", origin: str | None = "own", **fields: str) -> Reply:
    origin = f"http://127.0.0.1:{server.port}" if origin == "own" else origin
    kind = "application/x-www-form-urlencoded"
    return ask(server, path, "POST", urlencode(fields).encode(), Origin=origin, Content_Type=kind)


def test_a_name_and_a_note_are_stored_shown_and_deleted(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    for server in running(path, edit=True):
        key = key_of(server)
        reply = send(server, key=key, name=f"  round {HOSTILE}", note="two\r\nlines")
        assert (reply.status, reply.headers["Location"]) == (303, "/component/1")
        stored = ComponentStore.open(path).annotations.of_component[1]
        assert (stored.name, stored.note) == (f"round {HOSTILE}", "two lines")
        for page in ("/component/1", "/", "/component/0", "/example/3", "/?q=round", "/step", "/report"):
            text = ask(server, page).text
            assert "round &lt;script&gt;" in text, page
            assert HOSTILE not in text, page
        assert "1 of 4 components" in ask(server, "/?q=two+lines").text
        assert send(server, key=key, name="", note="").status == 303
        assert "round" not in ask(server, "/").text
        assert not ComponentStore.open(path).annotations.of_component


def test_what_is_not_a_form_of_this_server_changes_nothing(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    for server in running(path, edit=True):
        key = key_of(server)
        for origin in ("https://evil.example", "null", None, f"http://127.0.0.1:{server.port + 1}"):
            assert send(server, origin=origin, key=key, name="x").status == 403
        assert send(server, key="x" * len(key), name="x").status == 403
        assert send(server, name="x").status == 403
        assert ask(server, f"/component/1?key={key}&name=x").status == 200
        kind = {"Content_Type": "application/x-www-form-urlencoded", "Origin": f"http://127.0.0.1:{server.port}"}
        body = urlencode({"key": key, "name": "x"}).encode()
        assert ask(server, "/component/1", "POST", body, Cookie=None, **kind).status == 403
        assert send(server, key=key, name="x" * 201).status == 400
        assert send(server, path="/component/9", key=key, name="x").status == 400
        assert send(server, path="/component/x", key=key, name="x").status == 404
        assert send(server, key=key, name="x" * 200_000).status == 413
        assert not ComponentStore.open(path).annotations.of_component


def test_without_the_option_nothing_can_be_changed(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    for server in running(path):
        assert 'name="key"' not in ask(server, "/component/1").text
        key = server.live._key
        assert send(server, key=key, name="x").status == 405
        assert not ComponentStore.open(path).annotations.of_component
