"""Other ways to groups of examples and directions, each as coefficients (N, K) and components (K, D) in the sketch.

All are fitted on the examples marked ``fit_N`` and give coefficients to the others too. Where a method has groups only,
a group's component is the first eigenvector of its examples' Fishers, each weighted by its coefficient.

Legend: N examples, R rank, D sketch, K components, E features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from npeff.factorization.nnls import nnls
from npeff.gradients import exact_label_factor
from npeff.models.loaded import LoadedModel
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF
from torch import Tensor

Found = tuple[NDArray[np.float32], NDArray[np.float64]]


@dataclass(frozen=True)
class Data:
    """What the methods may look at."""

    factors_NRD: Tensor
    """Of the Fishers, sketched and normalised."""
    logits_NC: Tensor
    fit_N: NDArray[np.bool_]
    activations: Callable[[], NDArray[np.float64]]
    """(N, E): what the model's last layer reads."""

    def gradients_ND(self) -> NDArray[np.float64]:
        """Sketched gradients of the log-probability of the predicted class, unit rows.

        The rows of a Fisher factor are LᵀJ, so the gradient (e_y − p)ᵀJ is cᵀLᵀJ with L c = e_y − p.
        """
        p_NC = self.logits_NC.double().softmax(-1)
        errors_NC = torch.nn.functional.one_hot(p_NC.argmax(-1), p_NC.shape[1]).double() - p_NC
        weights_NR = (torch.linalg.pinv(exact_label_factor(self.logits_NC)) @ errors_NC[:, :, None])[:, :, 0]
        gradients_ND = torch.einsum("nr,nrd->nd", weights_NR, self.factors_NRD.double())
        return torch.nn.functional.normalize(gradients_ND).numpy()


def random_components(data: Data, n_components: int, seed: int) -> Found:
    """Gaussian unit components; coefficients by non-negative least squares."""
    drawn_KD = np.random.default_rng(seed).standard_normal((n_components, data.factors_NRD.shape[2]))
    return _with_coefficients(data, drawn_KD / np.linalg.norm(drawn_KD, axis=1, keepdims=True))


def pooled_eigenvectors(data: Data, n_components: int, seed: int) -> Found:
    """The first eigenvectors of the sum of the normalised Fishers; coefficients by non-negative least squares."""
    rows_MD = data.factors_NRD[torch.from_numpy(data.fit_N)].double().flatten(0, 1).numpy()
    return _with_coefficients(data, _eigenvectors(rows_MD, n_components, seed))


def gradient_clusters(data: Data, n_components: int, seed: int) -> Found:
    """k-means on the gradients: a component is a centre, a coefficient the cosine to the own centre."""
    gradients_ND = data.gradients_ND()
    coefficients_NK, centres_KD = _clusters(gradients_ND, data.fit_N, n_components, seed)
    return coefficients_NK, centres_KD


def gradient_nmf(data: Data, n_components: int, seed: int) -> Found:
    """NMF on the positive and negative parts of the gradients, side by side; a component is their difference."""
    gradients_ND = data.gradients_ND()
    folded_NE = np.concatenate([gradients_ND.clip(0), (-gradients_ND).clip(0)], axis=1)
    model = NMF(n_components, init="nndsvda", max_iter=300, random_state=seed)
    model.fit(folded_NE[data.fit_N])
    positive_KD, negative_KD = np.split(model.components_, 2, axis=1)
    components_KD = positive_KD - negative_KD
    lengths_K = np.linalg.norm(components_KD, axis=1)
    coefficients_NK = model.transform(folded_NE) * lengths_K
    return coefficients_NK.astype(np.float32), components_KD / lengths_K.clip(1e-300)[:, None]


def activation_clusters(data: Data, n_components: int, seed: int) -> Found:
    """k-means on the activations, of unit length; a coefficient is the cosine to the own centre."""
    activations_NE = data.activations()
    unit_NE = activations_NE / np.linalg.norm(activations_NE, axis=1, keepdims=True)
    coefficients_NK, _ = _clusters(unit_NE, data.fit_N, n_components, seed)
    components = []
    for weights_N in coefficients_NK.T:
        members = np.flatnonzero(data.fit_N & (weights_N > 0))
        weights_n11 = torch.from_numpy(weights_N[members]).double().sqrt()[:, None, None]
        rows_MD = (data.factors_NRD[torch.from_numpy(members)].double() * weights_n11).flatten(0, 1).numpy()
        components.append(_eigenvectors(rows_MD, 1, seed)[0])
    return coefficients_NK, np.stack(components)


METHODS: dict[str, Callable[[Data, int, int], Found]] = {
    "gradient-kmeans": gradient_clusters,
    "gradient-nmf": gradient_nmf,
    "activation-kmeans": activation_clusters,
    "fisher-pca": pooled_eigenvectors,
    "random": random_components,
}


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


def _clusters(unit_NE: NDArray[np.float64], fit_N: NDArray[np.bool_], n_clusters: int, seed: int) -> Found:
    model = KMeans(n_clusters, n_init=4, random_state=seed).fit(unit_NE[fit_N])
    centres_KE = model.cluster_centers_ / np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True)
    cosines_NK = unit_NE @ centres_KE.T
    own_NK = np.arange(n_clusters) == model.predict(unit_NE)[:, None]
    return np.where(own_NK, cosines_NK.clip(0), 0).astype(np.float32), centres_KE


def _with_coefficients(data: Data, components_KD: NDArray[np.float64]) -> Found:
    unit_KD = torch.from_numpy(components_KD)
    evidence_NK = (data.factors_NRD.double() @ unit_KD.T).square().sum(1)
    return nnls(evidence_NK, (unit_KD @ unit_KD.T).square()).float().numpy(), components_KD


def _eigenvectors(rows_MD: NDArray[np.float64], count: int, seed: int) -> NDArray[np.float64]:
    """The first eigenvectors (count, D) of Σ rowᵀ row."""
    dim = rows_MD.shape[1]
    product = LinearOperator((dim, dim), matvec=lambda vector: rows_MD.T @ (rows_MD @ vector), dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(dim)
    _, vectors_DK = eigsh(product, k=count, which="LA", v0=start)
    return np.ascontiguousarray(vectors_DK.T[::-1])
