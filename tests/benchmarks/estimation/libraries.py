"""nngeometry, BackPACK and curvlinops on the same network and images, against the same dense matrix.

Legend: P parameters, V vectors, S repetitions.
"""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environments import environment
from torch import Tensor

from estimation.errors import REPETITIONS, Dense
from estimation.estimates import ESTIMATORS
from estimation.moments import Moment

REQUIREMENTS = ["nngeometry==0.4", "backpack-for-pytorch==1.7.1", "curvlinops-for-pytorch==3.0.1"]
SCRIPT = Path(__file__).with_name("library_estimates.py")
N_VECTORS = 4
OURS = ("exact", "sampled(1)", "empirical")


def compared(moment: Moment, dense: Dense, folder: Path) -> dict[str, Any] | None:
    """Return the bias and noise of the libraries' estimates and of ours; None without their environment."""
    # They bring torchvision along, which is why they have an environment of their own.
    python = environment(folder / "curvature", [*REQUIREMENTS, f"torch=={version('torch').split('+')[0]}"])
    if python is None:
        return None
    generator = torch.Generator().manual_seed(0)
    vectors_PV = torch.randn(dense.rows_nP.shape[1], N_VECTORS, generator=generator)
    files = folder / "curvature-files"
    files.mkdir(exist_ok=True)
    inputs = {name: value.detach().numpy() for name, value in moment.model.named_parameters()}
    images = moment.images
    np.savez(
        files / "inputs.npz",
        **inputs,
        images=images.images.numpy(),
        classes=images.classes.numpy(),
        vectors=vectors_PV.numpy(),
    )
    subprocess.run([python, "-W", "ignore", SCRIPT, files], check=True, env={"OMP_NUM_THREADS": "1"})
    exact = {
        "diagonal": dense.diagonal_P,
        "products": dense.rows_nP.T @ (dense.rows_nP @ vectors_PV.double()),
    }
    found: dict[str, Any] = {"errors": json.loads((files / "errors.json").read_text()), "estimates": {}}
    for estimator in ESTIMATORS:
        if estimator.name in OURS:
            n = REPETITIONS if estimator.random else 1
            rows = [estimator.rows(moment.model, images, seed).double() for seed in range(n)]
            found["estimates"][f"npeff: {estimator.name}"] = _errors(
                torch.stack([each.square().sum(0) for each in rows]), exact["diagonal"]
            )
            found["estimates"][f"npeff: {estimator.name}, products"] = _errors(
                torch.stack([each.T @ (each @ vectors_PV.double()) for each in rows]), exact["products"]
            )
    with np.load(files / "outputs.npz") as outputs:
        for name in outputs.files:
            values = torch.from_numpy(outputs[name]).double()
            found["estimates"][name] = _errors(values, exact["products" if "products" in name else "diagonal"])
    return found


def _errors(values_Sx: Tensor, exact_x: Tensor) -> dict[str, float]:
    """Return bias and noise, relative to the norm of the exact values."""
    norm = float(exact_x.norm())
    n = len(values_Sx)
    variance = float(values_Sx.var(0).sum()) if n > 1 else 0.0
    squared = float((values_Sx.mean(0) - exact_x).square().sum())
    return {"bias": max(squared - variance / n, 0.0) ** 0.5 / norm, "noise": variance**0.5 / norm}


def show_libraries(found: dict[str, Any] | None) -> None:
    if found is None:
        return
    print("\n| estimate | bias | noise |\n|---|---|---|")
    for name, row in found["estimates"].items():
        print(f"| {name} | {row['bias']:.2g} | {row['noise']:.2g} |")
    for name, error in found["errors"].items():
        print(f"{name} failed: {error}")
