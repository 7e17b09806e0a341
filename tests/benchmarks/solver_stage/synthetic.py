"""Runs with synthetic Fishers of any number in a float16 store, written shard by shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from npeff.runs.directory import RunDirectory
from planted_run import run_with_fishers

_NOISE, _SHARD_SIZE = 0.3, 256


def synthetic_run(path: Path, n_examples: int, dim: int, n_components: int) -> RunDirectory:
    """A run whose first stage is complete: every example has two of the components, and noise; R = 2, all to be fitted.

    What is there already is used again.
    """
    if path.exists():
        run = RunDirectory.open(path)
        if run.record("fishers") is not None:
            return run
    generator = torch.Generator().manual_seed(0)
    h_KD = torch.nn.functional.normalize(torch.randn(n_components, dim, generator=generator), dim=1)

    def factors(start: int, stop: int) -> np.ndarray:
        active = torch.randint(n_components, (stop - start, 2), generator=generator)
        weights = torch.rand(stop - start, 2, 1, generator=generator) * 0.8 + 0.2
        noise = torch.randn(stop - start, 2, dim, generator=generator) * (_NOISE / dim**0.5)
        rows = weights.sqrt() * (h_KD[active] + noise)
        norms = torch.linalg.matrix_norm(rows @ rows.mT)
        return (rows / norms.sqrt()[:, None, None]).numpy()

    return run_with_fishers(
        path,
        (n_examples, 2, dim),
        factors,
        _SHARD_SIZE,
        fishers={"store_dtype": "float16", "sketch": {"kind": "tensorsketch", "dim": dim}},
        factorization={"n_components": n_components, "held_out_fraction": 0.0},
    )
