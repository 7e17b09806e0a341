"""What all tests need."""

from __future__ import annotations

import atexit
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import started_processes

if TYPE_CHECKING:
    from object_store import ObjectStore

# A shell that runs the tests in the background lets them ignore Ctrl-C, and the commands they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

started_processes.install()
atexit.register(gc.unfreeze)  # see pytest_collection; DuckDB reports objects that are not collected at the exit


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Import the modules of the tests without garbage collection, and exclude their objects from later ones."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    started_processes.enter(item)
    try:
        return (yield)
    finally:
        started_processes.enter(None)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[ObjectStore]:
    from object_store import serving

    with serving() as store:
        yield store


@pytest.fixture
def s3(s3_server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An S3 server with an empty bucket, ``s3://runs``."""
    from object_store import emptied

    with emptied(s3_server, tmp_path / "cache", monkeypatch) as store:
        yield store
