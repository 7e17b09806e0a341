"""Shapley values by captum 0.9.0, in an environment of its own, which has nothing of this project.

    python captum_shapley.py FOLDER

The folder has model.pt (TorchScript), inputs.npy (N, ...), classes.npy and mean.npy. Shapley values of the probability
of the class are estimated from permutations and by KernelSHAP. Missing entries have the value 0, or the mean. They are
written as NAME.npy, and the CPU seconds per example as seconds.json.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from captum.attr import KernelShap, ShapleyValueSampling

PERMUTATIONS, COALITIONS = 10, 200


def main(folder: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    torch.set_num_threads(1)
    model = torch.jit.load(folder / "model.pt")
    inputs, mean = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("inputs", "mean"))
    classes = torch.from_numpy(np.load(folder / "classes.npy"))

    def probabilities(values: torch.Tensor) -> torch.Tensor:
        return model(values).softmax(1)

    seconds = {}
    for baseline, value in (("zero", torch.zeros_like(mean)), ("mean", mean)):
        methods = {
            "permutations": lambda given, value=value: ShapleyValueSampling(probabilities).attribute(
                given[0], value[None], target=given[1], n_samples=PERMUTATIONS
            ),
            "kernel": lambda given, value=value: torch.cat(
                [
                    KernelShap(probabilities).attribute(
                        each[None], value[None], target=int(label), n_samples=COALITIONS
                    )
                    for each, label in zip(*given, strict=True)
                ]
            ),
        }
        for name, attributions in methods.items():
            began = time.process_time()
            found = attributions((inputs, classes))
            seconds[f"{name}_{baseline}"] = (time.process_time() - began) / len(inputs)
            np.save(folder / f"{name}_{baseline}.npy", found.detach().numpy())
    (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
