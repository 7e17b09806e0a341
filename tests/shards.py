"""Shards of random Fishers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

RANK, DIM, N_CLASSES = 2, 48, 3


@pytest.fixture(scope="session")
def shard_arrays() -> Callable[..., dict[str, np.ndarray]]:
    """Makes the arrays of a shard of n examples."""

    def make(n: int, seed: int = 0, dim: int = DIM) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            "factors": rng.normal(size=(n, RANK, dim)),
            "frobenius_norms": rng.uniform(1, 2, size=n),
            "grams": rng.normal(size=(n, RANK, RANK)),
            "ranks": np.full(n, RANK),
            "kept_trace": rng.uniform(0.5, 1, size=n),
            "losses": rng.uniform(0, 3, size=n),
            "logits": rng.normal(size=(n, N_CLASSES)),
            "labels": rng.integers(N_CLASSES, size=n),
            "valid": np.ones(n, dtype=bool),
        }

    return make
