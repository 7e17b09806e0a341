"""Run directories with given Fishers, as if the first stage had computed them: everything after it works on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.fishers.tables import write_example_tables, write_parameter_table
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import CompletionRecord, ShardRecords
from planted import Planted

SIGNATURE = "planted"


def planted_run(path: Path, planted: Planted, shard_size: int = 512, **sections: dict[str, Any]) -> RunDirectory:
    """A run with the Fishers of a planted problem and, unless told otherwise, its number of components."""
    factorization = {"n_components": len(planted.components_KD), **sections.pop("factorization", {})}
    factors_NRD = planted.factors_NRD
    return run_with_fishers(
        path,
        factors_NRD.shape,
        lambda start, stop: factors_NRD[start:stop],
        shard_size,
        factorization=factorization,
        **sections,
    )


def run_with_fishers(
    path: Path,
    shape: tuple[int, ...],
    factors: Callable[[int, int], np.ndarray],
    shard_size: int,
    **sections: dict[str, Any],
) -> RunDirectory:
    """A run of (N, R, D) Fishers at `path`, written shard by shard; serial unless `sections` of its run file say else.

    Args:
        factors: normalised factors from an example to before another; asked for once each, in order.
    """
    n_examples, rank, dim = shape
    sections["fishers"] = {"store_dtype": "float32", **sections.get("fishers", {}), "shard_size": shard_size}
    document = {"run_dir": str(path), "task": {"name": "planted"}, "executor": {"kind": "serial"}, **sections}
    run = RunDirectory.create(RunConfig.model_validate(document))
    store = FisherStore.create(
        run.fishers,
        n_examples=n_examples,
        rank=rank,
        dim=dim,
        n_classes=rank + 1,
        shard_size=shard_size,
        store_dtype=run.config.fishers.store_dtype,
        attrs={"model_fingerprint": "none", "labels": {"kind": "exact"}},
    )
    records = ShardRecords(run.shard_records, SIGNATURE)
    for shard, (start, stop) in enumerate(store.plan):
        checksum = store.write_shard(shard, _arrays(factors(start, stop)))
        records.write(CompletionRecord(shard, start, stop, checksum, 0, 0.0, SIGNATURE))
    ids = [f"example-{i}" for i in range(n_examples)]
    write_example_tables(run, [pa.table({"id": ids})], [f"class {c}" for c in range(rank + 1)])
    write_parameter_table(run, {"weight": (dim,)}, {})
    summary = {"n_examples": n_examples, "n_invalid": 0, "n_classes": rank + 1, "rank": rank, "sketch_dim": dim}
    summary["n_parameters"] = dim
    run.complete("fishers", {**summary, "n_shards": store.plan.n_shards, "signature": SIGNATURE})
    return run


def _arrays(factors_NRD: np.ndarray) -> dict[str, np.ndarray]:
    n, rank, _ = factors_NRD.shape
    return {
        "factors": factors_NRD,
        "frobenius_norms": np.ones(n),
        "grams": (factors_NRD @ factors_NRD.transpose(0, 2, 1)).astype(np.float64),
        "ranks": np.full(n, rank, np.int32),
        "kept_trace": np.ones(n),
        "losses": np.ones(n, np.float32),
        "logits": np.zeros((n, rank + 1), np.float32),
        "labels": np.zeros(n, np.int64),
        "valid": np.ones(n, bool),
    }
