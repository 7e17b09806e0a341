"""Throughput of two Ray actors, one core each, over that of one, on the same run file.

The time is from when the first shard was begun to when the last was recorded: without the preparation, Ray's start and
the loading of the model, but with whatever actors wait for each other, the driver and the disk.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import npeff
import numpy as np
from npeff.runs.directory import RunDirectory

from fisher_stage import minilm
from fisher_stage.workload import median_and_spread

N_EXAMPLES, SHARD, BATCH = 4927, 64, 32
LIMIT = 1.7


def actors(rounds: int) -> dict[str, Any] | None:
    if not minilm.available():
        print("actors: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        minilm.drawn_pairs(N_EXAMPLES, folder / "pairs.txt")
        seconds = np.array(
            [[shards_s(folder, f"{done}-{workers}", workers) for workers in (1, 2)] for done in range(rounds)]
        )
    ratio = median_and_spread(seconds[:, 0] / seconds[:, 1])
    result: dict[str, Any] = {
        "n_examples": N_EXAMPLES,
        "rounds": rounds,
        "one_actor_s": float(np.median(seconds[:, 0])),
        "two_actors_s": float(np.median(seconds[:, 1])),
        "speedup": ratio,
        "limit": LIMIT,
    }
    print(f"actors, {N_EXAMPLES} examples, {rounds} rounds")
    for count in ("one_actor", "two_actors"):
        each = result[f"{count}_s"]
        print(f"  {count.replace('_', ' '):<12} {each:8.2f} s {1000 * each / N_EXAMPLES:8.3f} ms/example")
    print(f"  speedup {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f}), at least {LIMIT}")
    return result


def shards_s(folder: Path, name: str, workers: int) -> float:
    config = minilm.config(folder / name, folder / "pairs.txt", shard_size=SHARD, batch_size=BATCH)
    run = RunDirectory.create(config.with_executor(kind="ray", address="local", workers=workers, cpus_per_worker=1))
    npeff.compute_fishers(run)
    written = {path: json.loads(path.read_text())["seconds"] for path in run.shard_records.glob("*.json")}
    ends = {path: path.stat().st_mtime for path in written}
    return max(ends.values()) - min(ends[path] - seconds for path, seconds in written.items())
