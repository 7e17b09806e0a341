"""A run on an object store, from its first request to the report, is the same as one on a local disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import yaml
from npeff.cli.main import main
from npeff.query.components import ComponentStore
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory, StageState
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import SilentProgress
from npeff.stages.pipeline import export_direction
from npeff.stages.status import status
from npeff.stages.worker_specs import executor_for
from npeff.storage import object_lock, objects
from npeff.storage.errors import ObjectStoreError
from npeff.storage.location import location
from object_store import BROKEN, DENIED, SLOW_DOWN, Answer, ObjectStore, Request
from places import place, plain
from safetensors.numpy import load

pytestmark = pytest.mark.process

CONFIG: dict[str, Any] = {
    "run_dir": "s3://runs/team/digits",
    "task": {"name": "digits", "options": {"limit": 40, "epochs": 1}},
    "fishers": {
        "sketch": {"kind": "tensorsketch", "dim": 64},
        "shard_size": 10,
        "diagonal": {"mean": True, "groups": True},
    },
    "factorization": {
        "n_components": 2,
        "checkpoint_every": 2,
        "max_iterations": 6,
        "tolerance": 1e-15,
        "n_starts": 1,
        "metrics": "jsonl",
        "stability_examples": 0,
    },
    "verification": {"top_examples": 4, "baseline_examples": 8, "epsilon": 0.1},
    "executor": {"kind": "serial"},
}
RUN = CONFIG["run_dir"]


def config(run_dir: str, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({**CONFIG, **sections, "run_dir": run_dir})


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """An undisturbed run on a local disk."""
    return npeff.run(config(str(tmp_path_factory.mktemp("reference") / "digits")))


def names(run: RunDirectory) -> list[str]:
    return [file.relative_to(run.path).as_posix() for file in run.path.rglob("*") if file.is_file()]


@pytest.fixture(scope="module")
def reference(local: RunDirectory) -> dict[str, bytes]:
    """The files of that run."""
    return results({name: (local.path / name).read_bytes() for name in names(local)})


def results(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files by name, without what differs between any two runs: times, places and tokens."""
    names = {name: re.sub(r"^(checkpoints/[0-9]{6})-[0-9a-f]{8}", r"\1", plain(name)) for name in files}
    varies = re.compile(
        r"\.lock|\.clock|\.workers|run.yaml|factorization.yaml|provenance.json|report/.*|shards/.*|stages/.*|.*history.*|metrics/.*"
    )
    return {
        names[name]: content
        for name, content in files.items()
        if not varies.fullmatch(names[name]) and not names[name].endswith("MANIFEST.json")
    }


def differences(store: ObjectStore, reference: dict[str, bytes]) -> list[str]:
    mine = results(store.contents(RUN))
    return [name for name in sorted(mine.keys() | reference.keys()) if mine.get(name) != reference.get(name)]


def kind(request: Request) -> str:
    """What a request does and, if it changes something, in which part of the run."""
    if request.kind in ("HEAD", "GET", "LIST"):
        return request.kind
    return f"{request.kind} {plain(request.key.removeprefix('team/digits/')).split('/')[0]}"


@contextmanager
def failing_once_for_every_kind(store: ObjectStore, answers: tuple[Answer, ...]) -> Iterator[list[str]]:
    """The first request of every kind fails, in one way or another."""
    failed: list[str] = []

    def fault(request: Request) -> Answer | None:
        if request.key.endswith(".lock") or kind(request) in failed:
            return None
        failed.append(kind(request))
        return answers[len(failed) % len(answers)]

    store.faults.append(fault)
    try:
        yield failed
    finally:
        store.faults.remove(fault)


@pytest.mark.slow
def test_whatever_request_fails_the_same_command_goes_on_to_the_same_result(
    s3: ObjectStore, reference: dict[str, bytes]
) -> None:
    with failing_once_for_every_kind(s3, (SLOW_DOWN, DENIED, BROKEN)) as failed:
        while True:
            before, n_failed = set(s3.contents(f"{RUN}/shards")), len(failed)
            try:
                npeff.run(config(RUN))
                break
            except ObjectStoreError:
                assert len(failed) > n_failed
                assert s3.released("team/digits/.lock")
                assert before <= set(s3.contents(f"{RUN}/shards")), "what is finished is kept"
    assert {"GET", "HEAD", "LIST", "PUT run.yaml", "PUT task", "PUT fishers.zarr", "PUT shards", "PUT stages"} <= set(
        failed
    )
    assert {"PUT checkpoints", "PUT factorization.zarr", "PUT directions.zarr", "PUT partial", "PUT tables"} <= set(
        failed
    )
    assert differences(s3, reference) == []
    assert s3.uploads() == []


def ask(s3: ObjectStore) -> None:
    """Everything that reads: queries, the status, the report, exports."""
    run = RunDirectory.open(RUN)
    assert {row.state for row in status(run)} == {StageState.COMPLETE}
    store = ComponentStore.open(RUN)
    assert store.coefficients.compute().shape == (40, 2)
    assert float(np.linalg.norm(store.components.compute()[0])) == pytest.approx(1)
    assert len(store.top_examples(1, n=2)) == 2
    assert len(store.similar_components(0)) == 1
    assert store.sql("select count(*) as n from examples")["n"].to_pylist() == [40]
    assert {len(rows) for rows in store.directions.values()} == {2}
    assert b"npeff" in s3.contents(f"{RUN}/{place('report')}")["index.html"].lower()
    export_direction(run, 1, "s3://runs/exports/1.safetensors")
    assert load(s3.objects()["exports/1.safetensors"].value).keys() == store.directions.keys()
    lines = s3.contents(f"{RUN}/{place('metrics')}")["factorize.jsonl"].decode().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 7))


@pytest.mark.slow
def test_a_command_that_is_killed_is_taken_up_by_the_next_one(
    s3: ObjectStore, reference: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    command = [sys.executable, "-m", "npeff", "run", str(tmp_path / "run.yaml")]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(s3.contents(f"{RUN}/shards")) < 2:
        assert killed.poll() is None, capfd.readouterr().err
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert killed.returncode == -signal.SIGKILL
    assert len(s3.contents(f"{RUN}/shards")) < 4
    s3.objects()["team/digits/.lock"].last_modified -= timedelta(seconds=object_lock.STALE_S + 2)
    with pytest.raises(SystemExit) as ended:
        main(command[3:])
    assert ended.value.code in (0, None), capfd.readouterr().err
    assert "report: s3://runs/team/digits/factorizations/default/report/index.html" in capfd.readouterr().out
    assert s3.released("team/digits/.lock")
    assert differences(s3, reference) == []
    ask(s3)


@pytest.mark.slow
def test_a_complete_run_makes_few_requests_for_each_shard(s3: ObjectStore) -> None:
    n_shards = 32  # about 650 requests do not depend on the number of shards
    npeff.run(
        config(
            RUN,
            task={"name": "digits", "options": {"limit": 5 * n_shards, "epochs": 1}},
            fishers={"sketch": {"kind": "tensorsketch", "dim": 64}, "shard_size": 5},
            factorization={"n_components": 4, "n_starts": 1, "max_iterations": 20},
        )
    )
    assert len(s3.requests) <= 55 * n_shards
    chunks = [request for request in s3.requests if re.search(r"fishers\.zarr/\w+/c/", request.key)]
    assert not [request for request in chunks if request.kind == "HEAD"]
    reads = Counter(request.key for request in chunks if request.kind == "GET")
    readers = "factorization", "stability", "two sums for whitening", "lift", "verification"
    assert max(reads.values()) == 6, readers
    records = Counter(request.key for request in s3.requests if "/shards/" in request.key and request.kind == "GET")
    assert max(records.values()) == 3, "the factorization, the lift, the verification"


def test_two_commands_do_not_work_on_one_run(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_lock, "RENEW_S", 0.05)
    monkeypatch.setattr(object_lock, "_POLL_S", 0.1)
    one, other = (RunDirectory.create(config(RUN)) for _ in range(2))
    with one.lock():
        pass
    script = (
        f"from npeff.runs.directory import *\nwith RunDirectory.open({RUN!r}).lock(): print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", "import npeff.storage.object_lock as l; l.RENEW_S = 0.05\n" + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.read(1) == b"1"
        with (
            pytest.raises(RunDirectoryError, match=rf"{RUN} is in use by another command \(process {holder.pid} on "),
            other.lock(),
        ):
            raise AssertionError
        holder.communicate(b"\n")
    with other.lock():
        pass


def test_another_configuration_and_a_prefix_with_something_else_are_refused(s3: ObjectStore) -> None:
    RunDirectory.create(config(RUN))
    with pytest.raises(RunDirectoryError, match="holds a run with another configuration"):
        RunDirectory.create(config(RUN, seed=7))
    with pytest.raises(RunDirectoryError, match=r"s3://runs/team is not empty and holds no run.yaml"):
        RunDirectory.create(config("s3://runs/team"))
    with pytest.raises(RunDirectoryError, match=r"no run in s3://runs/nothing"):
        RunDirectory.open("s3://runs/nothing")


def test_errors_of_the_object_store_end_the_command_with_one_line(
    s3: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    for arguments in (["run", str(tmp_path / "run.yaml")], ["status", RUN], ["query", RUN, "top", "-c", "0"]):
        with s3.failing(DENIED, lambda request: True), pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("npeff: error: cannot use s3://runs")
        assert "access is denied" in line


@pytest.mark.slow
def test_actors_share_a_run_on_an_object_store(
    s3: ObjectStore, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "AWS_ENDPOINT_URL" in os.environ
    run = RunDirectory.create(config(RUN, executor={"kind": "ray", "address": "local", "workers": 2}))
    with executor_for(run, None) as workers:
        npeff.compute_fishers(run, executor=workers)
        npeff.factorize(run, executor=workers)
    of_fishers = ("fishers.zarr", "diagonal_fisher", "task", "tables/examples", "tables/classes", "tables/parameters")
    mine, theirs = (
        {name: content for name, content in found.items() if name.startswith(of_fishers)}
        for found in (results(s3.contents(RUN)), reference)
    )
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert np.isfinite(ComponentStore.open(RUN).components.compute()).all()
    assert [name for name in s3.contents(f"{RUN}/{place('checkpoints')}") if "MANIFEST" in name]


class Told(SilentProgress):
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.slow
def test_damage_is_found_and_made_again_there(
    s3: ObjectStore, local: RunDirectory, reference: dict[str, bytes]
) -> None:
    objects.upload_files(local.path, location(RUN), [name for name in names(local) if not name.startswith(".")])
    run, told = RunDirectory.open(RUN), Told()
    location(f"{RUN}/{place('directions.zarr')}/zarr.json").unlink()
    assert npeff.check(run, recompute=True, progress=told) == []
    assert told.lines == ["recomputing: directions.zarr"]
    assert differences(s3, reference) == []


def test_components_of_a_run_there_are_used_here(s3: ObjectStore, local: RunDirectory, tmp_path: Path) -> None:
    objects.upload_files(local.path, location(RUN), [name for name in names(local) if not name.startswith(".")])
    new = RunDirectory.create(config(str(tmp_path / "new")))
    assert npeff.transform(new, location(RUN))["transformed_from"] == RUN


def test_fishers_of_a_run_there_are_used_here(
    s3: ObjectStore, local: RunDirectory, reference: dict[str, bytes], tmp_path: Path
) -> None:
    objects.upload_files(local.path, location(RUN), [name for name in names(local) if not name.startswith(".")])
    sections = {name: CONFIG[name] for name in ("factorization", "verification", "executor")}
    document = {"run_dir": str(tmp_path / "new"), "fishers": {"from": RUN}, **sections}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    new = npeff.run(RunConfig.from_yaml(tmp_path / "run.yaml"))
    assert (new.record("fishers") or {})["from"] == RUN
    assert not (new.path / "fishers.zarr").exists()
    found = results({name: (new.path / name).read_bytes() for name in names(new)})
    expected = {name: content for name, content in reference.items() if not name.startswith(("fishers", "task", "dia"))}
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
