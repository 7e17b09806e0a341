"""K-FAC beside nngeometry: the same matrices, and the time to make them."""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environments import environment
from npeff.gradients import GradientCollector, LabelSpec, select_parameters
from npeff.training import KroneckerSums, kronecker_layers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_loops.digits import parts

from natural_gradients.rows import logits

OTHER = ["--no-deps", "nngeometry==0.4"]
ROUNDS = 7


def compared(folder: Path) -> dict[str, Any] | None:
    """Return the largest relative difference of a layer's matrix, and the times; None without nngeometry."""
    python = environment(folder / "nngeometry", OTHER)
    if python is None:
        return None
    sys.path.append(str(next((python.parents[1] / "lib").glob("python*/site-packages"))))
    metrics, objects = importlib.import_module("nngeometry.metrics"), importlib.import_module("nngeometry.object")
    images, classes = parts()[0].images.double(), parts()[0].classes
    models = {
        "two layers": (nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)), images),
        "convolutions": (
            nn.Sequential(
                *(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh()),
                *(nn.Flatten(), nn.Linear(288, 10)),
            ),
            images,
        ),
    }
    found = {}
    for name, (model, inputs) in models.items():
        torch.manual_seed(0)
        for value in model.parameters():
            nn.init.normal_(value, std=0.2)
        model = model.double()
        loader = DataLoader(TensorDataset(inputs, classes), batch_size=len(inputs))
        layout = select_parameters(model)
        layers = kronecker_layers(model, layout)

        def ours(model: Any = model, inputs: Any = inputs, layout: Any = layout, layers: Any = layers) -> KroneckerSums:
            sums = KroneckerSums.empty(layers, layout)
            collected = GradientCollector(model, logits, layout, LabelSpec()).collect(inputs)
            sums.add(collected, torch.ones(len(inputs), dtype=torch.bool))
            return sums

        def theirs(model: Any = model, loader: Any = loader) -> Any:
            torch.set_default_dtype(torch.float64)  # it makes matrices of the default type
            try:
                return metrics.FIM(
                    model=model, loader=loader, representation=objects.PMatKFAC, variant="classif_logits"
                )
            finally:
                torch.set_default_dtype(torch.float32)

        times: dict[str, list[float]] = {"ours": [], "nngeometry": []}
        for _ in range(ROUNDS):
            for who, make in (("ours", ours), ("nngeometry", theirs)):
                began = time.perf_counter()
                made = make()
                times[who].append(time.perf_counter() - began)
                if who == "ours":
                    sums = made
                else:
                    other = made
        differences = {}
        pairs = zip(layers, other.data.values(), strict=True)
        for layer, (inner, outer) in pairs:
            a, g = sums.inputs[layer.weight] / sums.positions[layer.weight], sums.outputs[layer.weight] / len(inputs)
            mine, reference = torch.kron(g, a), torch.kron(outer, inner)
            differences[layer.weight] = float((mine - reference).norm() / reference.norm())
        ratios = sorted(b / a for a, b in itertools.zip_longest(times["ours"], times["nngeometry"]))
        found[name] = {
            "differences": differences,
            "ms": {who: 1000 * sorted(each)[ROUNDS // 2] for who, each in times.items()},
            "ratio": [ratios[ROUNDS // 2], ratios[0], ratios[-1]],
        }
    return found
