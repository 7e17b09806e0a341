"""Runs with synthetic Fishers of any number in a float16 store, written shard by shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline.config import RunConfig
from pipeline.run_directory import RunDirectory
from pipeline.store import CompletionRecord, FisherStore, ShardRecords, write_table

SIGNATURE = "synthetic"
_NOISE, _SHARD_SIZE = 0.3, 256


def synthetic_run(path: Path, n_examples: int, dim: int, n_components: int) -> RunDirectory:
    """A run whose first stage is complete: every example has two of the components, and noise; R = 2, all to be fitted.

    What is there already is used again.
    """
    config = {
        "run_dir": str(path),
        "task": {"name": "synthetic"},
        "fishers": {"shard_size": _SHARD_SIZE, "sketch": {"kind": "tensorsketch", "dim": dim}},
        "factorization": {"n_components": n_components, "held_out_fraction": 0.0},
    }
    run = RunDirectory.create(RunConfig.model_validate(config))
    if run.record("fishers") is not None:
        return run
    sizes = {"n_examples": n_examples, "rank": 2, "dim": dim, "n_classes": 3, "shard_size": _SHARD_SIZE}
    store = FisherStore.create(run.fishers, **sizes, store_dtype="float16", attrs={})
    records = ShardRecords(run.shard_records, SIGNATURE)
    generator = torch.Generator().manual_seed(0)
    h_KD = torch.nn.functional.normalize(torch.randn(n_components, dim, generator=generator), dim=1)
    for shard, (start, stop) in enumerate(store.plan):
        arrays = _shard(h_KD, stop - start, generator)
        records.write(CompletionRecord(shard, start, stop, store.write_shard(shard, arrays), 0, 0.0, SIGNATURE))
    _write_examples(run, n_examples)
    summary = {"n_examples": n_examples, "rank": 2, "n_shards": store.plan.n_shards, "signature": SIGNATURE}
    run.complete("fishers", summary)
    return run


def _shard(h_KD: torch.Tensor, n: int, generator: torch.Generator) -> dict[str, np.ndarray]:
    active = torch.randint(len(h_KD), (n, 2), generator=generator)
    weights = torch.rand(n, 2, 1, generator=generator) * 0.8 + 0.2
    noise = torch.randn(n, 2, h_KD.shape[1], generator=generator) * (_NOISE / h_KD.shape[1] ** 0.5)
    factors = weights.sqrt() * (h_KD[active] + noise)
    norms = torch.linalg.matrix_norm(factors @ factors.mT)
    factors = factors / norms.sqrt()[:, None, None]
    return {
        "factors": factors.half().numpy(),
        "frobenius_norms": np.ones(n),
        "grams": (factors @ factors.mT).double().numpy(),
        "ranks": np.full(n, 2, np.int32),
        "kept_trace": np.ones(n),
        "losses": np.ones(n, np.float32),
        "logits": np.zeros((n, 3), np.float32),
        "labels": np.zeros(n, np.int64),
        "valid": np.ones(n, bool),
    }


def _write_examples(run: RunDirectory, n: int) -> None:
    ones, zeros = np.ones(n), np.zeros(n, np.int64)
    examples = {
        "example": np.arange(n),
        "id": [str(i) for i in range(n)],
        "label": zeros,
        "prediction": zeros,
        "correct": np.ones(n, bool),
        "split": ["fit"] * n,
        "valid": np.ones(n, bool),
        "fisher_norm": ones,
        "fisher_rank": np.full(n, 2, np.int32),
        "kept_trace": ones,
        "loss": ones,
        "logits": np.zeros((n, 3), np.float32),
        "image": [None] * n,
        "text": [None] * n,
    }
    write_table(run.table("examples"), "examples", examples)
