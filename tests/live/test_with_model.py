"""The pages that run the model: an example of one's own, and a step."""

from __future__ import annotations

import base64
import html
import http.client
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Browser, wait
from live_server import Reply, ask, header, interrupted, raw, running, served
from npeff.live.model import RunModel
from npeff.live.model_client import ModelError
from npeff.live.own_example import OwnExampleError, fields_of, options_for, written
from npeff.live.server import LiveServer
from npeff.query.components import ComponentStore
from npeff.runs.directory import RunDirectory
from PIL import Image
from pyarrow.parquet import read_table

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

from live.model_run import N_ROWS, image_run, sentences, text_run
from live.step_page import Group, computed, shown
from tasks import tiny

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return text_run(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return image_run(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def server(texts: RunDirectory) -> Iterator[LiveServer]:
    yield from running(texts.path)


def key_of(server: LiveServer, path: str) -> str:
    return re.findall(r'name="key" value="([^"]+)"', ask(server, path).text)[0]


def send(server: LiveServer, fields: dict[str, str | bytes], origin: str | None = None) -> Reply:
    edge, body = "edge-of-a-part", b""
    for name, value in fields.items():
        file = '; filename="a.png"' if isinstance(value, bytes) else ""
        body += f'--{edge}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    body += f"--{edge}--\r\n".encode()
    origin = origin or f"http://127.0.0.1:{server.port}"
    return ask(server, "/try", "POST", body, Origin=origin, Content_Type=f"multipart/form-data; boundary={edge}")


def test_an_example_of_the_run_gets_its_stored_coefficients(texts: RunDirectory, tmp_path: Path) -> None:
    model, store = RunModel(str(texts.path), None), ComponentStore.open(texts.path)
    options, stored_NK = texts.config.task.options, np.asarray(store.stored_coefficients[:])
    fields = fields_of("t", options)
    for number in (0, 7, 20):
        given = {"text": sentences()[number], "class": str(number % 3)}
        written(fields, given, tmp_path / "one.parquet")
        found = model.example(options_for(options, fields, given, tmp_path / "one.parquet"))
        np.testing.assert_allclose(found["coefficients"], stored_NK[number], rtol=2e-3, atol=2e-4)
        assert sum(row["p"] for row in found["classes"]) == pytest.approx(1.0)


def test_a_step_of_zero_changes_nothing_and_a_step_leaves_the_model_as_it_was(texts: RunDirectory) -> None:
    model = RunModel(str(texts.path), None)
    before = {name: value.clone() for name, value in model._loaded.model.state_dict().items()}
    groups = {"top": [3, 1], "other": [5, 6]}
    still, moved = (model.step(0, step, groups) for step in (0.0, 0.5))
    assert still["top"]["kl"] == still["other"]["kl"] == 0
    assert moved["top"]["kl"] > 0
    assert [row["example"] for row in moved["top"]["examples"]] == [3, 1]
    assert all(value.equal(before[name]) for name, value in model._loaded.model.state_dict().items())


def test_the_form_shows_components_and_the_nearest_examples(server: LiveServer, texts: RunDirectory) -> None:
    files = sorted(texts.path.rglob("*"))
    key, text = key_of(server, "/try"), sentences()[7]
    reply = send(server, {"key": key, "column:text": text, "column:class": ""})
    assert reply.status == 200
    assert "Nearest examples" in reply.text
    assert 'href="/component/' in reply.text
    assert "row-7" in reply.text
    assert html.escape(text) in reply.text
    hostile = '<script>alert(1)</script>"'
    assert hostile not in send(server, {"key": key, "column:text": hostile}).text
    assert sorted(texts.path.rglob("*")) == files


def test_a_form_of_another_site_or_without_the_key_is_refused(server: LiveServer) -> None:
    key = key_of(server, "/try")
    assert send(server, {"key": key, "column:text": "a"}, origin="http://evil.example").status == 403
    for wrong in ("", "x" * len(key), "é"):
        assert send(server, {"key": wrong, "column:text": "a"}).status == 403
    head = f"POST /try HTTP/1.1\r\nOrigin: http://127.0.0.1:{server.port}\r\nContent-Length: ".encode()
    assert raw(server, head + b"17000000\r\n" + header(server)).startswith(b"HTTP/1.1 413")
    chunked = head.replace(b"Content-Length: ", b"Transfer-Encoding: chunked\r\n")
    assert raw(server, chunked + header(server)).startswith(b"HTTP/1.1 411")
    assert send(server, {"key": key, "column:text": "a" * 200_000}).status == 400


def test_a_step_is_a_page_with_both_groups(server: LiveServer) -> None:
    form = ask(server, "/step?component=1")
    assert form.status == 200
    assert 'type="range"' in form.text
    page = ask(server, "/step?component=1&eps=-1.5").text
    assert "2 other examples</h2>" in page
    assert page.count('<th scope="row"><a href="/example/') == 6
    for wrong in ("4", "nan", "x", "1e9"):
        assert ask(server, f"/step?component=1&eps={wrong}").status == 404


def test_a_step_shows_its_examples_and_the_numbers_of_the_card(server: LiveServer, texts: RunDirectory) -> None:
    store = ComponentStore.open(texts.path)
    page = ask(server, "/step?component=1&eps=1").text
    shown = [html.escape(sentences()[int(n)]) for n in re.findall(r">row-(\d+)</a>", page)]
    assert len(shown) == 6
    assert re.findall(r'<span class="snippet">([^<]*)</span>', page) == shown
    assert re.findall(r"Mean KL of the (\d+) (\w+) examples shown", page) == [("4", "top"), ("2", "other")]
    wanted = {("examples", "held_out"), ("sign", 1)}
    (row,) = (row for row in store.verification(1).to_pylist() if wanted <= {*row.items()})
    assert f"are of the {row['n_top']} top examples of the verification (held out)" in page
    assert f"at a step of +1.00 is {row['kl_top']:.3f} nats" in page
    assert "step of −1.00" in ask(server, "/step?component=1&eps=-2").text


@pytest.mark.slow
def test_pictures_and_the_label_of_an_own_image_are_shown(images: RunDirectory) -> None:
    for server in running(images.path):
        form = ask(server, "/try").text
        assert re.findall(r"<option>(\w+)</option>", form) == ["cat", "dog"]
        sent = {"key": key_of(server, "/try"), "column:photo": tiny.png(7)}
        page = send(server, sent | {"column:animal": ""}).text
        assert "given label" not in page
        assert html.escape(f"of the Fishers of the run's {N_ROWS // 4} held-out examples") in html.escape(page)
        assert "fraction of the sum of its coefficients" in page
        (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
        thumbnail = Image.open(io.BytesIO(base64.b64decode(image)))
        np.testing.assert_array_equal(thumbnail, Image.open(io.BytesIO(tiny.png(7))))
        answers = [
            send(server, sent | {"column:animal": name}).text.partition("<p>The prediction is ")[2][:14]
            for name in ("cat", "dog")
        ]
        assert sorted(answers) == ["<b>not</b> the", "the given labe"]
        step = ask(server, "/step?component=0&eps=1").text
        assert step.count('<img class="pixelated" src="/image?example=') == 6


@pytest.mark.slow
def test_a_refused_own_example_is_the_form_again_with_one_line(images: RunDirectory) -> None:
    for server in running(images.path):
        sent = {"key": key_of(server, "/try"), "column:photo": tiny.png(7), "column:animal": "dog"}
        for wrong, line in (
            ({"column:photo": b"no image"}, "This file is not an image that can be read (cannot identify image file)"),
            ({"column:photo": tiny.png(7)[:60]}, "This file is not an image that can be read"),
            ({"column:photo": b""}, "Photo has no image: choose a file"),
            ({"column:animal": "cow"}, "choose one of the classes cat, dog."),
        ):
            reply = send(server, sent | wrong)
            assert reply.status == 400
            (alert,) = re.findall(r'role="alert">([^<]*)</p>', reply.text)
            assert line in html.unescape(alert)
            assert ".parquet" not in alert
            assert ("<option selected>dog</option>" in reply.text) == ("column:animal" not in wrong)
            assert "No page" not in reply.text
        server.live.model_pages.process.ask = lambda do, options: refuse(options["data"])  # type: ignore
        assert ">The row is odd.</p>" in send(server, sent).text


def refuse(path: str) -> dict[str, object]:
    raise ModelError(f"{path}: the row is odd")


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_of_the_model_behind(texts: RunDirectory) -> None:
    process, line = served(texts.path)
    port, token = re.findall(r":(\d+)/\?token=(\S+)", line)[0]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
    connection.request("GET", "/step?component=0&eps=1", headers={"Cookie": f"npeff-{port}={token}"})
    assert b"Mean KL" in connection.getresponse().read()
    code, rest, complaints = interrupted(process)
    assert (code, rest) == (0, "stopped\n")
    assert "leaked" not in complaints
    assert "Traceback" not in complaints


@pytest.mark.slow
def test_the_process_of_the_model_is_one_and_its_end_is_told(server: LiveServer) -> None:
    process = server.live.model_pages.process
    ask(server, "/step?component=0&eps=1")
    first = process._process
    assert first is not None
    ask(server, "/step?component=0&eps=-1")
    assert process._process is first
    first.kill()
    first.join()
    reply = ask(server, "/step?component=0&eps=1")
    assert reply.status == 400
    assert "has ended" in reply.text
    assert process._process is None, "the next request starts it again"


def test_an_image_is_a_file_of_the_form(tmp_path: Path) -> None:
    options = {"data": "hf:elsewhere", "split": "test", "image_column": "photo", "image_folder": "/", "limit": 9}
    fields = fields_of("t", options)
    assert [(field.column, field.kind) for field in fields] == [("photo", "image")]
    written(fields, {"photo": tiny.png(3)}, tmp_path / "one.parquet")
    assert read_table(tmp_path / "one.parquet")["photo"].to_pylist() == [tiny.png(3)]
    chosen = options_for(options, fields, {"photo": tiny.png(3)}, tmp_path / "one.parquet")
    assert chosen == {"data": str(tmp_path / "one.parquet"), "image_column": "photo", "limit": 1}
    for given in ({}, {"photo": ""}, {"photo": "/etc/hostname"}):
        with pytest.raises(OwnExampleError, match="has no image"):
            written(fields, given, tmp_path / "one.parquet")


def test_a_label_is_a_class_by_its_name(tmp_path: Path) -> None:
    options = {"data": "d", "text_columns": ["text"], "label_column": "class"}
    (text, label) = fields = fields_of("t", options, ["7", "b"])
    assert (text.classes, label.classes) == ((), ("7", "b"))
    written(fields, {"text": "a", "class": "7"}, tmp_path / "one.parquet")
    assert read_table(tmp_path / "one.parquet")["class"].to_pylist() == ["7"], "the name 7, not the class 7"
    with pytest.raises(OwnExampleError, match="choose one of the classes 7, b"):
        written(fields, {"text": "a", "class": "0"}, tmp_path / "one.parquet")
    written(fields_of("t", options), {"text": "a", "class": "7"}, tmp_path / "one.parquet")
    assert read_table(tmp_path / "one.parquet")["class"].to_pylist() == [7]


def test_a_task_without_a_table_says_so() -> None:
    with pytest.raises(OwnExampleError, match="reads no table"):
        fields_of("digits", {"train_examples": 4})
    with pytest.raises(OwnExampleError, match="reads no table"):
        fields_of("table", {"data": "iris", "label_column": "a", "numeric_columns": ["b"]})


def test_the_slider_moves_the_model(browser: Browser, server: LiveServer, texts: RunDirectory) -> None:
    """Two presses of an arrow key, and a jump to the other sign: every number is that of the moved model."""
    component = 1
    browser.open(server.address)
    browser.open(f"http://127.0.0.1:{server.port}/step?component={component}")
    slider = "document.querySelector('input[name=eps]')"
    former: list[Group] = []
    for eps in (1.1, -2.5):
        browser.evaluate(f"{slider}.focus()")
        if eps == 1.1:
            for _ in range(2):
                browser.press("ArrowRight")
        else:
            move = f"{slider}.value = {eps}; {slider}.dispatchEvent(new Event('input', {{bubbles: true}}))"
            browser.evaluate(move)
        wait(browser, f"new URLSearchParams(location.search).get('eps') === '{eps}'")
        assert browser.evaluate("document.querySelector('.slider output').textContent") == f"{eps:.2f}".replace(
            "-", "−"
        )
        found = shown(browser)
        assert len(found) == 2
        for group in found:
            expected = computed(texts, component, eps, list(group.examples))
            for name, values in group.classes.items():
                assert values == pytest.approx(expected.classes[name], abs=0.06), (eps, name)
            for name, (before, p, after, q, kl) in group.examples.items():
                wanted = expected.examples[name]
                assert (before, after) == (wanted[0], wanted[2])
                assert (p, q) == pytest.approx((wanted[1], wanted[3]), abs=0.06)
                assert kl == pytest.approx(wanted[4], rel=0.02, abs=1e-5)
        assert found != former, "the predictions change with the step"
        former = found
    assert browser.complaints == []
