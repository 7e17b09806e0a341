"""The methods that the sections with several active rules compare with, on sketched Fishers in memory.

All are fitted on the examples marked ``fit_N`` and give coefficients to the others too.

Legend: N examples, K components, D sketch, M rows, E features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from npeff.factorization.nnls import nnls
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF
from verify_stage.baselines import Found

if TYPE_CHECKING:
    from several_rules.truths import SketchedData


def random_components(data: SketchedData, n_components: int, seed: int) -> Found:
    """Gaussian unit components; coefficients by non-negative least squares."""
    drawn_KD = np.random.default_rng(seed).standard_normal((n_components, data.factors_NRD.shape[2]))
    return _with_coefficients(data, drawn_KD / np.linalg.norm(drawn_KD, axis=1, keepdims=True))


def pooled_eigenvectors(data: SketchedData, n_components: int, seed: int) -> Found:
    """The first eigenvectors of the sum of the normalised Fishers; coefficients by non-negative least squares."""
    rows_MD = data.factors_NRD[torch.from_numpy(data.fit_N)].double().flatten(0, 1).numpy()
    dim = rows_MD.shape[1]
    product = LinearOperator((dim, dim), matvec=lambda vector: rows_MD.T @ (rows_MD @ vector), dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(dim)
    _, vectors_DK = eigsh(product, k=n_components, which="LA", v0=start)
    return _with_coefficients(data, np.ascontiguousarray(vectors_DK.T[::-1]))


def gradient_clusters(data: SketchedData, n_components: int, seed: int) -> Found:
    """k-means on the gradients: a component is a centre, a coefficient the cosine to the own centre."""
    gradients_ND = data.gradients_ND()
    model = KMeans(n_components, n_init=4, random_state=seed).fit(gradients_ND[data.fit_N])
    centres_KD = model.cluster_centers_ / np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True)
    own_NK = np.arange(n_components) == model.predict(gradients_ND)[:, None]
    return np.where(own_NK, (gradients_ND @ centres_KD.T).clip(0), 0).astype(np.float32), centres_KD


def gradient_nmf(data: SketchedData, n_components: int, seed: int) -> Found:
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


def _with_coefficients(data: SketchedData, components_KD: NDArray[np.float64]) -> Found:
    unit_KD = torch.from_numpy(components_KD)
    evidence_NK = (data.factors_NRD.double() @ unit_KD.T).square().sum(1)
    return nnls(evidence_NK, (unit_KD @ unit_KD.T).square()).float().numpy(), components_KD
