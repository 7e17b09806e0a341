"""D-NPEFF next to other implementations of non-negative matrix factorization, in CPU time, on diagonal Fishers.

    python tests/benchmarks/diagonal_solver.py [digits minilm] [--pairs 1200] [--torchnmf FOLDER] [--rounds 3] [--tiny]

`minilm` needs NPEFF_SHARED_DATA, a folder with models/minilm-sick and data/sick/SICK_test_annotated.txt. `--torchnmf`
is a folder that `pip install --no-deps --target FOLDER torchnmf` has filled; without it that one is left out. Fishers
are computed once, in the folder `--fishers` (half an hour for MiniLM on one core). Everything has one thread; a time is
the least CPU time of the rounds, and a loss ‖X − WH‖² is computed anew in float64 from what a method returned.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import scipy.sparse
import torch
from fisher_stage import minilm
from npeff.factorization import entries_by_column
from npeff.factorization.diagonals.estimator import DiagonalNPEFF
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.store.fisher_store import FisherStore
from quickstart import machine
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import normalize

COMPONENTS = {"digits": 24, "minilm": 32}
TOP_ENTRIES = {"digits": 1024, "minilm": 4096}
FEW_TOP_ENTRIES = 1024
"""Where `--pairs` asks for a problem that the others get through in less than half an hour."""
SKETCH = {"digits": 64, "minilm": 1024}
"""It has no part in this; the factors of the store are made with it."""
TIGHT = {"digits": (1e-6, 5000), "minilm": (1e-5, 400)}
"""Tolerance and most iterations of scikit-learn's coordinate descent, beside its defaults (1e-4, 200)."""
_MANY = 10_000_000
"""Sparse entries from which on scikit-learn takes half an hour, and is tried once only."""
_BLOCK = 512

Fit = Callable[[], tuple[np.ndarray, np.ndarray, int]]
"""Gives W (N, K), H (K, P) and the iterations."""


def stored_fishers(data: str, folder: Path, tiny: bool, pairs: int | None = None) -> FisherStore:
    """The Fisher store of a data set, computed if it is not there."""
    fishers = {
        "sketch": {"kind": "tensorsketch", "dim": SKETCH[data]},
        "diagonal": {"top_entries": TOP_ENTRIES[data] if pairs is None else FEW_TOP_ENTRIES, "groups": True},
    }
    limit = 200 if tiny else pairs
    options: dict[str, Any] = {} if limit is None else {"limit": limit}
    path = folder / (data if limit is None else f"{data}-{limit}")
    if data == "digits":
        document = {"run_dir": str(path), "task": {"name": "digits", "options": options}, "fishers": fishers}
        document |= {"factorization": {"n_components": COMPONENTS[data]}}
    else:
        document = minilm.config(path).model_dump()
        document["fishers"] |= fishers
        document["task"]["options"] |= options
    run = RunDirectory.create(RunConfig.model_validate(document | {"executor": {"kind": "serial"}}))
    npeff.compute_fishers(run)
    return FisherStore.open(run.fishers)


def problems(store: FisherStore) -> dict[str, Any]:
    """Of all valid examples: what stage 2 factorizes with kind diagonal_groups and diagonal_entries."""
    valid = np.flatnonzero(store.read_rows(np.arange(store.plan.n_examples), ["valid"])["valid"])
    groups = store.read_rows(valid, ["grouped_diagonal"])["grouped_diagonal"]
    entries = store.read_rows(valid, ["diagonal_values", "diagonal_indices"])
    values, indices = entries["diagonal_values"], entries["diagonal_indices"]
    return {
        "groups": normalize(groups),
        "entries": scipy.sparse.csr_matrix(entries_by_column(values, indices, np.unique(indices[values > 0]))[0]),
    }


def loss_of(x_NP: Any, w_NK: np.ndarray, h_KP: np.ndarray) -> float:
    """‖X − WH‖²_F, float64, block by block."""
    total, h_KP = 0.0, h_KP.astype(np.float64)
    for start in range(0, x_NP.shape[0], _BLOCK):
        rows = x_NP[start : start + _BLOCK]
        w_BK = w_NK[start : start + _BLOCK].astype(np.float64)
        if scipy.sparse.issparse(rows):
            rows = rows.astype(np.float64)
            total += float(rows.power(2).sum() - 2 * (w_BK * (rows @ h_KP.T)).sum())
            total += float(((w_BK.T @ w_BK) * (h_KP @ h_KP.T)).sum())
        else:
            total += float(np.square(rows - w_BK @ h_KP).sum())
    return total


def ours(x_NP: Any, n_components: int, seed: int, **options: Any) -> tuple[np.ndarray, np.ndarray, int]:
    model = DiagonalNPEFF(n_components, random_state=seed, normalize=False, **options)
    w_NK = model.fit_transform(x_NP)
    return w_NK, model.components_, model.n_iter_


def scikit_learn(x_NP: Any, n_components: int, **options: Any) -> tuple[np.ndarray, np.ndarray, int]:
    model = NMF(n_components, random_state=0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        w_NK = model.fit_transform(x_NP)
    return w_NK, model.components_, model.n_iter_


def torchnmf(x_NP: np.ndarray, n_components: int, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Multiplicative updates, its only method; of dense matrices, its sparse ones being experimental."""
    from torchnmf.nmf import NMF as TorchNMF

    torch.manual_seed(0)
    model = TorchNMF(x_NP.shape, rank=n_components)  # V ≈ H Wᵀ in its names
    n_iter = model.fit(torch.from_numpy(x_NP), beta=2, tol=1e-6, max_iter=most)
    return model.H.detach().numpy(), model.W.detach().numpy().T, int(n_iter)


def methods(data: str, x_NP: Any, with_torchnmf: bool, tiny: bool) -> dict[str, Fit]:
    k = COMPONENTS[data] if not tiny else 6
    tolerance, most = TIGHT[data] if not tiny else (1e-4, 50)
    found: dict[str, Fit] = {f"DiagonalNPEFF, seed {seed}": partial(ours, x_NP, k, seed) for seed in range(3)}
    found["DiagonalNPEFF, 8 starts"] = partial(ours, x_NP, k, 0, n_starts=8)
    for few in (20, 100):
        found[f"DiagonalNPEFF, 1 start, {few} iterations"] = partial(ours, x_NP, k, 0, n_starts=1, max_iter=few)
    sklearn = partial(scikit_learn, x_NP, k)
    if scipy.sparse.issparse(x_NP) and x_NP.nnz > _MANY:
        return found | {"scikit-learn cd, nndsvd, defaults": partial(sklearn, init="nndsvd")}
    for init in ("nndsvd", "nndsvda"):
        found[f"scikit-learn cd, {init}, defaults"] = partial(sklearn, init=init)
        found[f"scikit-learn cd, {init}, tol {tolerance:g}"] = partial(sklearn, init=init, tol=tolerance, max_iter=most)
    found["scikit-learn mu, nndsvda, defaults"] = partial(sklearn, init="nndsvda", solver="mu")
    if with_torchnmf and not scipy.sparse.issparse(x_NP):
        found["torchnmf, 500 iterations at most"] = partial(torchnmf, x_NP, k, 500 if not tiny else 20)
    return found


def measured(fit: Fit, x_NP: Any, rounds: int) -> dict[str, Any]:
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        w_NK, h_KP, n_iter = fit()
        seconds.append(time.process_time() - began)
    return {"loss": loss_of(x_NP, w_NK, h_KP), "cpu_seconds": min(seconds), "iterations": n_iter}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", help="digits, minilm; both unless given")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--torchnmf", type=Path, help="folder with the package")
    parser.add_argument("--fishers", type=Path, default=Path("runs/benchmarks/diagonal_fishers"))
    parser.add_argument("--pairs", type=int, help="of MiniLM, the first so many pairs, with 1,024 entries each")
    parser.add_argument("--tiny", action="store_true", help="few examples and iterations, to try it out")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/diagonal_solver.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := set(arguments.data) - set(COMPONENTS):
        parser.error(f"no data {sorted(unknown)[0]!r}: choose from {', '.join(COMPONENTS)}")
    if arguments.torchnmf is not None:
        sys.path.insert(0, os.fspath(arguments.torchnmf))
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    for data in arguments.data or COMPONENTS:
        if data == "minilm" and not minilm.available():
            print("minilm: not run, as NPEFF_SHARED_DATA names no folder with the model and the data")
            continue
        pairs = arguments.pairs if data == "minilm" else None
        found: dict[str, Any] = {"machine": machine(), "n_components": COMPONENTS[data], "rounds": arguments.rounds}
        for name, x_NP in problems(stored_fishers(data, arguments.fishers, arguments.tiny, pairs)).items():
            total = float(
                x_NP.multiply(x_NP).sum() if scipy.sparse.issparse(x_NP) else np.square(x_NP, dtype=float).sum()
            )
            count = x_NP.nnz if scipy.sparse.issparse(x_NP) else x_NP.size
            print(
                f"{data}, {name}: {x_NP.shape[0]} × {x_NP.shape[1]}, {count:,} numbers, ‖X‖² = {total:.2f}", flush=True
            )
            rows = found[name] = {}
            for method, fit in methods(data, x_NP, arguments.torchnmf is not None, arguments.tiny).items():
                rows[method] = row = measured(fit, x_NP, arguments.rounds)
                print(
                    f"  {method:<44} loss {row['loss']:10.4f}  explained {1 - row['loss'] / total:.5f}"
                    f"  {row['cpu_seconds']:8.2f} s  {row['iterations']:5d} iterations",
                    flush=True,
                )
        everything = json.loads(output.read_text()) if output.exists() else {}
        everything[data] = found
        output.write_text(json.dumps(everything, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
