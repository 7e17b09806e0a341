from __future__ import annotations

import hashlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from urllib.parse import urlencode

import pytest
from npeff.query.errors import QueryError
from npeff.reports.serve import ROWS_SHOWN, Server, make_server

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>"""


@pytest.fixture(scope="module")
def server(run) -> Iterator[Server]:
    yield from running(run.path)


def running(path: Path) -> Iterator[Server]:
    with make_server(path, 0, top_examples=4) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read().decode("utf-8", errors="replace")
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def question(name: str, **values: object) -> str:
    return f"/{name}?{urlencode(values)}"


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
    assert similar.count('<a href="/report#component-') == 4
    counted = ask(server, question("sql", query="select count(*) as n from examples"))[2]
    assert '<td class="num">360</td>' in counted
    assert 'id="component-3"' in ask(server, "/report")[2]
    assert ask(server, "/")[0] == 200
    assert "--ink" in ask(server, "/style.css")[2]
    assert digest(run.path) == before


def test_images_come_one_by_one(server: Server) -> None:
    status, headers, content = ask(server, "/image?example=3")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert "PNG" in content[:8]
    assert ask(server, "/image?example=99999")[0] == 404
    assert ask(server, "/image?example=x")[0] == 400


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (question("top", component=99), "there is no component 99"),
        (question("top", component="x"), "component must be a whole number"),
        ("/top", "component must be a whole number"),
        (question("example", example="nobody"), "there is no example"),
        (question("sql", query="drop table examples"), "a query must be one SELECT"),
        (question("sql", query="select * from read_text('/etc/hostname')"), "SQL:"),
    ],
)
def test_what_cannot_be_answered_is_said_beside_the_question(server: Server, path: str, reason: str) -> None:
    status, _, content = ask(server, path)
    assert status == 400
    assert reason in content


def test_other_names_and_other_sites_are_refused(server: Server) -> None:
    port = server.server_port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        assert ask(server, "/", Host=host)[0] == 421, host
    assert ask(server, "/", Host=f"LOCALHOST:{port}")[0] == 200
    for site in ("cross-site", "same-site"):
        assert ask(server, question("sql", query="select 1"), Sec_Fetch_Site=site)[0] == 403
        assert ask(server, "/", Sec_Fetch_Site=site)[0] == 200
    assert ask(server, question("sql", query="select 1"), Sec_Fetch_Site="same-origin")[0] == 200


def test_only_reading_is_possible_and_every_answer_forbids_what_it_does_not_need(server: Server) -> None:
    assert [ask(server, "/", method)[0] for method in ("POST", "PUT", "DELETE")] == [501] * 3
    assert ask(server, "/../run.yaml")[0] == ask(server, "/run.yaml")[0] == 404
    status, headers, content = ask(server, "/", "HEAD")
    assert (status, content) == (200, "")
    for path in ("/", "/report", "/nothing", question("sql", query="select 1")):
        headers = ask(server, path)[1]
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert "script" not in ask(server, "/")[1]["Content-Security-Policy"]


def test_it_listens_on_the_loopback_interface_only(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_text_of_the_data_set_and_of_the_question_is_escaped(make_run: Callable) -> None:
    path = make_run(n_components=3, hostile_text=HOSTILE, text_instead_of_images=True).path
    for server in running(path):
        pages = [
            ask(server, question("top", component=0, n=5, split=HOSTILE))[2],
            ask(server, question("example", example=HOSTILE))[2],
            ask(server, question("sql", query=f"select '{HOSTILE.replace(chr(39), '')}' as \"<b>\", * from examples"))[
                2
            ],
        ]
        for page in pages:
            assert "<script>" not in page
            assert "<img src=x" not in page
            assert str(escape("<script>alert(1)")) in page


def test_long_answers_are_cut_and_say_so(server: Server) -> None:
    page = ask(server, question("sql", query="select * from range(3000)"))[2]
    assert "3,000 rows" in page
    assert page.count("<tr>") == ROWS_SHOWN + 1


def test_a_port_that_cannot_be_had_is_one_clear_line(run) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(QueryError, match=f"port {port} is in use: choose another"):
            make_server(run.path, port, 4)


@pytest.mark.process
def test_an_interrupt_ends_it_cleanly(run) -> None:
    script = (
        "import sys; from npeff.reports.serve import serve\n"
        "serve(sys.argv[1], 0, 4, lambda line: print(line, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(run.path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert process.stdout is not None
    assert "http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, complaints = process.communicate(timeout=60)
    assert (process.returncode, rest, complaints) == (0, "stopped\n", "")
