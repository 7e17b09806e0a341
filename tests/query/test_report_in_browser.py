"""The report in a headless Chromium, driven through its DevTools pipe: no driver program, no port, no dependency."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.query import write_report

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
# the pipe's protocol: the browser reads commands from descriptor 3 and answers on 4


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


class Browser:
    """One page; remembers what it complained about and what it asked for."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._to_browser = os.pipe()
        self._from_browser, from_browser = os.pipe()
        os.set_blocking(self._from_browser, False)
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                LAUNCH,
                *map(str, inherited),
                program,
                *FLAGS,
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=inherited,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser, from_browser, *inherited):
            os.close(end)
        self._buffer = b""
        self._calls = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._patience_s = 120.0  # a first start reads hundreds of megabytes from a disk that others may use
        try:
            self._attach()
        except Exception:
            self.close()
            raise
        self._patience_s = 30.0

    def _attach(self) -> None:
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load a file and wait until it is there; `complaints` and `requests` start afresh."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.complaints, self.requests = [], []
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 30
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") == "about:blank":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} did not load")
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def close(self) -> None:
        os.close(self._to_browser)  # the browser ends when its pipe does
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from_browser)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result; events that arrive meanwhile are noted."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        _write_all(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"a dialog: {parameters['message']}")

    def _next_message(self) -> dict[str, Any]:
        deadline = time.monotonic() + self._patience_s
        while b"\0" not in self._buffer:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TimeoutError("the browser does not answer")
            try:
                self._buffer += os.read(self._from_browser, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed: the report was not opened in a browser")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_the_report_opens_without_complaints_requests_or_sideways_scrolling(
    browser: Browser, run, scheme: str, width: int
) -> None:
    report = write_report(run.path)
    browser.open(report, width=width, scheme=scheme)
    assert browser.complaints == []
    assert browser.requests == [report.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 8)")
    assert browser.evaluate("getComputedStyle(document.querySelector('.gallery img')).imageRendering") == "pixelated"
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background.strip("rgb()").split(","))
    assert (brightness > 600) == (scheme == "light")


def test_text_of_the_data_set_is_shown_as_text(browser: Browser, make_run: Callable) -> None:
    browser.open(write_report(make_run(n_components=4, hostile_text=HOSTILE).path))
    assert browser.complaints == []
    assert len(browser.requests) == 1
    assert browser.evaluate("document.scripts.length") == 1
    assert browser.evaluate("document.querySelectorAll('img:not([src^=\"data:image/png\"])').length") == 0
    for place in ("h1", ".finding b", ".gallery .caption", ".mix th[scope=row]", ".energy th[scope=row]",
                  "details th[scope=row]", "details td:last-child", "pre", "#provenance dd"):  # fmt: skip
        texts = browser.evaluate(f"[...document.querySelectorAll('{place}')].map((e) => e.textContent).join(' ')")
        assert HOSTILE in texts, place


def test_the_page_refuses_scripts_that_are_not_its_own(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    browser.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.intruder = 1';"
        " document.body.append(s); })()"
    )
    assert browser.evaluate("window.intruder") is None


def test_headings_sort_the_table_both_ways_with_missing_values_last(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    headings = browser.evaluate("[...document.querySelectorAll('.sortable th button')].map((b) => b.textContent)")
    ratios = "[...document.querySelectorAll('.sortable tbody tr')].map((r) => r.cells[7].dataset.value)"
    click = "document.querySelectorAll('.sortable th button')[6].click()"
    assert headings[6] == "KL + held out"

    browser.evaluate(click)
    values = browser.evaluate(ratios)
    measured = [float(value) for value in values if value]
    assert len(measured) == 11
    assert values[-1] == ""
    assert measured == sorted(measured, reverse=True)
    assert measured[0] == float("inf")
    assert browser.evaluate("document.querySelector('[aria-sort]').textContent") == "KL + held out"

    browser.evaluate(click)
    values = browser.evaluate(ratios)
    measured = [float(value) for value in values if value]
    assert values[-1] == ""
    assert measured == sorted(measured)

    browser.evaluate("document.querySelector('.sortable th button').click()")
    order = browser.evaluate("[...document.querySelectorAll('.sortable tbody th')].map((c) => Number(c.textContent))")
    assert order == list(range(12))
    assert browser.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_the_two_plots_take_turns_on_screen(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    shown = "[...document.querySelectorAll('.switch figure')].map((f) => getComputedStyle(f).display)"
    assert browser.evaluate(shown) == ["block", "none"]
    browser.evaluate("document.querySelector('#show-2').click()")
    assert browser.evaluate(shown) == ["none", "block"]


def test_a_card_is_reached_by_its_link(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    browser.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    browser.evaluate("document.querySelector('svg a[href=\"#component-7\"]').dispatchEvent(new MouseEvent('click'))")
    top = browser.evaluate("document.querySelector('#component-7').getBoundingClientRect().top")
    assert 0 <= top < 120
