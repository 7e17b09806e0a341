"""Several factorizations of the Fishers of one run: no Fisher is computed again, and each is what a fresh run gives."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import in_process
import npeff
import numpy as np
import pytest
from end_to_end.commands import Command
from end_to_end.damage import NOT_COMPARED
from end_to_end.surroundings import SMALL
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory, StageState
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import SilentProgress, Ticker
from npeff.stages.fishers.inspection import TaskWorker
from npeff.stages.fishers.worker import FisherWorker
from npeff.stages.status import factorizations, status

OTHER = {"name": "k2", "n_components": 2, "held_out_fraction": 0.5, "l1": 0.01}
"""The settings of the second factorization."""


def config(run_dir: Path, **factorization: Any) -> RunConfig:
    sections = {**SMALL, "factorization": {**SMALL["factorization"], **factorization}}
    return RunConfig.model_validate({**sections, "run_dir": str(run_dir)})


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one factorization. Read only."""
    return npeff.run(config(tmp_path_factory.mktemp("first") / "run")).path


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with the settings of the second factorization from the start. Read only."""
    return npeff.run(config(tmp_path_factory.mktemp("fresh") / "run", **{**OTHER, "name": "default"}))


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "run"))


@pytest.fixture(autouse=True)
def no_fishers(first: Path, fresh: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing a Fisher, or inspecting the task for it, fails after the two runs of the module are finished."""

    def computed(*_: object) -> None:
        raise AssertionError("a Fisher is computed")

    for worker, method in ((FisherWorker, "compute"), (FisherWorker, "compute_unit"), (TaskWorker, "inspect")):
        monkeypatch.setattr(worker, method, computed)


def contents(home: Path) -> dict[str, str]:
    """A hash of each file of a factorization, without its settings and what holds times."""
    files = {path.relative_to(home).as_posix(): path for path in home.rglob("*") if path.is_file()}
    own = ("factorization.yaml", "tables/examples.parquet")
    names = [name for name in files if not NOT_COMPARED.fullmatch(name) and name not in own]
    return {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in names}


def differences(run: RunDirectory, other: RunDirectory) -> list[str]:
    """Files of two factorizations, and columns of their examples, that are not the same to the bit."""
    mine, theirs = contents(run.home), contents(other.home)
    assert "factorization.zarr/coefficients/c/0/0" in theirs
    assert "tables/verification.parquet" in theirs
    names = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    examples = [ComponentStore.open(each.path, each.name).table("examples") for each in (run, other)]
    return names + [name for name in examples[1].column_names if not examples[0][name].equals(examples[1][name])]


def test_another_factorization_uses_the_fishers_and_is_what_a_fresh_run_gives(run: Path, fresh: RunDirectory) -> None:
    before = contents(RunDirectory.open(run).home)
    second = npeff.run(config(run, **OTHER))
    assert second.home == run / "factorizations" / "k2"
    assert differences(second, fresh) == []
    assert contents(RunDirectory.open(run).home) == before
    assert second.report.exists()
    assert "npeff query" in second.report.read_text()
    mine, other = ComponentStore.open(run), ComponentStore.open(run, "k2")
    assert (mine.components.shape[0], other.components.shape[0]) == (3, 2)
    assert mine.sql("select count(*) as n from components")["n"].to_pylist() == [3]
    assert other.sql("select count(*) as n from components")["n"].to_pylist() == [2]
    splits = [store.sql("select count(*) as n from examples where split = 'fit'") for store in (mine, other)]
    assert [answer["n"].to_pylist() for answer in splits] == [[27], [20]]
    assert len(other.verification(1)) == 4
    assert npeff.check(RunDirectory.open(run)) == []
    shown = factorizations(RunDirectory.open(run))
    assert [(each.name, each.n_components, each.state) for each in shown] == [
        ("default", 3, StageState.COMPLETE),
        ("k2", 2, StageState.COMPLETE),
    ]
    assert all(set(each.complete) >= {"factorize", "lift", "verify", "attribute", "report"} for each in shown)
    assert all(each.n_bytes > 10_000 for each in shown)


class Interrupted(SilentProgress):
    """Ends the command at the first step of a stage."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        def tick(done: int, fact: str = "", *, last: bool = False, numbers: Any = None) -> None:
            if name == self._stage and (name != "factorize" or done == 7):  # one checkpoint is there
                raise KeyboardInterrupt

        yield tick


def test_a_factorization_that_is_interrupted_is_resumed(run: Path, fresh: RunDirectory) -> None:
    for stage in ("factorize", "lift", "verify"):
        with pytest.raises(KeyboardInterrupt):
            npeff.run(config(run, **OTHER), progress=Interrupted(stage))
    done = {row.stage: row.state for row in status(RunDirectory.open(run, "k2"))}
    assert (done["lift"], done["verify"]) == (StageState.COMPLETE, StageState.PARTIAL)
    assert differences(npeff.run(RunDirectory.open(run, "k2")), fresh) == []


@pytest.mark.slow
@pytest.mark.process
def test_a_factorization_whose_command_is_killed_is_resumed(
    run: Path, fresh: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, *filter(None, sys.path)]))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(config(run, **OTHER).to_yaml())
    before = contents(RunDirectory.open(run).home)
    with Command("run", run_file, log=tmp_path / "log") as command:
        checkpoints = run / "factorizations" / "k2" / "checkpoints"
        command.wait_for(lambda: (checkpoints / "000005").exists(), "the first checkpoint was there")
        command.driver.kill()
    assert not (run / "factorizations" / "k2" / "stages" / "verify.json").exists()
    assert differences(npeff.run(RunDirectory.open(run, "k2")), fresh) == []
    assert contents(RunDirectory.open(run).home) == before


def test_each_command_uses_the_factorization_that_it_is_given(run: Path, fresh: RunDirectory) -> None:
    second = RunDirectory.create(config(run, **OTHER))
    for stage in (npeff.factorize, npeff.lift, npeff.verify, npeff.attribute, npeff.report):
        stage(second)
        assert npeff.check(RunDirectory.open(run), factorization="k2") == []
    assert differences(second, fresh) == []
    shutil.rmtree(second.directions)
    second.own_examples.unlink()
    found = [each.what for each in npeff.check(RunDirectory.open(run))]
    assert found == ["directions.zarr"]
    assert npeff.check(RunDirectory.open(run), recompute=True) == []
    assert second.own_examples.exists()
    assert differences(RunDirectory.open(second.home), fresh) == []


def test_components_of_two_factorizations_are_matched(
    run: Path, fresh: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    npeff.run(config(run, **OTHER))
    mine, other = ComponentStore.open(run), ComponentStore.open(run, "k2")
    rows = npeff.compare(mine, other).to_pylist()
    assert [row["component"] for row in rows] == [0, 1, 2]
    matched = [row for row in rows if row["other_component"] is not None]
    assert sorted(row["other_component"] for row in matched) == [0, 1]
    for row in matched:
        a, b = (s.components[row[c]].compute() for s, c in ((mine, "component"), (other, "other_component")))
        assert row["cosine"] == pytest.approx(float(a @ b))
        flat = [
            np.concatenate([rows[row[c]].compute().ravel() for rows in s.directions.values()])
            for s, c in ((mine, "component"), (other, "other_component"))
        ]
        assert row["direction_cosine"] == pytest.approx(float(flat[0] @ flat[1]), abs=1e-5)
    assert (
        in_process.command("compare", run, "--factorization", "default", "--factorization", "k2", "--format", "json")
        == 0
    )
    assert [row["cosine"] for row in json.loads(capfd.readouterr().out)] == [row["cosine"] for row in rows]
    itself = npeff.compare(other, ComponentStore.open(fresh.path)).to_pylist()
    assert [(row["component"], row["other_component"]) for row in itself] == [(0, 0), (1, 1)]
    assert all(row["direction_cosine"] == pytest.approx(1, abs=1e-6) for row in itself)
    assert all(row["shared_top_examples"] == 8 for row in itself)
    assert [row["component"] for row in npeff.compare(other, mine).to_pylist()] == [0, 1, None]


def test_components_in_other_spaces_are_not_compared(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npeff.store.fisher_store import FisherStore

    other = Path(shutil.copytree(run, tmp_path / "other"))
    read = FisherStore.read_attributes

    def changed(path: Path) -> dict[str, Any]:
        return read(path) | ({"sketch": {"kind": "other"}} if Path(path).is_relative_to(other) else {})

    monkeypatch.setattr(FisherStore, "read_attributes", changed)
    with pytest.raises(QueryError, match="are not comparable, because the runs differ in sketch or seed"):
        npeff.compare(ComponentStore.open(run), ComponentStore.open(other))


def test_a_run_uses_the_fishers_of_another_run(first: Path, fresh: RunDirectory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(first, tmp_path / "source"))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        f"run_dir: {tmp_path / 'new'}\nfishers: {{from: {source}}}\nexecutor: {{kind: serial}}\n"
        "factorization: {n_components: 2, held_out_fraction: 0.5, l1: 0.01, max_iterations: 20}\n"
        "verification: {top_examples: 4, baseline_examples: 8}\n"
    )
    before = contents(source)
    new = npeff.run(RunConfig.from_yaml(run_file))
    assert differences(new, fresh) == []
    assert contents(source) == before
    assert not (new.path / "fishers.zarr").exists()
    record = new.record("fishers")
    assert record is not None
    assert record["from"] == str(source)
    assert npeff.check(new) == []
    mine = ComponentStore.open(new.path)
    assert npeff.compare(mine, ComponentStore.open(source))["component"].to_pylist() == [0, 1, None]
    (source / "shards" / "00001.json").unlink()
    (damage,) = npeff.check(new)
    assert damage.why == f"shard 1 of {source / 'fishers.zarr'} has no record"
    assert damage.remedy == f"npeff check --recompute {source}"
    shutil.rmtree(source)
    with pytest.raises(RunDirectoryError, match=r"no run in .*source"):
        npeff.compute_fishers(new)
