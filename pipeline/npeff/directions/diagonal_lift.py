"""The lift for components of diagonal Fishers (D-NPEFF): directions in parameter space.

A component h_j ≥ 0 of diagonal Fishers measures how much each parameter matters to its examples. It has no signs, so it
does not determine a direction. A further pass over the examples supplies the signs. (Matena & Raffel, arXiv 2310.04649,
move along a pattern of signs, weighted by Fishers. The following choices are specific to this package.)

- `diagonal_weights`: the component in all parameters, h_j = max(0, Σ_l ((WᵀW)⁻¹)_jl Σ_i W_il f̂_i). This is one step of
  alternating least squares. It is needed where the factorization used sums over groups or the largest entries.
- `principal_direction`, `sign_weights`: the signs. A step δ changes the predictions on example i by KL ≈ ½ δᵀF_iδ. The
  pattern of signs that changes the component's examples together is close to that of the largest eigenvector of
  Σ_i W_ij F̂_i. The eigenvector is computed in the sketch from the low-rank Fishers, and one power step in all
  parameters gives the signs.
- `fisher_weighted`: the lengths. The component's gradient g has the entries |g| = √h_j. The step that changes the
  component's examples most for a given mean KL over all examples is g / F̄, where F̄ is the diagonal of the mean Fisher
  of all examples. The step is short in parameters that matter to all examples, and long in parameters that matter only
  to the component's examples. This is the whitened direction of a component of diagonals: the natural-gradient step of
  `npeff.directions.whitening`, with the diagonal of F̄ in all parameters in place of F̄ in the span of the directions. A
  direction of diagonals is not a sum of gradient rows with known weights, so combinations of directions would need a
  further pass.
- `signed_roots`: the own direction, s ∘ √h, without division by F̄.

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
"""Damping λ of F̄ in units of its mean entry. It prevents long steps in parameters that matter to no example."""


def diagonal_weights(
    coefficients_NK: Tensor, coefficient_gram_KK: Tensor, component_ids: Sequence[int], lengths_N: Tensor
) -> Tensor:
    """Compute the weights of the diagonals f_i in the components in all parameters.

    Args:
        coefficients_NK: W of any part of the examples, with 0 for examples that were not part of the fit.
        coefficient_gram_KK: WᵀW over all examples of the fit.
        component_ids: Numbers of the k components.
        lengths_N: Divisor of each f_i in the factorization. The weights are 0 where it is 0.

    Returns:
        Weights (k, N), float64.
    """
    inverse_kK = torch.linalg.pinv(coefficient_gram_KK.double(), hermitian=True)[list(component_ids)]
    inverse_lengths_N = lengths_N.double().reciprocal().where(lengths_N > 0, 0)
    result: Tensor = inverse_kK @ coefficients_NK.double().T * inverse_lengths_N
    return result


def principal_direction(factors_MRD: Tensor, coefficients_M: Tensor) -> Tensor:
    """Compute the largest eigenvector (D,), float64, of Σ_i w_i Â_iᵀÂ_i, with normalized factors Â.

    The result is zero if the sum is zero.
    """
    rows_nD = (factors_MRD.double() * coefficients_M.double().sqrt()[:, None, None]).flatten(0, 1)
    n_rows, dim = rows_nD.shape
    if not rows_nD.any():
        return rows_nD.new_zeros(dim)
    direction_D: Tensor
    if dim <= n_rows:
        direction_D = torch.linalg.eigh(rows_nD.T @ rows_nD).eigenvectors[:, -1]
    else:
        values, vectors = torch.linalg.eigh(rows_nD @ rows_nD.T)
        direction_D = rows_nD.T @ vectors[:, -1] / values[-1].sqrt()
    return direction_D


def sign_weights(
    factors_NRD: Tensor, coefficients_Nk: Tensor, directions_kD: Tensor, frobenius_norms_N: Tensor
) -> Tensor:
    """Compute the weights (k, N, R), float64, of the rows A_ir in (Σ_i W_ij F̂_i) v_j, for directions v_j in the
    sketch."""
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
    """Add Σ_b w_kb f_b to `diagonals` and Σ_{b,r} v_kbr A_br to `gradients` in place.

    Args:
        collector: Collector of the model.
        batch: Input of the collector's `logits_fn`.
        diagonal_weights_kB: Weights w. It may have more rows than `row_weights_kBR`.
        row_weights_kBR: Weights v. Examples whose weights w and v are all zero are skipped.
        diagonals: (k, *shape) by parameter name.
        gradients: (k, *shape) by parameter name.
        examples: See `GradientCollector.collect`.
        targets: See `GradientCollector.collect`.
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
    """Compute s ∘ √h / (F̄ + λ), not normalized, with the signs s of a gradient and λ = `DAMPING` · mean(F̄).

    The sign is 0 where the gradient is 0.

    Args:
        diagonal: h, by parameter name. Negative entries count as 0.
        gradient: Tensors with the signs s, by parameter name.
        mean_diagonal: F̄, by parameter name.
    """
    entries = sum(tensor.numel() for tensor in mean_diagonal.values())
    damping = DAMPING * sum(float(tensor.double().sum()) for tensor in mean_diagonal.values()) / max(1, entries)
    found = signed_roots(diagonal, gradient)
    if not damping > 0:
        return {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    return {name: tensor / (mean_diagonal[name] + damping) for name, tensor in found.items()}


def signed_roots(diagonal: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute s ∘ √h, not normalized. See `fisher_weighted`."""
    return {name: gradient[name].sign() * tensor.clamp_min(0).sqrt() for name, tensor in diagonal.items()}
