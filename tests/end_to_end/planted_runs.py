"""Runs with planted Fishers in their stores, as if stage 1 had computed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from planted import Planted

from pipeline.config import RunConfig
from pipeline.result_tables import held_out, write_parameter_table
from pipeline.run_directory import RunDirectory
from pipeline.store import CompletionRecord, FisherStore, ShardRecords, write_table
from pipeline.store.fisher_store import StoreDtype

SIGNATURE = "planted"
HELD_OUT = 0.2


def prepared(
    path: Path, planted: Planted, n_shards: int, store_dtype: StoreDtype = "float32", **factorization: Any
) -> RunDirectory:
    """A run whose stage ``fishers`` is complete, with planted Fishers in the store."""
    n, rank, dim = planted.factors_NRD.shape
    shard_size = -(-n // n_shards)
    config = {
        "run_dir": str(path),
        "task": {"name": "planted"},
        "fishers": {"store_dtype": store_dtype, "shard_size": shard_size},
        "factorization": {
            "n_components": len(planted.components_KD),
            "held_out_fraction": HELD_OUT,
            "tolerance": 1e-8,
            "checkpoint_every": 2,
            **factorization,
        },
        "executor": {"kind": "serial"},
    }
    run = RunDirectory.create(RunConfig.model_validate(config))
    store = FisherStore.create(
        run.fishers,
        n_examples=n,
        rank=rank,
        dim=dim,
        n_classes=rank + 1,
        shard_size=shard_size,
        store_dtype=store_dtype,
        attrs={},
    )
    assert store.plan.n_shards == n_shards
    whole = {
        "factors": planted.factors_NRD.astype(np.float32),
        "frobenius_norms": np.ones(n),
        "grams": planted.factors_NRD @ planted.factors_NRD.transpose(0, 2, 1),
        "ranks": np.full(n, rank, np.int32),
        "kept_trace": np.ones(n),
        "losses": np.ones(n, np.float32),
        "logits": np.zeros((n, rank + 1), np.float32),
        "labels": np.zeros(n, np.int64),
        "valid": np.ones(n, bool),
    }
    for shard, (start, stop) in enumerate(store.plan):
        checksum = store.write_shard(shard, {name: array[start:stop] for name, array in whole.items()})
        record = CompletionRecord(shard, start, stop, checksum, 0, 0.0, SIGNATURE)
        ShardRecords(run.shard_records, SIGNATURE).write(record)
    split = np.where(held_out(n, HELD_OUT, seed=0), "held_out", "fit").astype(object)
    examples = {
        "example": np.arange(n),
        "id": [str(i) for i in range(n)],
        "label": whole["labels"],
        "prediction": whole["labels"],
        "correct": whole["valid"],
        "split": split,
        "valid": whole["valid"],
        "fisher_norm": whole["frobenius_norms"],
        "fisher_rank": whole["ranks"],
        "kept_trace": whole["kept_trace"],
        "loss": whole["losses"].astype(np.float64),
        "logits": whole["logits"],
        "image": [None] * n,
        "text": [None] * n,
    }
    write_table(run.table("examples"), "examples", examples)
    write_table(run.table("classes"), "classes", {"class": range(rank + 1), "name": list("abcd"[: rank + 1])})
    write_parameter_table(run, {}, {})
    run.complete("fishers", {"n_examples": n, "rank": rank, "n_shards": n_shards, "signature": SIGNATURE})
    return run
