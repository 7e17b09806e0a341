"""The Fishers of MiniLM on SICK, computed once by the pipeline's own stage and kept in a folder."""

from __future__ import annotations

from pathlib import Path

import npeff
import numpy as np
import torch
from fisher_stage import minilm as workload
from npeff.runs.config_sections import SketchConfig
from npeff.runs.directory import RunDirectory
from npeff.store.fisher_store import FisherStore
from torch import Tensor

DIM = 4096


def minilm_factors(cache: Path, pairs: int | None = None) -> Tensor | None:
    """Normalised factors (N, R, D) of all pairs, or of some drawn from them; None without the data.

    Args:
        cache: computed into it where they are not there yet, some minutes of CPU time; outside any repository.
    """
    if not workload.available():
        return None
    cache.mkdir(parents=True, exist_ok=True)
    data = None
    if pairs is not None:
        data = cache / f"pairs-{pairs}.txt"
        workload.drawn_pairs(pairs, data)
    name = f"minilm-sick-{DIM}-{pairs or 'all'}"
    config = workload.config(cache / name, data, sketch=SketchConfig(kind="tensorsketch", dim=DIM))
    config = config.with_executor(kind="serial", workers=1)
    run = RunDirectory.create(config)
    npeff.compute_fishers(run)
    store = FisherStore.open(run.fishers)
    rows = store.read_rows(np.arange(store.plan.n_examples), ["factors", "valid"])
    return torch.from_numpy(rows["factors"][rows["valid"]])
