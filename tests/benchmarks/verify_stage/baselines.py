"""Methods that are no kind of factorization, each as coefficients (N, K) and components (K, D) in the sketch.

All are fitted on the examples marked ``fit_N`` and give coefficients to the others too. Where a method has groups only,
a group's component is the first eigenvector of its examples' Fishers, each weighted by its coefficient.

Legend: N examples, R rank, D sketch, K components, E features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from npeff.directions import principal_direction
from npeff.factorization.direct import cluster
from npeff.models.loaded import LoadedModel
from numpy.typing import NDArray
from torch import Tensor

Found = tuple[NDArray[np.float32], NDArray[np.float64]]

KINDS = {
    "npeff": "fishers",
    "gradient-kmeans": "kmeans",
    "gradient-nmf": "gradients",
    "squared-nmf": "squared",
    "fisher-pca": "pca",
    "random": "random",
}
"""Methods that are kinds of factorization."""


@dataclass(frozen=True)
class Data:
    """What the methods may look at."""

    factors_NRD: Tensor
    """Of the Fishers, sketched and normalised."""
    fit_N: NDArray[np.bool_]
    activations: Callable[[], NDArray[np.float64]]
    """(N, E): what the model's last layer reads."""


def activation_clusters(data: Data, n_components: int, seed: int) -> Found:
    """k-means on the activations, of unit length; a coefficient is the cosine to the own centre."""
    activations_NE = data.activations()
    unit_NE = activations_NE / np.linalg.norm(activations_NE, axis=1, keepdims=True)
    found = cluster(unit_NE[data.fit_N], n_components, seed, n_starts=4, max_iterations=300, tolerance=1e-4)
    coefficients_NK = found.coefficients(unit_NE)
    components = []
    for weights_N in coefficients_NK.T:
        members = torch.from_numpy(np.flatnonzero(data.fit_N & (weights_N > 0)))
        components.append(principal_direction(data.factors_NRD[members], torch.from_numpy(weights_N)[members]).numpy())
    return coefficients_NK, np.stack(components)


METHODS: dict[str, Callable[[Data, int, int], Found]] = {"activation-kmeans": activation_clusters}


def pooled_output(loaded: LoadedModel, batch_size: int) -> NDArray[np.float64]:
    """(N, E): what the model's layer ``classifier`` reads of every example."""
    seen: list[Tensor] = []
    layer = loaded.model.get_submodule("classifier")
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double()))
    examples = range(len(loaded.examples))
    batches = loaded.batches(examples, batch_size)
    with torch.no_grad():
        for chosen in batches:
            loaded.logits(loaded.model, loaded.batch(chosen))
    hook.remove()
    order = np.argsort(np.concatenate(batches))
    return torch.cat(seen).numpy()[order]
