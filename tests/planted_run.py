"""A run directory whose Fishers are those of a planted problem: everything from `npeff select` on works on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from planted import Planted

from pipeline.config import RunConfig
from pipeline.result_tables import write_example_tables, write_parameter_table
from pipeline.run_directory import RunDirectory
from pipeline.store import CompletionRecord, FisherStore, ShardRecords

_SIGNATURE = "planted"


def write_planted_run(path: Path, planted: Planted, **sections: dict[str, Any]) -> RunDirectory:
    """A run with a complete stage of Fishers, at `path`; `sections` of its run file, serial by default."""
    n_examples, rank, dim = planted.factors_NRD.shape
    document = {
        "run_dir": str(path),
        "task": {"name": "imported"},
        "factorization": {"n_components": len(planted.components_KD)},
        "executor": {"kind": "serial"},
        **sections,
    }
    run = RunDirectory.create(RunConfig.model_validate(document))
    sizes = {"n_examples": n_examples, "rank": rank, "dim": dim, "n_classes": 2, "shard_size": 512}
    store = FisherStore.create(run.fishers, **sizes, store_dtype="float32", attrs={"model_fingerprint": "none"})
    records = ShardRecords(run.shard_records, _SIGNATURE)
    for shard in range(store.plan.n_shards):
        start, stop = store.plan.bounds(shard)
        checksum = store.write_shard(shard, _arrays(planted.factors_NRD[start:stop]))
        records.write(CompletionRecord(shard, start, stop, checksum, 0, 0.0, _SIGNATURE))
    ids = [f"example-{i}" for i in range(n_examples)]
    write_example_tables(run, pa.table({"id": ids}), ["no", "yes"])
    write_parameter_table(run, {"weight": (dim,)}, {})
    run.complete("fishers", {"n_examples": n_examples, "n_invalid": 0, "n_classes": 2, "rank": rank, "sketch_dim": dim,
                             "n_shards": store.plan.n_shards, "signature": _SIGNATURE})  # fmt: skip
    return run


def _arrays(factors_NRD: np.ndarray) -> dict[str, np.ndarray]:
    n, rank, _ = factors_NRD.shape
    return {
        "factors": factors_NRD.astype(np.float32),
        "frobenius_norms": np.ones(n),
        "grams": factors_NRD @ factors_NRD.transpose(0, 2, 1),
        "ranks": np.full(n, rank, np.int32),
        "kept_trace": np.ones(n),
        "losses": np.zeros(n, np.float32),
        "logits": np.zeros((n, 2), np.float32),
        "labels": np.zeros(n, np.int64),
        "valid": np.ones(n, bool),
    }
