"""Whitened directions: steps that change a component's examples most for a given change of all examples.

The direction ĝ_j of a component shares parts with the directions of other components, so a step along it also changes
the examples of these components. Whitening combines the directions such that their shared parts cancel.

**Derivation.** Let Ĝ (K×P) have the unit directions as rows, and let F̄ be the mean Fisher of the examples. A step d
changes the predictions on average by KL ≈ ½ dᵀF̄d. Among the steps d = Ĝᵀc in the span of the directions, consider the
step that maximizes the displacement along ĝ_j for a given mean KL, with a damping term for its length:

    max_c ĝ_jᵀĜᵀc    subject to    ½ cᵀ(M + λ m Γ)c ≤ κ,    Γ = ĜĜᵀ,    M = ĜF̄Ĝᵀ,    m = mean(diag M).

The solution is c ∝ (M + λ m Γ)⁻¹ Γ e_j, so the whitened directions are, up to their lengths, the rows of

    D = C Ĝ,    C = Γ (M + λ m Γ)⁻¹.

This is a natural-gradient step (Amari, Neural Computation 10, 1998) for the gradient ĝ_j in the span of the directions.
As λ → ∞, d_j → ĝ_j. The solution depends only on the span of the directions, on ĝ_j and on λm. The lengths of the
directions therefore matter only to m.

**The mean Fisher.** F̄ = Σ_i v_i F̂_i / Σ_i v_i, over the fitted examples, where F̂_i = F_i/‖F_i‖ are the normalized
Fishers of the factorization and v_i the weights of the examples in its loss (1 by default). The norms ‖F_i‖ extend over
several orders of magnitude. With F_i in place of F̂_i, a few examples would determine the mean.

**In the sketch.** Inner products of vectors in all parameters are close to those of their sketches. The lift adds up
rows of Fisher factors with known weights (`npeff.directions.lift_weights`). The same sum of the stored, sketched
factors gives the sketches of all directions (`lifted_sketches`), and thus Γ and M, without the model. C is then part of
the weights of the lift, which takes the same pass over the examples as for ĝ_j. Without a sketch, all of this is exact.

Legend: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npeff.directions.lift import lift_weights

_LEAST_EIGENVALUE = 1e-6
"""Eigenvalue of Γ, relative to the largest, below which a part of the span cannot be distinguished from rounding."""

_LEAST_LENGTH = 1e-8
"""Length of a direction before normalization, relative to the longest, below which it counts as zero."""


@dataclass(frozen=True)
class Whitening:
    """Unit whitened directions as combinations of the unit directions of the components."""

    combinations_KK: Tensor
    """C, float64: d_j = Σ_l C_jl ĝ_l. The row and the column of an unused component are zero."""
    cosines_K: Tensor
    """d_j·ĝ_j, at least 0, float64."""


def whitening(gram_KK: Tensor, products_KK: Tensor, damping: float) -> Whitening:
    """Compute whitened directions. See the derivation in this module.

    Directions that are linearly dependent, such as those of duplicated components, are supported: C has the smallest
    coefficients that give the solution. With a single component, d = ĝ.

    Args:
        gram_KK: Γ, inner products of the unit directions. Rows and columns of unused components are zero.
        products_KK: M = ĜF̄Ĝᵀ or a multiple, such as that of `product_sums`. C does not depend on the factor.
        damping: λ > 0.

    Raises:
        ValueError: λ is not positive, or an inner product is not finite.
    """
    gram_KK, products_KK = gram_KK.double(), products_KK.double()
    if not damping > 0:
        raise ValueError(f"the damping must be positive, not {damping}")
    if not bool(gram_KK.isfinite().all() & products_KK.isfinite().all()):
        raise ValueError("inner products of directions are not finite")
    used_K = gram_KK.diagonal() > 0
    values_K, vectors_KK = torch.linalg.eigh((gram_KK + gram_KK.T) / 2)
    kept = values_K > _LEAST_EIGENVALUE * values_K.max().clamp_min(0)
    if not bool(kept.any()):
        return Whitening(torch.zeros_like(gram_KK), torch.zeros_like(values_K))
    roots_S, vectors_KS = values_K[kept].sqrt(), vectors_KK[:, kept]
    basis_KS = vectors_KS / roots_S  # Ĝᵀ times its columns is an orthonormal basis of the span
    metric_SS = basis_KS.T @ products_KK @ basis_KS
    level = products_KK.diagonal()[used_K].mean()
    if not level > 0:  # no example changes along any direction
        level = torch.ones_like(level)
    metric_SS = (metric_SS + metric_SS.T) / 2 + damping * level * torch.eye(len(roots_S), dtype=torch.float64)
    own_KS = vectors_KS * roots_S  # coordinates of ĝ_j in this basis
    found_KS = torch.linalg.solve(metric_SS, own_KS.T).T
    lengths_K = found_KS.norm(dim=1, keepdim=True)
    unit_KS = (found_KS / lengths_K).where(used_K[:, None] & (lengths_K > 0), 0)
    return Whitening((unit_KS @ basis_KS.T).where(used_K, 0), (unit_KS * own_KS).sum(1))


def lifted_sketches(
    factors_NRD: Tensor, coefficients_NK: Tensor, components_KD: Tensor, coefficient_gram_KK: Tensor
) -> Tensor:
    """Compute the sketches of all directions as the lift adds them up, without normalization.

    For parts of the examples, the sum of the results is the result for all examples. The arguments are those of
    `lift_weights`.

    Returns:
        Sketches (K, D), float64.
    """
    ones_N = torch.ones(len(factors_NRD), dtype=torch.float64)
    arguments = factors_NRD, coefficients_NK, components_KD, coefficient_gram_KK
    weights_KNR = lift_weights(*arguments, range(len(components_KD)), ones_N)
    return torch.einsum("knr,nrd->kd", weights_KNR.to(factors_NRD), factors_NRD).double()


def unit_sketches(lifted_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors (K, D), float64, and the inverse lengths (K,). Both are zero for unused components."""
    lengths_K = lifted_KD.double().norm(dim=1)
    used_K = lengths_K > _LEAST_LENGTH * lengths_K.max()
    inverse_lengths_K = lengths_K.reciprocal().where(used_K, 0)
    return lifted_KD.double() * inverse_lengths_K[:, None], inverse_lengths_K


def product_sums(products_NRK: Tensor, weights_N: Tensor) -> Tensor:
    """Compute Σ_i v_i (Â_iĜᵀ)ᵀ(Â_iĜᵀ), which is M · Σ_i v_i. The sum over parts of the examples is that of all.

    Args:
        products_NRK: Â_iĜᵀ. It need not be finite where the weight is 0.
        weights_N: v, 0 for examples that were not fitted on.

    Returns:
        Sums (K, K), float64.
    """
    live_N = weights_N != 0
    rows_NRK = products_NRK[live_N].double() * weights_N[live_N].double().sqrt()[:, None, None]
    rows_nK = rows_NRK.flatten(0, 1)
    return rows_nK.T @ rows_nK
