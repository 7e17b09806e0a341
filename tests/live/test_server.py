from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import multiprocessing
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from urllib.parse import urlencode

import pytest
from live_server import ask, cookie, header, interrupted, raw, running, served
from npeff.live import app
from npeff.live.app import Limits
from npeff.live.connections import ConnectionLimits
from npeff.live.limits import CallLimits
from npeff.live.queries import ROWS_SHOWN
from npeff.live.server import LiveServer as Server
from npeff.live.server import make_server
from npeff.query.errors import QueryError

pytestmark = pytest.mark.process

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>"""


@pytest.fixture(scope="module")
def server(run) -> Iterator[Server]:
    yield from running(run.path)


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def question(name: str, **values: object) -> str:
    return f"/query/{name}?{urlencode(values)}"


def digest(path: Path) -> dict[str, str]:
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return {str(item): hashlib.sha256(item.read_bytes()).hexdigest() for item in files}


def test_questions_are_answered_and_nothing_is_written(server: Server, run) -> None:
    before = digest(run.path)
    top = ask(server, question("top", component=2, n=3, split="held_out"))
    assert top[0] == 200
    assert '<h2 id="answer-title">3 rows</h2>' in top[2]
    assert top[2].count("/image?example=") == 3
    assert ask(server, question("example", example="digit-0003"))[0] == 200
    similar = ask(server, question("similar", component=2, n=4))[2]
    assert similar.count('<td class="num"><a href="/component/') == 4
    counted = ask(server, question("sql", query="select count(*) as n from examples"))[2]
    assert '<td class="num">360</td>' in counted
    assert 'id="component-3"' in ask(server, "/report")[2]
    assert all(ask(server, path)[0] == 200 for path in ("/", "/query", "/component/2", "/example/3"))
    assert "--ink" in ask(server, "/style.css")[2]
    assert digest(run.path) == before


def test_the_inputs_of_an_example_are_drawn_and_those_of_a_component_are_listed(informed_run) -> None:
    for server in running(informed_run.path):
        drawn = ask(server, question("inputs", example=20, component=""))[2]
        assert 'src="/image?example=20"' in drawn
        assert drawn.count('src="data:image/webp;base64,') == 1
        assert "0.500 nats for" in drawn
        assert 'id="answer-title">64 rows' in drawn
        assert "style=" not in drawn  # the policy of the page refuses it
        listed = ask(server, question("inputs", component=1, example=""))[2]
        assert 'id="answer-title">64 rows' in listed
        assert "data:image/webp" not in listed
        for query, reason in (({}, "give an example or a component"), ({"example": 1, "component": 1}, "not both")):
            status, _, page = ask(server, question("inputs", **query))
            assert status == 400
            assert reason in page


def test_images_come_one_by_one(server: Server) -> None:
    status, headers, content = ask(server, "/image?example=3")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert "PNG" in content[:8]
    assert ask(server, "/image?example=99999")[0] == 404
    assert ask(server, "/image?example=x")[0] == 404


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (question("top", component=99), "there is no component 99"),
        (question("top", component="x"), "component must be a whole number"),
        ("/query/top", "component must be a whole number"),
        (question("example", example="nobody"), "there is no example"),
        (question("top", component=1, n=501), "n must be at most 500"),
        (question("inputs", example=3), "does not exist yet"),
        (question("sql", query="drop table examples"), "a query must be one SELECT"),
        (question("sql", query="select * from read_text('/etc/hostname')"), "SQL:"),
    ],
)
def test_what_cannot_be_answered_is_said_beside_the_question(server: Server, path: str, reason: str) -> None:
    status, _, content = ask(server, path)
    assert status == 400
    assert reason in content


def test_other_names_and_other_sites_are_refused(server: Server) -> None:
    port = server.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        assert ask(server, "/", Host=host)[0] == 421, host
    assert ask(server, "/", Host=f"LOCALHOST:{port}")[0] == 200
    for path in ("/", "/report", "/style.css", "/image?example=3", question("sql", query="select 1")):
        for site in ("cross-site", "same-site", "else"):
            assert ask(server, path, Sec_Fetch_Site=site)[0] == 403, path
        for origin in ("https://evil.example", "null", "", f"http://127.0.0.1:{port + 1}", f"https://127.0.0.1:{port}"):
            status, headers, _ = ask(server, path, Origin=origin)
            assert status == 403, (path, origin)
            assert not [name for name in headers if name.lower().startswith("access-control")]
    for site in ("same-origin", "none"):
        assert ask(server, "/style.css", Sec_Fetch_Site=site, Origin=f"http://localhost:{port}")[0] == 200
    twice = b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nHost: evil.example\r\n\r\n" % port
    assert raw(server, twice)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 421")
    assert b"Access-Control" not in raw(server, b"OPTIONS / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port)


def test_only_reading_is_possible_and_every_answer_forbids_what_it_does_not_need(server: Server) -> None:
    same = f"http://127.0.0.1:{server.port}"
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(server, "/", method, Origin=same)[0] == 405
        assert ask(server, "/", method)[0] == 403, "a form must come from a page of the server"
    assert ask(server, "/../run.yaml")[0] == ask(server, "/run.yaml")[0] == 404
    status, headers, content = ask(server, "/", "HEAD")
    assert (status, content) == (200, "")
    for path in ("/", "/report", "/nothing", question("sql", query="select 1")):
        headers = ask(server, path)[1]
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert "script-src 'self'" in ask(server, "/")[1]["Content-Security-Policy"]
    assert "unsafe" not in ask(server, "/query")[1]["Content-Security-Policy"]


@pytest.mark.parametrize(
    "address", ["http://[/", "http://[::1/sql", "http://\u2100/", "/\x00", "http://x:y/", "*", "/%ff?%00=%00"]
)
def test_an_odd_address_is_refused_without_a_traceback(
    address: str, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    for version in (b" HTTP/1.1\r\n", b" HTTP/1.0\r\n"):
        answer = raw(server, b"GET " + address.encode() + version + header(server))
        assert answer.split()[1] in (b"400", b"404", b"200", b"303"), answer
    assert not capfd.readouterr().err


def test_the_token_of_the_printed_address_is_needed_once(server: Server) -> None:
    path = question("sql", query="select 6 * 7")
    for given in (None, "", f"npeff-{server.port}=x", f"npeff-1={server.token}", cookie(server)[:-1]):
        for address in (path, "/", "/style.css", "/image?example=3", f"{path}&token=x", "/nothing"):
            status, _, content = ask(server, address, Cookie=given)
            assert (status, content.count("\n")) == (403, 1)
            assert "Open the address" in content
    assert server.address == f"http://127.0.0.1:{server.port}/?token={server.token}"
    status, headers, _ = ask(server, f"{path}&token={server.token}", Cookie=None)
    assert (status, headers["Location"]) == (303, "/query/sql?query=select+6+%2A+7")
    assert "HttpOnly" in headers["Set-Cookie"]
    assert "SameSite=strict" in headers["Set-Cookie"]
    given = headers["Set-Cookie"].partition(";")[0]
    assert ask(server, headers["Location"], Cookie=given)[0] == 200
    assert server.token not in ask(server, "/", Cookie=given)[2]
    away = ask(server, f"//evil.example/?token={server.token}", Cookie=None)[1]["Location"]
    assert away == "/evil.example/"


def test_it_listens_on_the_loopback_interface_only(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_text_of_the_data_set_and_of_the_question_is_escaped(make_run: Callable) -> None:
    path = make_run(n_components=3, hostile_text=HOSTILE, text_instead_of_images=True, inputs=True).path
    for server in running(path):
        pages = [
            ask(server, question("top", component=0, n=5, split=HOSTILE))[2],
            ask(server, question("example", example=HOSTILE))[2],
            ask(server, question("inputs", example=20))[2],
            ask(server, question("inputs", component=0))[2],
            ask(server, question("sql", query=f"select '{HOSTILE.replace(chr(39), '')}' as \"<b>\", * from examples"))[
                2
            ],
        ]
        for page in pages:
            assert "<script>" not in page
            assert "<img src=x" not in page
            assert str(escape("<script>alert(1)")) in page


def test_long_answers_are_cut_and_say_so(server: Server) -> None:
    page = ask(server, question("sql", query="select * from range(100000000000000)"))[2]
    assert f"More than {ROWS_SHOWN} rows" in page
    assert page.count("<tr>") == ROWS_SHOWN + 1


def test_a_port_that_cannot_be_had_is_one_clear_line(run) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(QueryError, match=f"port {port} is in use: choose another"):
            make_server(run.path, port, 4)


ENDLESS = question("sql", query="select sum(a.range * b.range) from range(1000000) a, range(10000000) b")
LARGE = question("sql", query="select range(3000000000)")
WIDE = question("sql", query="select range::text || repeat('x', 1900) as a from range(500)")


SMALL = CallLimits(seconds=60, memory_bytes=2**30, result_bytes=2**19)


@pytest.fixture(scope="module")
def strict(run) -> Iterator[Server]:
    """A server with limits that a test can reach."""
    yield from running(run.path, Limits(ConnectionLimits(connections=4, request_s=1), queries=1, query=SMALL))


@pytest.mark.parametrize(
    ("path", "seconds", "reason"),
    [
        (ENDLESS, 1, "takes more than 1 s"),
        (LARGE, 60, "Out of Memory|GiB of memory"),
        (WIDE, 60, "a result of more than 0.5 MiB"),
    ],
)
def test_a_query_has_limits_on_time_memory_and_size_and_the_server_goes_on(
    strict: Server, path: str, seconds: int, reason: str
) -> None:
    strict.live.limits = dataclasses.replace(strict.live.limits, query=dataclasses.replace(SMALL, seconds=seconds))
    status, _, content = ask(strict, path)
    strict.live.limits = dataclasses.replace(strict.live.limits, query=SMALL)
    assert status == 400
    assert re.search(reason, content)
    assert eventually(lambda: ask(strict, question("sql", query="select 1"))[0] == 200)


@pytest.mark.parametrize("rest", [b"", b"more", b"GET / HTTP/1.1\r\n\r\n"], ids=["nothing", "data", "a request"])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_query_ends_when_its_client_leaves(run, rest: bytes, reset: bool) -> None:
    """Whatever the client has sent after its request, and however it leaves."""
    for server in running(run.path, Limits(queries=1, query=dataclasses.replace(SMALL, seconds=600))):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(f"GET {ENDLESS} HTTP/1.1\r\n".encode() + header(server))
            assert eventually(lambda: len(multiprocessing.active_children()) == 1)
            client.sendall(rest)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert eventually(lambda: not multiprocessing.active_children())
        assert ask(server, question("sql", query="select 1"))[0] == 200


def test_a_client_that_has_sent_more_and_stays_is_answered(run) -> None:
    for server in running(run.path):
        request = f"GET {question('sql', query='select 7')} HTTP/1.1\r\n".encode() + header(server)
        assert raw(server, 2 * request).count(b"HTTP/1.1 200 OK") == 1


def test_a_request_that_does_not_end_is_cut(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as client:
        began = time.monotonic()
        client.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            while not select.select([client], [], [], 0.05)[0]:
                client.sendall(b"X-Slow: 1\r\n")
            assert client.recv(1) == b""
        assert 0.9 < time.monotonic() - began < 30


def test_connections_are_limited(strict: Server) -> None:
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", strict.port)
        clients = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(9)]
        assert eventually(lambda: len(select.select(clients, [], [], 0)[0]) >= 5)  # closed at once
    assert eventually(lambda: can_ask(strict))


def can_ask(server: Server) -> bool:
    try:
        return ask(server, "/")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_the_report_is_rendered_again_only_if_the_run_has_changed(make_run: Callable) -> None:
    path = make_run(n_components=3).path
    for server in running(path):
        first = ask(server, "/report")[2]
        rendered = server.live.cached_report
        assert ask(server, "/report")[2] == first
        assert server.live.cached_report is rendered
        (path / "provenance.json").write_text('{"task": "another task"}')
        assert "another task" in ask(server, "/report")[2]
        assert server.live.cached_report is not rendered


@pytest.mark.parametrize("where", ["in the process of a query", "in the server"])
def test_a_defect_is_a_page_and_the_terminal_shows_it(
    run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    for server in running(run.path):
        if where == "in the server":
            monkeypatch.setattr(app, "call_limited", lambda *_: 1 / 0)
        else:
            server.live.view = None  # type: ignore[assignment]
        status, headers, content = ask(server, question("enriched", where="correct"))
        assert status == 500
        assert "An internal error has occurred" in content
        assert headers["X-Content-Type-Options"] == "nosniff"
    # the process of a query has the standard error of the process that was started first
    assert capfd.readouterr().err.count("Traceback") == (1 if where == "in the server" else 0)


def test_an_interrupt_ends_it_cleanly(run) -> None:
    process, line = served(run.path)
    assert "http://127.0.0.1:" in line
    assert interrupted(process) == (0, "stopped\n", "")
