"""Evidence: how strong directions of the sketch are in the normalized Fishers of examples.

Shapes: N examples, R rank, D sketch, K directions.
"""

from __future__ import annotations

from torch import Tensor


def evidence_scores(factors_NRD: Tensor, directions_KD: Tensor) -> Tensor:
    """Compute e_ij = h_jᵀ F̂_i h_j = ‖Â_i h_j‖² (N, K), float64.

    Unlike a coefficient, the evidence of one direction does not depend on the other directions, and it is linear in the
    Fisher.

    Args:
        factors_NRD: Â.
        directions_KD: Directions in the sketch, such as components. Directions of length 1 give evidence between 0 and
            ‖F̂_i‖.
    """
    products_NRK = factors_NRD.double() @ directions_KD.to(factors_NRD.device).double().T
    return products_NRK.square().sum(dim=1)
