"""Shapley values by captum, as attributions that inputs.py compares."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from environments import environment
from torch import Tensor, nn

from inputs_stage.problems import Prepared

CAPTUM = "captum==0.9.0"
SCRIPT = Path(__file__).with_name("captum_shapley.py")
NAMES = {
    "Shapley permutations, zero": "permutations_zero",
    "Shapley permutations, mean": "permutations_mean",
    "KernelSHAP, zero": "kernel_zero",
    "KernelSHAP, mean": "kernel_mean",
}


def captum_environment(folder: Path) -> Path | None:
    """Return the Python of an environment with captum; None if it cannot be made."""
    torch_here = f"torch=={version('torch').split('+')[0]}"
    return environment(folder / "captum", [CAPTUM, torch_here, "matplotlib", "scikit-learn"])


class _Standardized(nn.Module):
    def __init__(self, model: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.model(values * self.deviation + self.mean)
        return found


def shapley_values(made: Prepared, folder: Path) -> tuple[dict[str, dict[int, Tensor]], dict[str, float]]:
    """Return the Shapley values (P,) by method and example, and the CPU seconds per example; none without captum.

    A model of texts is left out: its function of the inputs is bound to a batch.
    """
    python = captum_environment(folder)
    examples = [*made.validation, *made.tested]
    values = made.loaded.batch(examples)
    if python is None or not isinstance(values, Tensor) or made.inputs(made.tested[:1]).exchangeable:
        return {}, {}
    shape = values.shape[1:]
    mean, deviation = torch.zeros(shape), torch.ones(shape)
    if made.standard is not None:
        mean, deviation = (each.to(values).reshape(shape) for each in made.standard)
    values = (values - mean) / deviation
    model = _Standardized(made.loaded.model, mean, deviation)
    with torch.no_grad():
        classes_N = model(values).argmax(1)
    files = folder / "shapley"
    files.mkdir(exist_ok=True)
    torch.jit.trace(model, values).save(str(files / "model.pt"))
    replacement = made.noises["full"].mean_PF.to(values).reshape(shape)
    for name, array in (("inputs", values), ("classes", classes_N), ("mean", replacement)):
        np.save(files / f"{name}.npy", array.numpy())
    subprocess.run([python, "-W", "ignore", SCRIPT, files], check=True, env={"OMP_NUM_THREADS": "1"})
    seconds = json.loads((files / "seconds.json").read_text())
    found = {}
    for name, file in NAMES.items():
        values_NP = torch.from_numpy(np.load(files / f"{file}.npy")).flatten(1).double()
        found[name] = dict(zip(examples, values_NP, strict=True))
    return found, {name: seconds[file] for name, file in NAMES.items()}
