"""`npeff spectrum`: the eigenvalues of stored Fishers, whatever the shards, the workers and the kills."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
from in_process import command
from npeff.execution.executor import WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.fisher.spectrum import spectrum_statistics
from npeff.query.components import ComponentStore
from npeff.reports.report import render_report
from npeff.runs.directory import RunDirectory
from npeff.stages.spectrum import plan
from npeff.stages.spectrum.plan import SETS
from npeff.stages.status import status
from npeff.store.array_files import read_arrays, write_arrays
from npeff.store.tables import read_table
from planted import Planted, planted_fishers
from planted_run import planted_run

N, R, D, SHARD = 230, 2, 40, 29
PART = SHARD * R * D**2 // 2
"""Products of a call that adds half of a shard."""
PROBLEM = planted_fishers(n_examples=N, rank=R, dim=D, n_components=5, noise=0.2, n_active=3, seed=0)


def planted(path: Path, shard_size: int = SHARD, problem: Planted = PROBLEM, **sections: Any) -> RunDirectory:
    return planted_run(path, problem, shard_size, **sections)


def statistics(run: RunDirectory) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(run.table("spectrum_statistics"), "spectrum_statistics").to_pylist()
    return rows


def values(run: RunDirectory, n_examples: int = N) -> dict[str, Any]:
    return {row["name"]: row["value"] for row in statistics(run) if row["n_examples"] == n_examples}


def eigenvalues(run: RunDirectory) -> np.ndarray:
    found: np.ndarray = read_table(run.table("spectrum"), "spectrum")["eigenvalue"].to_numpy()
    return found


def dense(factors_NRD: np.ndarray) -> np.ndarray:
    """Eigenvalues of the mean of F_i = A_iᵀ A_i, descending, in float64."""
    rows = factors_NRD.astype(np.float32).astype(np.float64).reshape(-1, factors_NRD.shape[-1])
    found: np.ndarray = np.linalg.eigvalsh(rows.T @ rows / len(factors_NRD))[::-1]
    return found


class TwoWorkers(SerialExecutor):
    """Constructs two workers, which take turns, and works on the items in reverse order."""

    workers = 2

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **more: Any) -> Iterator[tuple[Any, Any]]:
        both = [spec.construct(), spec.construct()]
        for turn, item in enumerate(reversed(list(items))):
            yield item, getattr(both[turn % 2], method)(item)


@pytest.fixture(scope="module", autouse=True)
def _few_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_PIECES", 16)  # each takes a while to read
        yield


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The statistics with two parts of every group."""
    run = planted(tmp_path_factory.mktemp("parts") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_PRODUCTS", PART)
        npeff.spectrum(run)
    return run


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = planted(tmp_path_factory.mktemp("spectrum") / "run")
    npeff.spectrum(run)
    return run


def test_eigenvalues_and_statistics_are_those_of_the_dense_mean(done: RunDirectory) -> None:
    expected = dense(PROBLEM.factors_NRD)
    assert eigenvalues(done) == pytest.approx(expected, abs=1e-6 * expected[0])
    found, exact = values(done), spectrum_statistics(expected, N, D)
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["mean_squared_norm"] == pytest.approx(1.0)
    assert found["cap"] == D
    shares = read_table(done.table("spectrum"), "spectrum")["cumulative"].to_numpy()
    assert shares == pytest.approx(np.cumsum(expected) / expected.sum(), abs=1e-6)


def test_statistics_of_a_half_and_a_quarter_have_no_interval_and_their_own_examples(done: RunDirectory) -> None:
    counts = sorted({row["n_examples"] for row in statistics(done)})
    assert counts[2] == N
    assert counts[0] == pytest.approx(N / 4, abs=14)
    assert counts[1] == pytest.approx(N / 2, abs=14)
    pieces = [piece for group in SETS[-1] for piece in plan_of(done).pieces(group)]
    shards = [
        np.arange(piece.shard * SHARD, min((piece.shard + 1) * SHARD, N))[piece.first :: piece.step] for piece in pieces
    ]
    half = np.sort(np.concatenate(shards))
    assert len(half) == counts[1]
    expected = spectrum_statistics(dense(PROBLEM.factors_NRD[half]), len(half), D)
    found = values(done, counts[1])
    assert all(found[name] == pytest.approx(value, rel=1e-5) for name, value in expected.items())
    for row in statistics(done):
        assert (row["low"] is None) == (row["n_examples"] != N or row["name"] == "cap")
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]


def plan_of(run: RunDirectory) -> plan.SpectrumPlan:
    n_shards = len(list(run.shard_records.iterdir()))
    return plan.SpectrumPlan(N, N * R, D, 1.0, n_shards, SHARD * R)


def test_shards_and_their_order_change_nothing(done: RunDirectory, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(N)
    shuffled = Planted(PROBLEM.factors_NRD[order], PROBLEM.components_KD, PROBLEM.coefficients_NK[order])
    run = planted(tmp_path / "run", N, shuffled)
    npeff.spectrum(run)
    assert eigenvalues(run) == pytest.approx(eigenvalues(done), abs=1e-6 * eigenvalues(done)[0])
    found = values(run)
    for name, value in values(done).items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_two_workers_find_the_same(done: RunDirectory, tmp_path: Path) -> None:
    run = planted(tmp_path / "run")
    npeff.spectrum(run, executor=TwoWorkers())
    assert statistics(run) == statistics(done)
    assert eigenvalues(run).tolist() == eigenvalues(done).tolist()


class Killed(SerialExecutor):
    """Is killed, as by Ctrl-C, after some results of a method."""

    def __init__(self, method: str, after: int, during: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._method, self._left, self._during = method, after, during
        self.calls: list[Any] = []

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **more: Any) -> Iterator[tuple[Any, Any]]:
        for item, result in super().map(spec, method, items, **more):
            self.calls.append((method, item))
            if method == self._method:
                self._left -= 1
                if self._left < 0:
                    self._during()
                    raise KeyboardInterrupt
            yield item, result


@pytest.mark.parametrize(("method", "after"), [("add", 9), ("eigenvalues", 4)])
def test_a_killed_command_finishes_with_the_same_numbers(
    method: str, after: int, in_parts: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PRODUCTS", PART)
    run = planted(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        npeff.spectrum(run, executor=Killed(method, after))
    (row,) = [row for row in status(run) if row.stage == "spectrum"]
    assert row.state == "partial"
    resumed = Killed("", 0)
    npeff.spectrum(run, executor=resumed)
    added = [item for called, item in resumed.calls if called == "add"]
    n_parts = sum(len(plan_of(run).parts(group)) for group in range(8))
    assert n_parts == 16
    assert len(added) == (n_parts - after - 1 if method == "add" else 0)
    assert statistics(run) == statistics(in_parts)
    assert not run.partial_results("spectrum").exists()


def test_a_part_that_is_added_is_not_added_again(done: RunDirectory, tmp_path: Path) -> None:
    run = planted(tmp_path / "run")

    class Twice(SerialExecutor):
        """A worker is lost after it has written its file, and another one gets the item."""

        def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **more: Any) -> Iterator[tuple[Any, Any]]:
            items = list(items)
            list(super().map(spec, method, items, **more))
            yield from super().map(spec, method, items, **more)

    npeff.spectrum(run, executor=Twice())
    assert statistics(run) == statistics(done)


def test_a_damaged_sum_is_computed_again_and_a_foreign_one_is_not_used(done: RunDirectory, tmp_path: Path) -> None:
    run = planted(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        npeff.spectrum(run, executor=Killed("totals", 0))
    sums = run.partial_results("spectrum")
    damaged = sums / "group-3.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    foreign = sums / "group-4.safetensors"
    arrays, metadata = read_arrays(foreign)
    write_arrays(foreign, arrays, {**metadata, "signature": "of other Fishers"})
    again = Killed("", 0)
    npeff.spectrum(run, executor=again)
    assert [item for method, item in again.calls if method == "add"] == [(3, 0), (4, 0)]
    assert statistics(run) == statistics(done)


def test_damage_is_found_and_recomputed(done: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(done.path, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    before = statistics(run)
    table = run.table("spectrum_statistics")
    table.write_bytes(table.read_bytes()[:-10])
    run.table("spectrum").unlink()
    assert {each.what for each in npeff.check(run)} == {
        "table spectrum_statistics",
        "table spectrum",
        "configuration",
    }
    assert [each.what for each in npeff.check(run, recompute=True)] == ["configuration"], "the Fishers are planted"
    assert statistics(run) == before


def test_the_rows_of_few_examples_give_the_same_as_their_sum(tmp_path: Path) -> None:
    few = planted_fishers(n_examples=24, rank=R, dim=64, n_components=3, noise=0.3, n_active=2, seed=1)
    run = planted(tmp_path / "run", 5, few)
    assert npeff.spectrum(run)["computed_from"] == "rows"
    expected = dense(few.factors_NRD)
    assert len(eigenvalues(run)) == 48
    assert eigenvalues(run) == pytest.approx(expected[:48], abs=1e-6 * expected[0])
    found = values(run, 24)
    assert found["cap"] == 48
    for name, value in spectrum_statistics(expected, 24, 64).items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_matrices_that_are_too_large_leave_exact_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_LARGEST", 16)
    run = planted(tmp_path / "run")
    record = npeff.spectrum(run)
    assert "460 rows in 40 dimensions are too many" in record["not_computed"]
    found = values(run)
    assert found["trace"] == pytest.approx(dense(PROBLEM.factors_NRD).sum(), rel=1e-6)
    assert found["mean_squared_norm"] == pytest.approx(1.0)
    assert found["effective_rank"] is None
    assert len(eigenvalues(run)) == 0


def test_the_report_and_a_query_have_the_statistics(done: RunDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    page = render_report(ComponentStore.open(done.path), 12)
    assert f"{int(values(done)['directions_90'])} directions hold 90% of the information of {D} parameters" in page
    assert 'id="spectrum"' in page
    assert "Participation ratio" in page
    assert command("query", done.path, "spectrum", "--format", "csv") == 0
    shown = capfd.readouterr().out
    assert f'"effective_rank",,"exact",{N},' in shown
