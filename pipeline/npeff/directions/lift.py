"""The lift: directions of components in parameter space.

Components are fitted in the sketch, so they have no coordinates in parameter space. One more pass over the data
computes these coordinates. With fixed coefficients W, components H and sketched normalized factors Â, one step of
alternating least squares in all parameters is

    direction_j = Σ_l (S⁻¹)_jl Σ_i W_il Σ_r (Â_i h_l)_r A_ir / √‖F_i‖,    S = WᵀW ∘ HHᵀ.

This is a weighted sum of gradient rows A_ir. The weights are known before the pass (`lift_weights`), and the sum is
accumulated batch by batch (`accumulate_directions`). Memory holds the directions of one block of components at a time.

Further steps in all parameters (`polish_weights`) correct the errors of a narrow sketch. They use the same sum, with
the products Â_i ĝ_l and S = WᵀW ∘ ĝĝᵀ of the directions (`row_products`, one more pass) in place of those of the
sketch.

Combinations of the directions, such as whitened directions (`npeff.directions.whitening`), are the same sums with the
weights of the combinations.

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
    combinations_KK: Tensor | None = None,
) -> Tensor:
    """Compute the weights of the gradient rows A_ir in the directions of `component_ids`.

    Where S is singular, as for components that no example uses, the pseudo-inverse replaces the inverse, and the
    weights of such components are zero. The weights of examples with norm zero are also zero.

    Args:
        factors_NRD: Â = A Qᵀ/√‖F‖ of any part of the examples.
        coefficients_NK: W of the same examples. If the loss weights examples by v_i, these are v_i W_i.
        components_KD: H.
        coefficient_gram_KK: WᵀW over all examples. If the loss weights examples by v_i, this is Σ_i v_i W_i W_iᵀ.
        component_ids: Numbers of the k components.
        frobenius_norms_N: ‖F_i‖.
        combinations_KK: If given, direction j is Σ_l combinations[j, l] direction_l.

    Returns:
        Weights (k, N, R), float64.
    """
    components_KD = components_KD.double()
    system_KK = coefficient_gram_KK.double() * (components_KD @ components_KD.T)
    products_NRK = factors_NRD @ components_KD.to(factors_NRD).T
    inverse_roots_N = inverse_roots(frobenius_norms_N)
    return _step(products_NRK, coefficients_NK, system_KK, component_ids, inverse_roots_N, combinations_KK)


def polish_weights(
    products_NRK: Tensor,
    coefficients_NK: Tensor,
    directions_gram_KK: Tensor,
    coefficient_gram_KK: Tensor,
    component_ids: Sequence[int],
    frobenius_norms_N: Tensor,
    combinations_KK: Tensor | None = None,
) -> Tensor:
    """Compute the weights of a polishing step from the unit directions of all components. See `lift_weights`.

    Args:
        products_NRK: A_ir·ĝ_l in all parameters, see `row_products`.
        coefficients_NK: See `lift_weights`.
        directions_gram_KK: Inner products ĝ_j·ĝ_l of the directions.
        coefficient_gram_KK: See `lift_weights`.
        component_ids: Numbers of the k components.
        frobenius_norms_N: ‖F_i‖.
        combinations_KK: See `lift_weights`.

    Returns:
        Weights (k, N, R), float64.
    """
    system_KK = coefficient_gram_KK.double() * directions_gram_KK.double()
    inverse_roots_N = inverse_roots(frobenius_norms_N)
    products_NRK = products_NRK.double() * inverse_roots_N[:, None, None]
    return _step(products_NRK, coefficients_NK, system_KK, component_ids, inverse_roots_N, combinations_KK)


def _step(
    products_NRK: Tensor,
    coefficients_NK: Tensor,
    system_KK: Tensor,
    component_ids: Sequence[int],
    inverse_roots_N: Tensor,
    combinations_KK: Tensor | None,
) -> Tensor:
    inverse_KK = torch.linalg.pinv(system_KK, hermitian=True)
    chosen = list(component_ids)
    inverse_kK = inverse_KK[chosen] if combinations_KK is None else combinations_KK[chosen].double() @ inverse_KK
    scores_NRK = products_NRK * coefficients_NK.double()[:, None]
    return torch.einsum("kl,nrl,n->knr", inverse_kK, scores_NRK, inverse_roots_N)


def inverse_roots(frobenius_norms_N: Tensor) -> Tensor:
    """Compute 1/√‖F_i‖, float64. The result is 0 where the norm is 0."""
    return frobenius_norms_N.double().rsqrt().where(frobenius_norms_N > 0, 0)


def accumulate_directions(
    collector: GradientCollector,
    batch: Any,
    weights_kBR: Tensor,
    directions: dict[str, Tensor],
    examples: Sequence[int] | int | None = None,
    targets: Tensor | None = None,
) -> None:
    """Add Σ_{b,r} weights[k, b, r] A_br to `directions` in place, without normalization.

    Args:
        collector: Collector of the model.
        batch: Input of the collector's `logits_fn`.
        weights_kBR: Weights. Examples whose weights are all zero are skipped, even if their rows are not finite.
        directions: (k, *shape) by parameter name.
        examples: See `GradientCollector.collect`.
        targets: See `GradientCollector.collect`.
    """
    live_B = weights_kBR.ne(0).any(dim=2).any(dim=0)
    if not live_B.any():
        return
    add_rows(collector.collect(batch, examples, targets), live_B, weights_kBR, directions)


def add_rows(collected: Collected, live_B: Tensor, weights_kBR: Tensor, directions: dict[str, Tensor]) -> None:
    """Add the weighted sum of collected rows to `directions` in place, over the examples marked in `live_B` only.

    See `accumulate_directions`.
    """
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
    """Compute the inner products A_br·g_k of the rows of a batch with k directions.

    Args:
        collector: Collector of the model.
        batch: Input of the collector's `logits_fn`.
        directions: (k, *shape) by parameter name.
        examples: See `GradientCollector.collect`.
        targets: See `GradientCollector.collect`.

    Returns:
        Inner products (B, R, k), float64.
    """
    collected = collector.collect(batch, examples, targets)
    with torch.no_grad():
        products = [
            direction_products(part, directions[name].to(part.new_zeros(0))).double()
            for name, part in collected.contributions.items()
        ]
        return torch.stack(products).sum(0) * collected.labels.scales_B[:, None, None]
