"""The lift by several workers: a block's examples are divided among them, and their sums added up."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
from end_to_end.test_polish import config_of, copy_of, directions_of, narrow
from npeff.execution.executor import WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.runs.directory import RunDirectory
from npeff.storage.checksums import read_json
from npeff.storage.errors import StoreError
from places import write_configuration

__all__ = ["narrow"]


class Several(SerialExecutor):
    """As many workers as it says, one after the other; ends after some units."""

    def __init__(self, workers: int, units: int = -1) -> None:
        super().__init__()
        self.workers, self.left = workers, units
        self.done: list[str] = []

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
        for found in super().map(spec, method, items, **options):
            self.done.append(method)
            yield found
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.fixture(scope="module", params=["fishers", "whitened", "diagonal_groups"])
def factorized(request: pytest.FixtureRequest, narrow: RunDirectory, tmp_path_factory: Any) -> RunDirectory:
    if request.param == "fishers":
        return narrow
    if request.param == "whitened":
        return copy_of(narrow, tmp_path_factory.mktemp("whitened") / "run", direction="whitened")
    path = tmp_path_factory.mktemp("diagonals") / "run"
    document = config_of(path, {"dim": 48}).model_dump()
    document["fishers"]["diagonal"]["groups"] = True
    document["factorization"]["kind"] = request.param
    run = RunDirectory.create(type(narrow.config).model_validate(document))
    npeff.compute_fishers(run)
    npeff.factorize(run)
    return run


def copied(run: RunDirectory, path: Path) -> RunDirectory:
    shutil.copytree(run.path, path)
    write_configuration(path, run.config)
    return RunDirectory.open(path)


def before_the_pass(run: RunDirectory) -> list[str]:
    """The sums of the stored factors, each over one of two shards."""
    if run.config.factorization.kind != "fishers":
        return []
    return ["sketch_sums"] * 2 + ["product_sums"] * 2 * (run.config.lift.direction == "whitened")


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_workers_share_the_examples_and_find_the_same(factorized: RunDirectory, tmp_path: Path) -> None:
    runs = []
    for workers, calls in ((1, {"lift"}), (2, {"add_up", "finish"}), (5, {"add_up", "finish"})):
        executor = Several(workers)
        runs.append(copied(factorized, tmp_path / f"{workers}"))
        npeff.lift(runs[-1], executor=executor)
        assert set(executor.done) == calls | set(before_the_pass(factorized))
        assert executor.done.count("add_up") == (min(workers, 2) if workers > 1 else 0)  # of two shards
        assert not (runs[-1].partial_results("lift") / "sums").exists()
    for run in runs[1:]:
        close(directions_of(run), directions_of(runs[0]))
        for component in range(3):
            name = f"{component:05d}.json"
            facts, expected = (read_json(each.partial_results("lift") / name) for each in (run, runs[0]))
            for cosine in ("cosine", "cosine_own"):
                assert facts[cosine] == pytest.approx(expected[cosine], abs=1e-5)


@pytest.mark.parametrize("units", [2, *(pytest.param(units, marks=pytest.mark.slow) for units in (1, 3))])
def test_it_goes_on_from_the_sums_that_are_there(factorized: RunDirectory, tmp_path: Path, units: int) -> None:
    undisturbed, run = (copied(factorized, tmp_path / name) for name in ("undisturbed", "interrupted"))
    npeff.lift(undisturbed, executor=Several(2))
    with pytest.raises(KeyboardInterrupt):
        npeff.lift(run, executor=Several(2, len(before_the_pass(run)) + units))
    sums = sorted((run.partial_results("lift") / "sums").iterdir())
    assert len(sums) == min(units, 2)
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sums]
    (sums[0].parent / "0123456789abcdef-0-of-2.f32").touch()  # as another number of workers might leave
    with pytest.raises(KeyboardInterrupt):
        npeff.lift(run, executor=Several(2, 2))
    assert [path for path in sorted(sums[0].parent.iterdir()) if path in sums] == sums
    assert len(list(sums[0].parent.iterdir())) == 2
    assert before == [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sums]
    npeff.lift(run, executor=Several(2))
    close(directions_of(run), directions_of(undisturbed))


def test_truncated_sums_are_said_to_be_so(narrow: RunDirectory, tmp_path: Path) -> None:
    run = copy_of(narrow, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        npeff.lift(run, executor=Several(2, len(before_the_pass(run)) + 2))
    for path in (run.partial_results("lift") / "sums").iterdir():
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StoreError, match="truncated: delete it and run the same command again"):
        npeff.lift(run, executor=Several(2))
