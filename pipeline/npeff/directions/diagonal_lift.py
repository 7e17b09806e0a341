"""From components of diagonal Fishers (D-NPEFF) to directions in parameter space.

Such a component h_j ≥ 0 says how much every parameter matters to its examples, but not which way to move it: a diagonal
has no signs. A further pass over the examples gives what is missing (Matena & Raffel, arXiv 2310.04649, move along a
pattern of signs, weighted by Fishers; the choices are ours):

- `diagonal_weights`: the component in all parameters, h_j = max(0, Σ_l ((WᵀW)⁻¹)_jl Σ_i W_il f̂_i), one step of
  alternating least squares, where what was factorized was sums over groups or the largest entries;
- `principal_direction`, `sign_weights`: signs. A step δ moves example i by KL ≈ ½ δᵀF_iδ, and of all patterns of signs
  the one that moves the component's examples together is near that of the largest eigenvector of Σ_i W_ij F̂_i. It is
  found in the sketch, from the low-rank Fishers, and one power step in all parameters gives its signs;
- `fisher_weighted`: lengths. g with |g| = √h_j is the component's gradient, entry by entry, so the step that moves its
  examples most for a given mean KL over all examples is, with the diagonal F̄ of their mean Fisher, g / F̄: parameters
  that everything depends on stay, and those that only these examples depend on go far.

Legend: N examples, R rank, D sketch, K components, k components of the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npeff.directions.lift import add_rows, inverse_roots
from npeff.fisher import diagonal_sum
from npeff.gradients import GradientCollector

DAMPING = 1.0
"""Of F̄, in its mean entry: parameters that hardly matter to anything are not to go furthest."""


def diagonal_weights(
    coefficients_NK: Tensor, coefficient_gram_KK: Tensor, component_ids: Sequence[int], lengths_N: Tensor
) -> Tensor:
    """Weights (k, N), float64, of the diagonals f_i in the components in all parameters.

    Args:
        coefficients_NK: W of any part of the examples; 0 for those that were not fitted on.
        coefficient_gram_KK: WᵀW over all of them.
        lengths_N: what each f_i was divided by when it was factorized. Where it is 0 the weights are.
    """
    inverse_kK = torch.linalg.pinv(coefficient_gram_KK.double(), hermitian=True)[list(component_ids)]
    inverse_lengths_N = lengths_N.double().reciprocal().where(lengths_N > 0, 0)
    return inverse_kK @ coefficients_NK.double().T * inverse_lengths_N


def principal_direction(factors_MRD: Tensor, coefficients_M: Tensor) -> Tensor:
    """The largest eigenvector (D,), float64, of Σ_i w_i Â_iᵀÂ_i, with factors Â normalised; zero if that is zero."""
    rows_nD = (factors_MRD.double() * coefficients_M.double().sqrt()[:, None, None]).flatten(0, 1)
    n_rows, dim = rows_nD.shape
    if not rows_nD.any():
        return rows_nD.new_zeros(dim)
    if dim <= n_rows:
        return torch.linalg.eigh(rows_nD.T @ rows_nD).eigenvectors[:, -1]
    values, vectors = torch.linalg.eigh(rows_nD @ rows_nD.T)
    return rows_nD.T @ vectors[:, -1] / values[-1].sqrt()


def sign_weights(
    factors_NRD: Tensor, coefficients_Nk: Tensor, directions_kD: Tensor, frobenius_norms_N: Tensor
) -> Tensor:
    """Weights (k, N, R), float64, of the gradient rows A_ir in (Σ_i W_ij F̂_i) v_j, for directions v_j of the sketch."""
    products_NRk = factors_NRD @ directions_kD.to(factors_NRD).T
    return torch.einsum(
        "nrk,nk,n->knr", products_NRk.double(), coefficients_Nk.double(), inverse_roots(frobenius_norms_N)
    )


def accumulate_diagonals(
    collector: GradientCollector,
    batch: Any,
    diagonal_weights_kB: Tensor,
    row_weights_kBR: Tensor,
    diagonals: dict[str, Tensor],
    gradients: dict[str, Tensor],
    examples: Sequence[int] | int | None = None,
    targets: Tensor | None = None,
) -> None:
    """Add Σ_b w_kb f_b to `diagonals` and Σ_{b,r} v_kbr A_br to `gradients`, (k, *shape) for each parameter, in place.

    There may be more rows of `diagonal_weights_kB` than of `row_weights_kBR`. Examples without any weight are left
    out. `examples` and `targets` as of `GradientCollector.collect`.
    """
    live_B = diagonal_weights_kB.ne(0).any(0) | row_weights_kBR.ne(0).any(2).any(0)
    if not live_B.any():
        return
    collected = collector.collect(batch, examples, targets)
    diagonal_sum(collected.contributions, collected.labels.scales_B, diagonal_weights_kB, diagonals)
    add_rows(collected, live_B, row_weights_kBR, gradients)


def fisher_weighted(
    diagonal: Mapping[str, Tensor], gradient: Mapping[str, Tensor], mean_diagonal: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """s ∘ √h / (F̄ + λ) with the signs s of a gradient (0 where it is 0) and λ = `DAMPING` · mean(F̄); no unit length."""
    entries = sum(tensor.numel() for tensor in mean_diagonal.values())
    damping = DAMPING * sum(float(tensor.double().sum()) for tensor in mean_diagonal.values()) / max(1, entries)
    found = {}
    for name, tensor in diagonal.items():
        weighed = tensor.clamp_min(0).sqrt() / (mean_diagonal[name] + damping)
        found[name] = gradient[name].sign() * (weighed if damping > 0 else torch.zeros_like(weighed))
    return found
