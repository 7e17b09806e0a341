"""Two prototypes of a kind for rules that act together, F̂_i ≈ Hᵀ C_i H with sparse positive semidefinite C_i.

Under one softmax, the gradients of rules that act together add up, so a Fisher has cross terms h_j h_lᵀ that a sum
Σ_j W_ij h_j h_jᵀ does not have.

- `cross_terms` fits C_i and H to the Fishers. C_i: proximal gradient steps on ‖F̂_i − HᵀC_iH‖² + 2λ Σ_{j≠l} |C_ijl|,
  each followed by a projection on the positive semidefinite matrices. H: with the C_i fixed, the least-squares solution
  for one of the two H, the other held, averaged with the last H. It starts from NMF of gradients or from NPEFF.
- `sparse_gradients` is dictionary learning of the gradient rows (Gradient Atoms without a preconditioner): a gradient
  is a sparse sum of components of either sign. Its Fisher, of rank 1, is HᵀccᵀH.

A coefficient is C_ijj, or the magnitude of the code.

Legend: N examples, F fitted, R rank, D sketch, K components.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import MiniBatchDictionaryLearning
from torch import Tensor
from verify_stage.baselines import Found

from several_rules.truths import SketchedData

OFF_DIAGONAL = 0.02
"""λ of the penalty on the entries off the diagonal; F̂ has unit norm."""
ROUNDS, INNER = 25, 10


def cross_terms(data: SketchedData, start_KD: np.ndarray) -> Found:
    """Alternate C_i and H from the given components; C_i of the other examples at the last H."""
    factors_NRD = data.factors_NRD.double()
    fitted_FRD = factors_NRD[torch.from_numpy(data.fit_N)]
    h_KD = torch.nn.functional.normalize(torch.from_numpy(np.asarray(start_KD, np.float64)))
    c_FKK: Tensor | None = None
    for _ in range(ROUNDS):
        c_FKK = _codes(fitted_FRD, h_KD, c_FKK, INNER)
        gamma_KK = h_KD @ h_KD.T
        products_FRK = fitted_FRD @ h_KD.T
        left_KK = torch.einsum("fkl,lm,fmn->kn", c_FKK, gamma_KK, c_FKK)
        weighted_FKR = c_FKK @ products_FRK.mT
        right_KD = weighted_FKR.transpose(0, 1).flatten(1) @ fitted_FRD.flatten(0, 1)
        damping = 1e-3 * left_KK.diagonal().mean() * torch.eye(len(h_KD), dtype=torch.float64)
        solved_KD = torch.linalg.solve(left_KK + damping, right_KD + damping @ h_KD)
        h_KD = torch.nn.functional.normalize(h_KD + torch.nn.functional.normalize(solved_KD))
    codes_NKK = _codes(factors_NRD, h_KD, None, 5 * INNER)
    return codes_NKK.diagonal(dim1=1, dim2=2).float().numpy(), h_KD.numpy()


def _codes(factors_NRD: Tensor, h_KD: Tensor, start_NKK: Tensor | None, steps: int) -> Tensor:
    gamma_KK = h_KD @ h_KD.T
    products_NRK = factors_NRD @ h_KD.T
    target_NKK = products_NRK.mT @ products_NRK
    step = 1 / float(torch.linalg.eigvalsh(gamma_KK)[-1]) ** 2
    threshold_KK = step * OFF_DIAGONAL * (1 - torch.eye(len(h_KD), dtype=torch.float64))
    c_NKK = torch.zeros_like(target_NKK) if start_NKK is None else start_NKK
    for _ in range(steps):
        c_NKK = c_NKK - step * (gamma_KK @ c_NKK @ gamma_KK - target_NKK)
        c_NKK = c_NKK.sign() * (c_NKK.abs() - threshold_KK).clamp(min=0)
        values_NK, vectors_NKK = torch.linalg.eigh(c_NKK)
        c_NKK = (vectors_NKK * values_NK.clamp(min=0)[:, None]) @ vectors_NKK.mT
    return c_NKK


def sparse_gradients(data: SketchedData, n_components: int, seed: int) -> Found:
    """Dictionary learning with an L1 penalty of 0.1 on unit gradients."""
    gradients_ND = data.gradients_ND()
    model = MiniBatchDictionaryLearning(
        n_components,
        alpha=0.1,
        batch_size=128,
        max_iter=20,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        transform_alpha=0.1,
        random_state=seed,
    ).fit(gradients_ND[data.fit_N])
    return np.abs(model.transform(gradients_ND)).astype(np.float32), model.components_
