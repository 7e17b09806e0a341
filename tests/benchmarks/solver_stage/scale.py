"""Many examples from a store: time per pass, memory, workers, bytes sent; in memory and streamed.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from npeff.execution.create import make_executor
from npeff.execution.executor import WorkerSpec
from npeff.factorization import BLOCK_ROWS, ExampleShard, SolverOptions
from npeff.runs.directory import RunDirectory
from npeff.stages.factorize.driver import run_solver
from npeff.stages.factorize.worker import SolverWorker
from npeff.stages.fitted_examples import FittedExamples
from npeff.store.checkpoint import CheckpointStore
from npeff.store.shard_records import ShardRecords
from planted_run import SIGNATURE

from solver_stage.synthetic import synthetic_run

_IN_MEMORY, _STREAMED = 8 * 2**30, 2**20
"""Memory limits of a worker in bytes."""


def one_pass(rounds: int, tiny: bool) -> dict[str, Any]:
    """One pass over factors in memory beside its two matrix products alone: CPU time of one thread, in turn."""
    n, dim, n_components = (512, 256, 16) if tiny else (8192, 4096, 256)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    factors_NRD = torch.randn(n, 2, dim, generator=generator)
    squares_N = (factors_NRD @ factors_NRD.mT).square().sum(dim=(1, 2))
    factors_NRD /= squares_N.sqrt().sqrt()[:, None, None]
    h_KD = torch.nn.functional.normalize(torch.randn(n_components, dim, generator=generator), dim=1)
    shards = {"float32": ExampleShard(factors_NRD), "float16, converted": ExampleShard(factors_NRD.half())}
    rows = factors_NRD.view(-1, dim)

    def products() -> None:
        for part in rows.split(BLOCK_ROWS["cpu"]):
            products = h_KD @ part.T
            products @ part

    works = {"two products": products} | {
        name: lambda shard=shard: shard.accumulate(h_KD.double()) for name, shard in shards.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    found = {name: min(times[1:]) for name, times in seconds.items()}
    floor = found["two products"]
    print(f"one pass, N = {n}, R = 2, D = {dim}, K = {n_components}: CPU seconds, one thread, fastest of {rounds}")
    for name, cpu_s in found.items():
        print(f"  {name:<24} {cpu_s:8.3f} {cpu_s / floor:6.2f} × the products (wanted at most 1.6)", flush=True)
    return {"n_examples": n, "dim": dim, "n_components": n_components, "cpu_s": found}


def scale(folder: Path, tiny: bool) -> dict[str, Any]:
    """Factorizations of a large store by Ray workers; bytes sent for a tenth of it as well."""
    n, dim, n_components = (2_000, 64, 16) if tiny else (100_000, 4096, 256)
    run = synthetic_run(folder / f"synthetic-{n}-{dim}-{n_components}", n, dim, n_components)
    tenth = synthetic_run(folder / f"synthetic-{n // 10}-{dim}-{n_components}", n // 10, dim, n_components)
    print(f"N = {n}, R = 2, D = {dim}, K = {n_components}, float16 store; seconds by the clock")
    found = {}
    for name, of, workers, limit in (
        ("two workers, a tenth of N", tenth, 2, _IN_MEMORY),
        ("one worker", run, 1, _IN_MEMORY),
        ("two workers", run, 2, _IN_MEMORY),
        ("two workers, streaming", run, 2, _STREAMED),
    ):
        found[name] = _factorized(of, n_components, workers, limit, iterations=5)
        row = found[name]
        print(
            f"  {name:<26} {row['seconds_per_pass']:7.2f} s per pass, {row['seconds']:7.1f} s in all,"
            f" {max(row['peak_mib'].values()):6.0f} MiB per worker, {row['sent_bytes']:,} bytes sent per iteration",
            flush=True,
        )
    one, two = found["one worker"]["seconds_per_pass"], found["two workers"]["seconds_per_pass"]
    streaming = found["two workers, streaming"]["seconds_per_pass"]
    print(f"  two workers: {one / two:.2f} × the speed of one (wanted 1.7);", end=" ")
    print(f"streaming: {streaming / two:.2f} × the time per pass (wanted at most 1.5)", flush=True)
    return found


def _factorized(run: RunDirectory, n_components: int, workers: int, limit: int, iterations: int) -> dict[str, Any]:
    """Some iterations and the exact coefficients at the end; the first iteration, which warms up, is not counted."""
    checkpoints = run.path / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    arguments = {
        "examples": FittedExamples(run.fishers, run.table("examples")),
        "options": SolverOptions(n_components=n_components, max_iterations=iterations, tolerance=1e-15, n_starts=1),
        "device": "cpu",
        "timeout_s": 3600.0,
        "memory_limit_bytes": limit,
    }
    records = ShardRecords(run.shard_records, SIGNATURE).complete()
    began = time.monotonic()
    with (
        make_executor(
            "ray", address="local", workers=workers, cpus_per_worker=1, gpus_per_worker=0.0, timeout_s=3600.0
        ) as executor,
        _peaks_of_workers() as peaks,
    ):
        solved = run_solver(
            executor,
            WorkerSpec(SolverWorker, arguments),
            CheckpointStore(checkpoints, config_hash="benchmark"),
            {shard: record.checksum for shard, record in records.items()},
            run.partial_results("solver"),
            checkpoint_every=1000,
            on_iteration=lambda row: None,
            on_event=print,
        )
    return {
        "seconds": time.monotonic() - began,
        "seconds_per_pass": statistics.median(row["seconds"] for row in solved.history[1:]),
        "seconds_of_passes": [row["seconds"] for row in solved.history],
        "losses": [row["loss"] for row in solved.history],
        "sent_bytes": solved.history[-1]["sent_bytes"],
        "peak_mib": peaks,
    }


@contextmanager
def _peaks_of_workers() -> Iterator[dict[str, float]]:
    """Most MiB resident in every process of a Ray worker, by process number, as Linux tells it."""
    peaks: dict[str, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if (folder / "cmdline").read_bytes().startswith(b"ray::WorkerActor"):
                        status = (folder / "status").read_text()
                        peaks[folder.name] = int(status.split("VmHWM:")[1].split()[0]) / 1024
                except (OSError, IndexError):
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()
