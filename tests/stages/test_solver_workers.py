"""What solver workers agree on, whatever their number, memory and losses; they are forks of this process."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from execution.forked import ForkedExecutor
from npeff.execution.executor import ExecutorError, Group, WorkerSpec
from npeff.factorization import FactorsInMemory, SolverOptions, Statistics, StreamedFactors
from npeff.runs.directory import RunDirectory
from npeff.stages.factorize.driver import SolverRun, run_solver
from npeff.stages.factorize.packed_rows import mapped_rows
from npeff.stages.factorize.stored_factors import ShardRows, stored_factors
from npeff.stages.factorize.worker import SolverWorker
from npeff.stages.fitted_examples import FittedExamples
from npeff.storage.checksums import file_checksum, read_json, write_json_atomically
from npeff.storage.errors import StoreError
from npeff.store.checkpoint import CheckpointStore
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords
from planted import planted_fishers
from planted_run import SIGNATURE, planted_run

pytestmark = pytest.mark.process

N_COMPONENTS, DIM = 12, 64
IN_FLOAT32, AS_STORED, STREAMED = 2**30, 400_000, 1_000
"""Memory limits, in bytes, for the 2,000 examples of `undisturbed`."""


def prepared(path: Path, n_examples: int, held_out_fraction: float = 0.2) -> RunDirectory:
    truth = planted_fishers(n_examples=n_examples, rank=3, dim=DIM, n_components=N_COMPONENTS, noise=0.3, seed=0)
    return planted_run(
        path,
        truth,
        shard_size=-(-n_examples // 9),
        fishers={"store_dtype": "float16"},
        factorization={"held_out_fraction": held_out_fraction},
    )


def checksums(run: RunDirectory) -> dict[int, str]:
    records = ShardRecords(run.shard_records, SIGNATURE).complete()
    return {shard: record.checksum for shard, record in records.items()}


@dataclass(frozen=True)
class Solved(SolverRun):
    coefficients_NK: np.ndarray


def solve(
    run: RunDirectory,
    workers: int,
    *,
    memory_limit_bytes: int = IN_FLOAT32,
    executor: Any = None,
    timeout_s: float = 60.0,
    on_iteration: Any = lambda row: None,
    events: list[str] | None = None,
) -> Solved:
    arguments = {
        "examples": FittedExamples(run.fishers, run.table("examples")),
        "options": SolverOptions(n_components=N_COMPONENTS, max_iterations=14, tolerance=1e-15, subsample=200),
        "device": "cpu",
        "timeout_s": timeout_s,
        "memory_limit_bytes": memory_limit_bytes,
    }
    folder = run.path / f"solution-{workers}-{memory_limit_bytes}-{timeout_s}"
    solved = run_solver(
        executor or ForkedExecutor(workers),
        WorkerSpec(SolverWorker, arguments),
        CheckpointStore(run.path / f"checkpoints-{workers}-{memory_limit_bytes}-{timeout_s}", config_hash="none"),
        checksums(run),
        folder,
        checkpoint_every=2,
        on_iteration=on_iteration,
        on_event=(events if events is not None else []).append,
    )
    plan = FisherStore.open(run.fishers).plan
    mapped = mapped_rows(folder, "coefficients", solved.workers, plan)
    shutil.rmtree(folder)  # what is mapped stays
    return Solved(**vars(solved), coefficients_NK=np.concatenate(mapped))


def losses(solved: Solved) -> np.ndarray:
    return np.array([row["loss"] for row in solved.history])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return prepared(tmp_path_factory.mktemp("solver") / "run", 2000)


@pytest.fixture(scope="module")
def undisturbed(run: RunDirectory) -> Solved:
    return solve(run, 2)


@pytest.mark.parametrize("workers", [1, 4])
def test_losses_are_the_same_at_every_iteration_whatever_the_number_of_workers(
    workers: int, run: RunDirectory, undisturbed: Solved
) -> None:
    solved = solve(run, workers)
    assert solved.workers == workers
    assert len(losses(solved)) == 14
    np.testing.assert_allclose(losses(solved), losses(undisturbed), rtol=1e-6)
    np.testing.assert_allclose(solved.coefficients_NK, undisturbed.coefficients_NK, atol=1e-4)


@pytest.mark.parametrize(
    ("memory_limit_bytes", "kind"),
    [(IN_FLOAT32, FactorsInMemory), (AS_STORED, FactorsInMemory), (STREAMED, StreamedFactors)],
)
def test_factors_as_stored_and_streamed_ones_give_the_same_bits(
    memory_limit_bytes: int, kind: type, run: RunDirectory, undisturbed: Solved
) -> None:
    store = FisherStore.open(run.fishers)
    chosen = [ShardRows(shard, checksum, np.arange(0, 210, 2)) for shard, checksum in checksums(run).items()][::2]
    source = stored_factors(store, chosen, torch.device("cpu"), memory_limit_bytes)
    assert type(source) is kind
    assert source.dtype == (torch.float32 if memory_limit_bytes == IN_FLOAT32 else torch.float16)
    expected = np.concatenate([store.read_shard(part.shard)["factors"][part.rows] for part in chosen])
    np.testing.assert_array_equal(torch.cat(list(source.blocks())).float().numpy(), expected)

    solved = solve(run, 2, memory_limit_bytes=memory_limit_bytes)
    np.testing.assert_array_equal(losses(solved), losses(undisturbed))
    np.testing.assert_array_equal(solved.coefficients_NK, undisturbed.coefficients_NK)
    assert solved.result.explained_held_out == undisturbed.result.explained_held_out


def test_a_shard_that_is_not_the_recorded_one_is_refused(run: RunDirectory) -> None:
    store = FisherStore.open(run.fishers)
    chosen = [ShardRows(0, "of another shard", np.arange(5))]
    with pytest.raises(StoreError, match="does not match its checksum"):
        stored_factors(store, chosen, torch.device("cpu"), IN_FLOAT32)
    with pytest.raises(StoreError, match="does not match its checksum"):
        list(stored_factors(store, chosen, torch.device("cpu"), 1).blocks())


@pytest.mark.slow
def test_bytes_sent_do_not_depend_on_the_number_of_examples(tmp_path: Path, undisturbed: Solved) -> None:
    expected = Statistics.zeros(N_COMPONENTS, DIM).pack().nbytes
    assert expected < 8 * (N_COMPONENTS * DIM + N_COMPONENTS**2 + 10)
    assert {row["sent_bytes"] for row in undisturbed.history} == {expected}
    for n_examples in (1_000, 10_000):
        solved = solve(prepared(tmp_path / f"{n_examples}", n_examples), 2)
        assert {row["sent_bytes"] for row in solved.history} == {expected}
    assert {row["sent_bytes"] for row in solve(prepared(tmp_path / "one", 1_000), 1).history} == {0}


@pytest.mark.parametrize(("what", "timeout_s"), [(signal.SIGKILL, 50.0), (signal.SIGSTOP, 3.0)])
def test_a_run_goes_on_from_its_checkpoint_with_fewer_workers_when_one_is_killed_or_hangs(
    what: signal.Signals, timeout_s: float, run: RunDirectory, undisturbed: Solved
) -> None:
    executor, events = ForkedExecutor(3), []

    def lose(row: dict[str, Any]) -> None:
        if row["iteration"] == 5 and executor.workers == 3:
            executor.workers = 2
            os.kill(executor.latest.processes[2].pid, what)

    solved = solve(run, 3, executor=executor, timeout_s=timeout_s, on_iteration=lose, events=events)
    assert solved.workers == 2
    assert events[0].endswith("restarting the workers from iteration 4")
    assert len(events) == 2
    np.testing.assert_allclose(losses(solved), losses(undisturbed), rtol=1e-6)
    np.testing.assert_allclose(solved.coefficients_NK, undisturbed.coefficients_NK, atol=1e-4)


class Disagreeing(ForkedExecutor):
    """Its last worker judges the third step otherwise, as its processor might."""

    @contextmanager
    def group(self, spec: WorkerSpec) -> Iterator[Group]:
        with super().group(spec) as group:
            call = group.call

            def called(method: str, *arguments: Any) -> list[Any]:
                results = call(method, *arguments)
                if method == "step" and (record := results[-1].record).iteration == 3:
                    results[-1] = replace(results[-1], record=replace(record, accepted=not record.accepted))
                return results

            group.call = called  # type: ignore[method-assign]
            yield group


def test_workers_that_judge_a_step_differently_do_not_go_on(tmp_path: Path, undisturbed: Solved) -> None:
    run = prepared(tmp_path / "run", 2000)
    with pytest.raises(ExecutorError, match="disagree on whether step 3 lowers the loss") as caught:
        solve(run, 2, executor=Disagreeing(2))
    assert "\n" not in str(caught.value)
    solved = solve(run, 2)
    np.testing.assert_array_equal(losses(solved), losses(undisturbed), "it went on from its checkpoint")


def as_version_1(folder: Path, run: RunDirectory) -> None:
    """Rewrite a checkpoint as earlier releases wrote it: one file of coefficients per shard."""
    fit_N = FittedExamples(run.fishers, run.table("examples")).read()[0].fit_N
    plan, manifest = FisherStore.open(run.fishers).plan, read_json(folder / "MANIFEST.json")
    (folder / "coefficients").mkdir()
    files = sorted(folder.glob("coefficients-*.npy"))
    for rank, file in enumerate(files):
        rows, start = np.load(file), 0
        for shard in range(rank, plan.n_shards, len(files)):
            stop = start + int(fit_N[slice(*plan.bounds(shard))].sum())
            name = f"coefficients/{shard:05d}"
            np.save(folder / f"{name}.npy", rows[start:stop])
            manifest["checksums"][name] = file_checksum(folder / f"{name}.npy")
            start = stop
        assert start == len(rows)
        del manifest["checksums"][file.stem]
        file.unlink()
    write_json_atomically(folder / "MANIFEST.json", manifest | {"schema_version": 1})


def test_a_checkpoint_of_an_earlier_release_is_resumed(tmp_path: Path, undisturbed: Solved) -> None:
    run = prepared(tmp_path / "run", 2000)
    with pytest.raises(ExecutorError, match="disagree"):
        solve(run, 2, executor=Disagreeing(2))
    (folder,) = run.path.glob("checkpoints-*/*")
    as_version_1(folder, run)
    events: list[str] = []
    solved = solve(run, 2, events=events)
    assert events == ["resuming from iteration 2"]
    np.testing.assert_array_equal(losses(solved), losses(undisturbed))
    np.testing.assert_array_equal(solved.coefficients_NK, undisturbed.coefficients_NK)
