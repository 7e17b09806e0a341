"""Attributions by captum 0.9.0, in an environment of its own, which has nothing of this project.

    python captum_attributions.py FOLDER

The folder has model.pt (TorchScript), images.npy, classes.npy and mean.npy. Every attribution is of the probability of
the class, in float64, and is written as NAME.npy. noisy.npy (draws, images, ...) are the inputs that captum's noise
tunnel used.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel, Occlusion, Saliency

SAMPLES, STEPS, DEVIATION = 8, 16, 0.3
KINDS = {"smooth_grad": "smoothgrad", "smooth_grad_squared": "smoothgrad_sq", "var_grad": "vargrad"}


def main(folder: Path) -> None:
    model = torch.jit.load(folder / "model.pt")
    images, mean = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("images", "mean"))
    classes = torch.from_numpy(np.load(folder / "classes.npy"))
    seen: list[torch.Tensor] = []

    def probabilities(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.detach())
        return model(values).softmax(1)

    gradients = IntegratedGradients(probabilities)
    found = {
        "gradient": Saliency(probabilities).attribute(images, classes),
        "gradient_times_input": InputXGradient(probabilities).attribute(images, classes),
        "integrated_gradients_zero": gradients.attribute(images, target=classes, n_steps=STEPS),
        "integrated_gradients_mean": gradients.attribute(images, mean[None], target=classes, n_steps=STEPS),
        "occlusion": Occlusion(probabilities).attribute(images, (1, 1, 1), baselines=mean[None], target=classes),
    }
    tunnel = NoiseTunnel(Saliency(probabilities))
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        seen.clear()
        found[name] = tunnel.attribute(
            images, nt_type=kind, nt_samples=SAMPLES, stdevs=DEVIATION, target=classes, abs=False
        )
    noisy = next(values for values in seen if len(values) == SAMPLES * len(images))
    np.save(folder / "noisy.npy", noisy.unflatten(0, (len(images), SAMPLES)).transpose(0, 1).numpy())
    for name, values in found.items():
        np.save(folder / f"{name}.npy", values.detach().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
