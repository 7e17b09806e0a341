"""From components in the sketch to directions in parameter space.

Components are fitted in the sketch, where nothing says which parameters they are. One more pass over the data does:
with coefficients W, components H and the sketched, normalised factors Â fixed, one alternating-least-squares step in
full coordinates is

    direction_j = Σ_l (S⁻¹)_jl Σ_i W_il Σ_r (Â_i h_l)_r A_ir / √‖F_i‖,    S = WᵀW ∘ HHᵀ,

a weighted sum of gradient rows A_ir whose weights are known before the pass (`lift_weights`) and which is added up
batch by batch (`accumulate_directions`). Only the components of one block are in memory at a time.

What a narrow sketch blurs can be sharpened by further steps in full coordinates (`polish_weights`): the same sum, with
products Â_i ĝ_l and S = WᵀW ∘ ĝĝᵀ of the directions themselves (`row_products`, one more pass), not of the sketch.

Legend: N examples, B batch, R rank, D sketch, K components, k components of the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npeff.gradients import Collected, GradientCollector
from npeff.gradients.sums import direction_products


def lift_weights(
    factors_NRD: Tensor,
    coefficients_NK: Tensor,
    components_KD: Tensor,
    coefficient_gram_KK: Tensor,
    component_ids: Sequence[int],
    frobenius_norms_N: Tensor,
) -> Tensor:
    """Weights (k, N, R), float64, of the gradient rows A_ir in the directions of `component_ids`.

    `factors_NRD` are Â = A Qᵀ/√‖F‖, of any part of the examples; `coefficient_gram_KK` is WᵀW over all of them. Where
    the loss weighs examples by v_i, `coefficients_NK` are v_i W_i and the Gram matrix is Σ_i v_i W_i W_iᵀ. Where
    S is singular, as for components that no example uses, its pseudo-inverse is taken: their weights are zero. So are
    those of examples whose norm is zero.
    """
    components_KD = components_KD.double()
    system_KK = coefficient_gram_KK.double() * (components_KD @ components_KD.T)
    products_NRK = factors_NRD @ components_KD.to(factors_NRD).T
    return _step(products_NRK, coefficients_NK, system_KK, component_ids, inverse_roots(frobenius_norms_N))


def polish_weights(
    products_NRK: Tensor,
    coefficients_NK: Tensor,
    directions_gram_KK: Tensor,
    coefficient_gram_KK: Tensor,
    component_ids: Sequence[int],
    frobenius_norms_N: Tensor,
) -> Tensor:
    """As `lift_weights`, of the products A_ir·ĝ_l of unit directions and their Gram matrix, in full coordinates."""
    system_KK = coefficient_gram_KK.double() * directions_gram_KK.double()
    inverse_roots_N = inverse_roots(frobenius_norms_N)
    products_NRK = products_NRK.double() * inverse_roots_N[:, None, None]
    return _step(products_NRK, coefficients_NK, system_KK, component_ids, inverse_roots_N)


def _step(
    products_NRK: Tensor,
    coefficients_NK: Tensor,
    system_KK: Tensor,
    component_ids: Sequence[int],
    inverse_roots_N: Tensor,
) -> Tensor:
    inverse_kK = torch.linalg.pinv(system_KK, hermitian=True)[list(component_ids)]
    scores_NRK = products_NRK * coefficients_NK.double()[:, None]
    return torch.einsum("kl,nrl,n->knr", inverse_kK, scores_NRK, inverse_roots_N)


def inverse_roots(frobenius_norms_N: Tensor) -> Tensor:
    """1/√‖F_i‖, float64; 0 where the norm is 0."""
    return frobenius_norms_N.double().rsqrt().where(frobenius_norms_N > 0, 0)


def accumulate_directions(
    collector: GradientCollector,
    batch: Any,
    weights_kBR: Tensor,
    directions: dict[str, Tensor],
    examples: Sequence[int] | int | None = None,
    targets: Tensor | None = None,
) -> None:
    """Add Σ_{b,r} weights[k, b, r] A_br to `directions`, (k, *shape) for each parameter, in place; not normalised.

    Examples whose weights are all zero are left out, so rows that are not finite do no harm there. `examples` and
    `targets` as of `GradientCollector.collect`.
    """
    live_B = weights_kBR.ne(0).any(dim=2).any(dim=0)
    if not live_B.any():
        return
    add_rows(collector.collect(batch, examples, targets), live_B, weights_kBR, directions)


def add_rows(collected: Collected, live_B: Tensor, weights_kBR: Tensor, directions: dict[str, Tensor]) -> None:
    """As `accumulate_directions`, of rows that are collected already, and of the examples that are marked only."""
    scales_B = collected.labels.scales_B
    live_B = live_B.to(scales_B.device)
    weights_kBR = (weights_kBR.to(scales_B) * scales_B[:, None])[:, live_B]
    with torch.no_grad():
        for name, contribution in collected.contributions.items():
            contribution.examples(live_B).add_weighted_sum(weights_kBR, directions[name])


def row_products(
    collector: GradientCollector,
    batch: Any,
    directions: Mapping[str, Tensor],
    examples: Sequence[int] | int | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """A_br·g_k of a batch's rows and k directions, (k, *shape) for each parameter: (B, R, k), float64."""
    collected = collector.collect(batch, examples, targets)
    with torch.no_grad():
        products = [
            direction_products(part, directions[name].to(part.new_zeros(0))).double()
            for name, part in collected.contributions.items()
        ]
        return torch.stack(products).sum(0) * collected.labels.scales_B[:, None, None]
