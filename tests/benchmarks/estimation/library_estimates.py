"""Estimates of nngeometry, BackPACK and curvlinops. Runs in their environment, and imports nothing of this project.

    python library_estimates.py FOLDER

The folder has `inputs.npz`: the parameters of the network of the digits by name, images, classes, and vectors (P, V).
Writes `outputs.npz`: diagonals (P,) and products with the vectors (P, V), and `errors.json`: what failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

REPETITIONS = 6
RANDOM = ("sampled", "MC", "hutchinson")


def network() -> nn.Sequential:
    """The same as `training_loops.digits.convolutional`."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def nngeometry(model: nn.Module, images: Tensor, classes: Tensor) -> dict[str, Callable[[], Tensor]]:
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(images, classes), batch_size=50)
    return {
        "nngeometry: exact": lambda: FIM(model, loader, PMatDiag).get_diag(),
        "nngeometry: sampled(1)": lambda: FIM_MonteCarlo(model, loader, PMatDiag, trials=1).get_diag(),
    }


def backpack(model: nn.Module, images: Tensor, classes: Tensor) -> dict[str, Callable[[], Tensor]]:
    from backpack import backpack as context
    from backpack import extend
    from backpack.extensions import DiagGGNExact, DiagGGNMC, SumGradSquared

    def diagonal(extension: object, attribute: str, factor: float) -> Tensor:
        extended, loss = extend(model), extend(nn.CrossEntropyLoss())  # the mean over the examples
        with context(extension):
            loss(extended(images), classes).backward()
        return factor * torch.cat([getattr(p, attribute).detach().flatten() for p in extended.parameters()])

    # the gradients of a mean loss are divided by the number of examples, and so are their squares, twice
    return {
        "BackPACK: DiagGGNExact": lambda: diagonal(DiagGGNExact(), "diag_ggn_exact", 1.0),
        "BackPACK: DiagGGNMC(1)": lambda: diagonal(DiagGGNMC(mc_samples=1), "diag_ggn_mc", 1.0),
        "BackPACK: SumGradSquared × N": lambda: diagonal(SumGradSquared(), "sum_grad_squared", float(len(images))),
    }


def curvlinops(
    model: nn.Module, images: Tensor, classes: Tensor, vectors_PV: Tensor
) -> dict[str, Callable[[], Tensor]]:
    from curvlinops import EFLinearOperator, FisherMCLinearOperator, GGNLinearOperator, hutchinson_diag

    data, parameters = [(images, classes)], list(model.parameters())
    seeds = iter(range(10_000))

    def made(kind: type, **options: object) -> object:
        return kind(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False, **options)

    exact = made(GGNLinearOperator)
    return {
        "curvlinops: GGN, products": lambda: exact @ vectors_PV,  # type: ignore[operator]
        "curvlinops: FisherMC(1), products": lambda: (
            made(FisherMCLinearOperator, mc_samples=1, seed=next(seeds)) @ vectors_PV  # type: ignore[operator]
        ),
        "curvlinops: EF, products": lambda: made(EFLinearOperator) @ vectors_PV,  # type: ignore[operator]
        "curvlinops: hutchinson_diag(GGN, 9)": lambda: hutchinson_diag(exact, 9),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with np.load(folder / "inputs.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    images, classes, vectors_PV = (found.pop(name) for name in ("images", "classes", "vectors"))
    outputs, errors = {}, {}

    def loaded() -> nn.Module:
        model = network()
        model.load_state_dict(found)
        return model

    for make in (
        lambda: nngeometry(loaded(), images, classes),
        lambda: backpack(loaded(), images, classes),
        lambda: curvlinops(loaded(), images, classes, vectors_PV),
    ):
        try:
            estimates = make()
        except Exception as error:
            errors[f"import {len(errors)}"] = f"{type(error).__name__}: {error}"[:300]
            continue
        for name, estimate in estimates.items():
            try:
                n = REPETITIONS if any(word in name for word in RANDOM) else 1
                outputs[name] = np.stack([estimate().detach().numpy() for _ in range(n)])
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}"[:300]
    np.savez(folder / "outputs.npz", **outputs)
    (folder / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
