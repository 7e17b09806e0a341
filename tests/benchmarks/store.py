"""Writing and reading the shards of a Fisher store on a local disk, with the codecs of Zarr and with those of zarrs.

    python tests/benchmarks/store.py [--shards N] [--rounds N]

Needs the extra `fast`. The two are timed in turns, in this process: the fastest round by the clock, and the median CPU
time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from npeff.storage.fast_codecs import VARIABLE
from npeff.store.component_store import open_factorization, write_factorization
from npeff.store.fisher_store import FisherStore
from rich.console import Console
from rich.table import Table

RESULTS = Path("runs/benchmarks/store.json")
SHARD, RANK, DIM, CLASSES = 256, 9, 2048, 10
CODECS = {"zarr": "0", "zarrs": "1"}


def shard_arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "factors": rng.normal(size=(SHARD, RANK, DIM)).astype(np.float16),
        "frobenius_norms": rng.uniform(1, 2, size=SHARD),
        "grams": rng.normal(size=(SHARD, RANK, RANK)),
        "ranks": np.full(SHARD, RANK),
        "kept_trace": rng.uniform(0.5, 1, size=SHARD),
        "losses": rng.uniform(0, 3, size=SHARD),
        "logits": rng.normal(size=(SHARD, CLASSES)),
        "labels": rng.integers(CLASSES, size=SHARD),
        "valid": np.ones(SHARD, dtype=bool),
    }


def measure(folder: Path, shards: list[dict[str, np.ndarray]]) -> dict[str, tuple[float, float]]:
    """Seconds of each step, by the clock and of the CPU."""

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    seconds, began = {}, now()

    def done(step: str) -> None:
        nonlocal began
        wall, cpu = now()
        seconds[step] = wall - began[0], cpu - began[1]
        began = now()

    store = FisherStore.create(
        folder / "fishers.zarr",
        n_examples=SHARD * len(shards),
        rank=RANK,
        dim=DIM,
        n_classes=CLASSES,
        shard_size=SHARD,
        store_dtype="float16",
        attrs={},
    )
    done("create the store")
    checksums = [store.write_shard(shard, arrays) for shard, arrays in enumerate(shards)]
    done("write all shards, durably")
    for shard in range(len(shards)):
        store.read_factors(shard)
    done("read all factors")
    for shard, checksum in enumerate(checksums):
        store.read_shard(shard, checksum)
    done("read all arrays, with checksums")
    write_factorization(folder / "f.zarr", np.ones((64, DIM)), np.eye(20_000, 64, dtype=np.float32), {})
    stored = open_factorization(folder / "f.zarr")
    done("write a factorization")
    for row in range(0, 20_000, 1000):
        stored.coefficients[row]
    done("read 20 single rows of coefficients")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shards = [shard_arrays(seed) for seed in range(options.shards)]
    found: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in CODECS}
    for _ in range(options.rounds):
        for name, value in CODECS.items():
            os.environ[VARIABLE] = value
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(measure(Path(folder), shards))
    steps = found["zarr"][0]
    results = {
        step: {
            name: {
                "ms": 1000 * min(row[step][0] for row in rows),
                "cpu_ms": 1000 * statistics.median(row[step][1] for row in rows),
            }
            for name, rows in found.items()
        }
        for step in steps
    }
    n_bytes = sum(arrays["factors"].nbytes for arrays in shards)
    columns = [f"{name}, {unit}" for name in CODECS for unit in ("ms", "CPU ms")]
    table = Table("step", *columns, title=f"{options.shards} shards, {n_bytes / 2**20:.0f} MiB")
    for step, row in results.items():
        table.add_row(step, *(f"{value:.0f}" for name in CODECS for value in row[name].values()))
    Console().print(table)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"n_shards": options.shards, "bytes": n_bytes, "steps": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
