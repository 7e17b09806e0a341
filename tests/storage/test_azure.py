"""The store on Azure Blob Storage: Azurite, the emulator, which npm installs, on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import npeff
import numpy as np
import pytest
from lock_of_providers import assert_a_lock_changes_hands
from npeff.query.components import ComponentStore
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.storage import object_lock, objects
from npeff.storage.atomic import is_committed, remove_directory, write_file_atomically
from npeff.storage.buckets import forget_clients
from npeff.storage.errors import ObjectStoreError
from npeff.storage.location import location
from npeff.store.component_store import open_factorization, write_factorization
from npeff.store.shard_records import CompletionRecord, ShardRecords

pytestmark = [pytest.mark.slow, pytest.mark.process]

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite; it is no secret."""
STARTS_WITHIN_S = 120
RUN = "az://runs/some/run"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if (npx := shutil.which("npx")) is None:
        pytest.skip("Azurite cannot be installed: there is no npx on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    options = ["--blobPort", str(port), "--location", str(folder), "--silent", "--skipApiVersionCheck"]
    with (folder / "log").open("wb") as log:
        command = [npx, "--yes", "-p", "azurite", "azurite-blob", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                lines = (folder / "log").read_text(errors="replace").splitlines()
                pytest.skip(f"Azurite cannot be installed or started: {lines[-1] if lines else 'no answer in time'}")
            time.sleep(0.2)
        create_container(f"http://127.0.0.1:{port}", "runs")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # npx starts the server as a process of its own
        server.wait()


def create_container(endpoint: str, name: str) -> None:
    """The one request that obstore does not make, with the account's key."""
    now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    kind = "application/octet-stream"
    headers = {"x-ms-date": now, "x-ms-version": "2021-12-02", "Content-Length": "0", "Content-Type": kind}
    resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signed = "\n".join(["PUT", *[""] * 4, kind, *[""] * 6, f"x-ms-date:{now}", "x-ms-version:2021-12-02", resource])
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"{endpoint}/{ACCOUNT}/{name}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers, data=b"")).close()


@pytest.fixture
def azure(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account with an empty container, ``az://runs``."""
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", endpoint)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(object_lock, "_POLL_S", 0.02)
    forget_clients()
    remove_directory(location("az://runs/some"))
    yield
    forget_clients()


def write(path: Path, content: bytes) -> None:
    write_file_atomically(path, lambda stream: stream.write(content))


def test_objects_are_written_listed_and_deleted(azure: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = location(RUN)
    for name in ("a.json", "deep/b.json", "deep/c.json"):
        write(folder / name, name.encode())
    assert sorted(objects.files(folder)) == ["a.json", "deep/b.json", "deep/c.json"]
    assert [path.name for path in folder.iterdir()] == ["a.json", "deep"]
    assert (folder / "deep").is_dir()
    assert not (folder / "dee").exists()
    assert objects.read_range(folder / "a.json", 2, 100) == b"json"
    assert objects.read_all([folder / "a.json", folder / "nothing"]) == [b"a.json", None]
    monkeypatch.setattr(objects, "PART_BYTES", 2**20)
    write(folder / "large", bytes(5 * 2**20))
    assert (folder / "large").stat().st_size == 5 * 2**20
    remove_directory(folder)
    remove_directory(folder)
    assert not folder.exists()


def test_the_first_record_of_a_shard_stands(azure: None) -> None:
    records = ShardRecords(f"{RUN}/shards", "s")
    first = CompletionRecord(3, 12, 16, "a", n_invalid=0, seconds=1.0, signature="s")
    records.write(first)
    records.write(CompletionRecord(3, 12, 16, "a", n_invalid=0, seconds=2.0, signature="s"))
    assert records.complete() == {3: first}


def test_a_lock_is_held_by_one_released_and_taken_over(azure: None) -> None:
    assert_a_lock_changes_hands(location(f"{RUN}/.lock"))


def test_a_folder_is_replaced_and_zarr_reads_it(azure: None) -> None:
    path = location(f"{RUN}/factorization.zarr")
    assert not is_committed(path)
    for version in (1, 2):
        write_factorization(path, np.full((2, 3), version), np.full((4, 2), version), {})
        stored = open_factorization(path)
        assert {*stored.read_components().flat, *stored.read_coefficients().flat} == {version}
        assert np.asarray(stored.coefficients[1:2]).tolist() == [[version, version]]


def test_a_container_that_is_not_there_and_a_wrong_key_are_told_of(
    azure: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ObjectStoreError, match=r"az://elsewhere/run/a .*the bucket does not exist"):
        write(location("az://elsewhere/run/a"), b"")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"wrong").decode())
    forget_clients()
    with pytest.raises(ObjectStoreError, match=r"az://runs/some/run/a .*(credentials are not valid|access is denied)"):
        write(location(f"{RUN}/a"), b"")


def test_a_run_there_is_the_same_as_on_a_disk(azure: None, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the other Pythons of make test-pythons have no torch")
    settings = {
        "task": {"name": "digits", "options": {"limit": 40, "epochs": 1}},
        "fishers": {"sketch": {"kind": "tensorsketch", "dim": 64}, "shard_size": 10},
        "factorization": {"n_components": 2, "max_iterations": 4, "n_starts": 1, "stability_examples": 0},
        "verification": {"top_examples": 4, "baseline_examples": 8, "epsilon": 0.1},
        "executor": {"kind": "serial"},
    }
    stores = []
    for run_dir in (RUN, str(tmp_path / "run")):
        run = npeff.run(RunConfig.model_validate({**settings, "run_dir": run_dir}))
        stores.append(ComponentStore.open(run.path))
    here, there = stores
    np.testing.assert_array_equal(here.components.compute(), there.components.compute())
    assert here.table("verification").equals(there.table("verification"))
    assert len(here.top_examples(1, n=2)) == 2
    with pytest.raises(RunDirectoryError, match=r"no run in az://runs/nothing"):
        npeff.run(RunDirectory.open("az://runs/nothing"))
