"""Run one way of writing, and die by SIGKILL at its first, second, ... change of the file system: every one of them.

    python crash_points.py SCENARIO FOLDER

Each time a folder FOLDER/<n> is prepared, and a child process writes there until it is about to make its n-th change
(a file opened for writing, a rename, a removal, a folder made or removed). The last folder is of a child that survived.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from npeff.store.checkpoint import CheckpointStore, write_checkpoint_array
from npeff.store.component_store import open_factorization, write_factorization
from npeff.store.diagonal_store import DiagonalSums
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import CompletionRecord, ShardRecords
from npeff.store.tables import write_table

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def shard_arrays(n: int, seed: int, dim: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "factors": rng.normal(size=(n, 1, dim)),
        "frobenius_norms": np.ones(n),
        "grams": np.ones((n, 1, 1)),
        "ranks": np.ones(n, np.int32),
        "kept_trace": np.ones(n),
        "losses": np.ones(n, np.float32),
        "logits": rng.normal(size=(n, 2)),
        "labels": np.zeros(n, np.int64),
        "valid": np.ones(n, bool),
    }


def create_fishers(folder: Path, n_examples: int = 20, shard_size: int = 8, dim: int = 16) -> None:
    FisherStore.create(
        folder / "fishers.zarr", n_examples=n_examples, rank=1, dim=dim, n_classes=2, shard_size=shard_size,
        store_dtype="float16", attrs={},
    )  # fmt: skip


def write_shard(folder: Path, shard: int) -> None:
    store = FisherStore.open(folder / "fishers.zarr")
    start, stop = store.plan.bounds(shard)
    checksum = store.write_shard(shard, shard_arrays(stop - start, shard, store.dim))
    record = CompletionRecord(shard, start, stop, checksum, n_invalid=0, seconds=0.0, signature="s")
    ShardRecords(folder / "shards", "s").write(record)


def prepare_shard(folder: Path) -> None:
    create_fishers(folder)
    write_shard(folder, 0)


def commit_checkpoint(folder: Path, iteration: int) -> None:
    store = CheckpointStore(folder / "checkpoints", keep=2, config_hash="c")
    write_checkpoint_array(store.begin(iteration), "coefficients/00000", np.full(9, iteration))
    store.commit(iteration, {"mu": np.array(float(iteration))})


def prepare_checkpoints(folder: Path) -> None:
    commit_checkpoint(folder, 1)
    commit_checkpoint(folder, 2)


def write_version(folder: Path, version: int) -> None:
    components_KD, coefficients_NK = np.full((2, 3), version), np.full((4, 2), version)
    write_factorization(folder / "factorization.zarr", components_KD, coefficients_NK, {})


def read_version(folder: Path) -> int:
    stored = open_factorization(folder / "factorization.zarr")
    (version,) = {*stored.read_components().flat, *stored.read_coefficients().flat}
    return int(version)


def write_classes(folder: Path, version: int) -> None:
    write_table(folder / "classes.parquet", "classes", {"class": [version], "name": ["a"]})


def diagonal_sums(folder: Path) -> DiagonalSums:
    return DiagonalSums(folder / "diagonal", n_shards=3, signature="s")


def write_unit(folder: Path, unit: int) -> None:
    diagonal_sums(folder).write(unit, {"a": np.full(3, 1 / (unit + 3)), "b": np.array(0.1 * unit)})


def write_and_fold_first_unit(folder: Path) -> None:
    write_unit(folder, 0)
    diagonal_sums(folder).fold(last=True)


def finish_sums(folder: Path) -> None:
    """As the Fisher stage does."""
    sums = diagonal_sums(folder)
    for unit in sums.missing():
        write_unit(folder, unit)
        sums.fold()
    sums.fold(last=True)
    sums.write_mean(folder / "diagonal_fisher.safetensors", 9, {"labels": "exact", "model_fingerprint": "f"})


Step = Callable[[Path], None]
SCENARIOS: dict[str, tuple[Step, Step]] = {
    "create": (lambda folder: None, create_fishers),
    "shard": (prepare_shard, lambda folder: write_shard(folder, 2)),
    "checkpoint": (prepare_checkpoints, lambda folder: commit_checkpoint(folder, 3)),
    "factorization": (lambda folder: write_version(folder, 1), lambda folder: write_version(folder, 2)),
    "sums": (write_and_fold_first_unit, finish_sums),
    "table": (lambda folder: write_classes(folder, 1), lambda folder: write_classes(folder, 2)),
}


def die_at_change(number: int) -> None:
    """From here on, SIGKILL this process just before its change of that number, counted from 0."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        flags = arguments[2] if event == "open" else 0
        writes = event == "open" and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in CHANGES or writes:
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)


def in_child(step: Step, folder: Path, dies_at_change: int | None = None) -> int:
    """The wait status of a forked child that does the step; this process itself starts no threads."""
    child = os.fork()
    if child == 0:
        try:
            if dies_at_change is not None:
                die_at_change(dies_at_change)
            step(folder)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def main(scenario: str, root: Path) -> None:
    prepare, write = SCENARIOS[scenario]
    prepared = root / "prepared"
    prepared.mkdir()
    if in_child(prepare, prepared):
        raise SystemExit(f"could not prepare {prepared}")
    for number in itertools.count():
        folder = shutil.copytree(prepared, root / f"{number:03d}")
        status = in_child(write, folder, dies_at_change=number)
        if status == 0:
            shutil.rmtree(prepared)
            return
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"the writer in {folder} ended with status {status}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
