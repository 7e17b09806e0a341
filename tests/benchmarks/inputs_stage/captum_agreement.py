"""Our implementations of the published attributions against captum's, on the same network, images and noise."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.opponents import OPPONENTS, Explained
from npeff.input_fisher.predictions import probabilities
from torch import Tensor

from inputs_stage.problems import prepared, problems
from inputs_stage.shapley import captum_environment

SCRIPT = Path(__file__).with_name("captum_attributions.py")
N_IMAGES = 40
LIMIT = 1e-5
"""Of the largest difference, divided by the largest attribution."""


@dataclass(frozen=True)
class _SameNoise:
    """The noise that captum drew."""

    mean_PF: Tensor
    noise_SBPF: Tensor

    def draw(self, inputs: FlatInputs, examples: Sequence[int], draw: int) -> Tensor:
        return self.noise_SBPF[draw]


def agreement(folder: Path) -> dict[str, float] | None:
    """Print and return the largest difference of each attribution, divided by its largest value."""
    python = captum_environment(folder)
    if python is None:
        return None
    made = prepared(problems()["digits"], 0, folder)
    images = made.loaded.batch(made.tested[:N_IMAGES]).double()
    model = made.loaded.model.double()
    inputs = FlatInputs.of(images, model, (2, 3))
    classes_B = probabilities(inputs, inputs.values_BPF).argmax(1)
    mean = made.noises["full"].mean_PF.reshape(images.shape[1:])
    files = folder / "captum-files"
    files.mkdir(exist_ok=True)
    torch.jit.trace(model, images).save(str(files / "model.pt"))
    for name, values in (("images", images), ("classes", classes_B), ("mean", mean)):
        np.save(files / f"{name}.npy", values.numpy())
    subprocess.run([python, "-W", "ignore", SCRIPT, files], check=True, env={"OMP_NUM_THREADS": "1"})
    noisy = torch.from_numpy(np.load(files / "noisy.npy"))
    noise = _SameNoise(made.noises["full"].mean_PF, noisy.flatten(2)[..., None] - inputs.values_BPF)
    explained = Explained(range(N_IMAGES), classes_B, noise, samples=len(noisy), steps=16)
    found = {}
    print("\nLargest difference to captum, divided by the largest attribution\n\n| method | difference |\n|---|---|")
    for name, opponent in OPPONENTS.items():
        if (files / f"{name}.npy").exists():
            theirs_BP = torch.from_numpy(np.load(files / f"{name}.npy")).flatten(1)
            ours_BP = opponent.attribution(inputs, explained)
            found[name] = float((ours_BP - theirs_BP).abs().max() / theirs_BP.abs().max())
            print(f"| {name} | {found[name]:.1e}{'' if found[name] <= LIMIT else ', above the limit'} |")
    return found
