"""Non-negative least squares for many examples that share one Gram matrix.

The problem of example i is  min over w ≥ 0 of  wᵀ G w − 2 wᵀ t_i,  G (K, K) positive semidefinite, t_i (K,).

Each iteration of the solver calls `descend_`, which lowers the objectives of all examples by a fixed number of steps of
`hals_` or `accelerated_`. A cost rule selects the faster of the two for the device. `nnls` computes the optimum: HALS
sweeps select a support, and a Cholesky factorization per example gives the exact values on the support. This is the
active-set method of Lawson & Hanson (1974, ch. 23), except that whole sweeps select the entries of the support.

Shapes: N examples, K components, U unsolved examples, S largest support.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SWEEPS_PER_ROUND = 4
_MAX_ROUNDS = 200
_SUPPORT_BLOCK_ELEMENTS = 1 << 22
"""Entries of the stacked support Gram matrices held at once (32 MiB in float64)."""

_HALS_BLOCK = 32
"""Components per block of `hals_`. A matrix product per block adds the contributions of the other blocks."""

_STEPS_PER_SWEEP = 4
"""Steps of `accelerated_` that are equivalent to one sweep of `hals_`. In the solver, on a planted problem with a
shared direction, 64 steps and 16 sweeps reach the same point."""


@dataclass(frozen=True)
class _DeviceCosts:
    """Seconds per kernel launch, per multiply-add of a matrix product, and per number read or written."""

    launch: float
    product: float
    stream: float

    def hals_sweep(self, n_components: int, n_examples: int) -> float:
        k, n, block = n_components, n_examples, min(_HALS_BLOCK, n_components)
        return 3 * k * self.launch + k * k * n * self.product + k * n * (block + 6) * self.stream

    def accelerated_step(self, n_components: int, n_examples: int) -> float:
        k, n = n_components, n_examples
        return 12 * self.launch + k * k * n * self.product + 16 * k * n * self.stream


_COSTS = {
    "cpu": _DeviceCosts(launch=5e-6, product=5e-11, stream=1.6e-10),
    "cuda": _DeviceCosts(launch=6e-6, product=5e-14, stream=2e-12),
}
"""Measured for one CPU core; assumed from typical figures for a large GPU, where the launches dominate."""


def descend_(coefficients_KN: Tensor, targets_KN: Tensor, gram_KK: Tensor, sweeps: int | None = None) -> Tensor:
    """Lower the objective of every example from the given coefficients, in place.

    Args:
        coefficients_KN: initial w ≥ 0, overwritten by the result.
        targets_KN: t.
        gram_KK: G.
        sweeps: sweeps of `hals_`, or the equivalent number of steps of `accelerated_`; by default, `sweeps_for` of the
            Gram matrix.
    """
    sweeps = sweeps_for(gram_KK) if sweeps is None else sweeps
    if accelerated_is_faster(gram_KK.device.type, *coefficients_KN.shape):
        return accelerated_(coefficients_KN, targets_KN, gram_KK, _STEPS_PER_SWEEP * sweeps)
    return hals_(coefficients_KN, targets_KN, gram_KK, sweeps)


def accelerated_is_faster(device: str, n_components: int, n_examples: int) -> bool:
    """Apply the cost rule. It depends only on the arguments, so repeated runs are bitwise equal."""
    costs = _COSTS.get(device, _COSTS["cuda"])
    step, sweep = (f(n_components, n_examples) for f in (costs.accelerated_step, costs.hals_sweep))
    return _STEPS_PER_SWEEP * step < sweep


def sweeps_for(gram_KK: Tensor) -> int:
    """Return the number of sweeps in an iteration of the solver, for the Gram matrix of unit components.

    The mean of the eigenvalues is 1. The largest eigenvalue, κ, limits the step size, so errors along eigenvectors with
    eigenvalues near the mean decrease most slowly. Accelerated methods reduce them in O(√κ) steps. For κ = 1, two or
    three sweeps suffice.
    """
    return 2 + math.ceil(2 * math.sqrt(max(1.0, largest_eigenvalue_bound(gram_KK))))


def largest_eigenvalue_bound(gram_KK: Tensor) -> float:
    """Return an upper bound of the largest eigenvalue of G, which is tight if G has no negative entries.

    For v > 0, the largest ratio (|G| v)_k / v_k is an upper bound (Collatz & Wielandt). v is computed by power
    iteration.
    """
    magnitudes_KK = gram_KK.double().abs()
    v = torch.ones_like(magnitudes_KK[0])
    for _ in range(10):
        v = magnitudes_KK @ v
        v = v / v.max().clamp(min=torch.finfo(v.dtype).tiny) + 1e-3
    return float(((magnitudes_KK @ v) / v).max())


def hals_(coefficients_KN: Tensor, targets_KN: Tensor, gram_KK: Tensor, sweeps: int) -> Tensor:
    """Run exact coordinate descent in place: w_k ← max(0, w_k + (t_k − G_k·w)/G_kk) for one component after another.

    Components are rows, so an update reads contiguous memory. The contributions of other blocks of components to G_k·w
    are constant during the sweep of a block and are computed by one matrix product per block. If G_kk = 0, w_k is set
    to 0. A sweep does not increase the objective of any example. Unlike multiplicative updates, coefficients that start
    at zero can become positive.

    Source: Cichocki & Phan, hierarchical alternating least squares (IEICE Trans. 2009).
    """
    blocks = [slice(k, k + _HALS_BLOCK) for k in range(0, len(gram_KK), _HALS_BLOCK)]
    diagonal = gram_KK.diagonal().tolist()
    outside_KK = gram_KK.clone()
    for block in blocks:
        outside_KK[block, block] = 0.0
    for _ in range(sweeps):
        for block in blocks:
            targets = targets_KN[block]
            if len(blocks) > 1:
                targets = torch.addmm(targets, outside_KK[block], coefficients_KN, alpha=-1.0)
            own, gram = coefficients_KN[block], gram_KK[block, block]
            for row, target, products, g_kk in zip(own, targets, gram, diagonal[block], strict=True):
                if g_kk <= 0.0:
                    row.zero_()
                    continue
                descent = torch.addmv(target, own.T, products, alpha=-1.0)
                row.add_(descent, alpha=1.0 / g_kk).clamp_(min=0.0)
    return coefficients_KN


def accelerated_(coefficients_KN: Tensor, targets_KN: Tensor, gram_KK: Tensor, steps: int) -> Tensor:
    """Run projected gradient steps with Nesterov's momentum, in place. Each step is one matrix product, for any K.

    w ← max(0, y − (G y − t)/L), L ≥ λ_max(G). y extrapolates the last two iterates w of each example. The momentum of
    an example is reset whenever it points uphill. An example whose objective would increase keeps its initial
    coefficients, so no objective increases. If G_kk = 0, w_k is set to 0.

    Source: Beck & Teboulle, SIAM J. Imaging Sci. 2 (2009), FISTA; O'Donoghue & Candès, Found. Comput. Math. 15 (2015),
    the gradient scheme of adaptive restart.
    """
    coefficients_KN *= (gram_KK.diagonal() > 0)[:, None]
    bound = largest_eigenvalue_bound(gram_KK)
    if bound <= 0.0:
        return coefficients_KN
    contraction_KK = torch.eye(len(gram_KK)).to(gram_KK) - gram_KK / bound
    pull_KN = targets_KN * ((gram_KK.diagonal() > 0)[:, None] / bound)
    w, y, momentum_1N = coefficients_KN.clone(), coefficients_KN, torch.ones_like(coefficients_KN[:1])
    for _ in range(steps):
        moved = torch.addmm(pull_KN, contraction_KK, y).clamp_(min=0.0)
        change = moved - w
        uphill_1N = ((y - moved) * change).sum(dim=0, keepdim=True) > 0
        momentum_1N = torch.where(uphill_1N, 1.0, momentum_1N)
        following_1N = (1 + (1 + 4 * momentum_1N.square()).sqrt()) / 2
        y = torch.addcmul(moved, change, (momentum_1N - 1) / following_1N)
        w, momentum_1N = moved, following_1N
    raised_N = _objective(w, targets_KN, gram_KK) > _objective(coefficients_KN, targets_KN, gram_KK)
    return coefficients_KN.copy_(torch.where(raised_N, coefficients_KN, w))


def _objective(w_KN: Tensor, targets_KN: Tensor, gram_KK: Tensor) -> Tensor:
    return ((gram_KK @ w_KN - 2 * targets_KN) * w_KN).sum(dim=0)


def nnls(targets_NK: Tensor, gram_KK: Tensor, start_NK: Tensor | None = None, tolerance: float = 1e-12) -> Tensor:
    """Compute the optimal non-negative coefficients.

    An example is solved when its optimality conditions hold: w ≥ 0 and, with g = G w − t, |min(w_k, g_k)| ≤
    tolerance · max(1, ‖t‖_∞) for every k with G_kk > 0. Each round lowers the objective by sweeps of `hals_` and a step
    towards the unconstrained optimum on the support. The step ends where a coefficient would become negative. If G is
    so close to singular that an example is not solved within the maximum number of rounds, its best coefficients are
    returned.

    Args:
        targets_NK: t_i as rows.
        gram_KK: G, symmetric positive semidefinite.
        start_NK: initial coefficients, non-negative; zeros by default. They are not modified.
        tolerance: tolerance of the optimality conditions.

    Returns:
        Coefficients (N, K), float64.
    """
    gram = gram_KK.double()
    targets = targets_NK.double().T.contiguous()
    solution = torch.zeros_like(targets) if start_NK is None else start_NK.double().T.contiguous()
    live_K1 = (gram.diagonal() > 0)[:, None]
    unsolved = torch.arange(targets.shape[1], device=targets.device)
    for _ in range(_MAX_ROUNDS):
        if unsolved.numel() == 0:
            break
        t, w = targets[:, unsolved], solution[:, unsolved]
        hals_(w, t, gram, _SWEEPS_PER_ROUND)
        w = _step_on_support(w.T.contiguous(), t.T, gram).T
        solution[:, unsolved] = w
        violation = torch.minimum(w, gram @ w - t).abs() * live_K1
        scale = t.abs().amax(dim=0).clamp(min=1.0)
        unsolved = unsolved[violation.amax(dim=0) > tolerance * scale]
    return solution.T.contiguous()


def _step_on_support(w_UK: Tensor, t_UK: Tensor, gram_KK: Tensor) -> Tensor:
    """Move each row towards the optimum over its support {k : w_k > 0}, as far as w ≥ 0 allows."""
    sizes_U, order_U = (w_UK > 0).sum(dim=1).sort(stable=True)
    sizes = sizes_U.tolist()
    moved_UK = w_UK.clone()
    start = sum(size == 0 for size in sizes)
    while start < len(sizes):
        # Supports are padded to the largest size in their block. Sizes ascend, so half a block has smaller supports.
        stop = len(sizes)
        while stop - start > 1 and (stop - start) * sizes[stop - 1] ** 2 > _SUPPORT_BLOCK_ELEMENTS:
            stop = (start + stop) // 2
        block = order_U[start:stop]
        moved_UK[block] = _step_on_support_block(w_UK[block], t_UK[block], gram_KK, sizes[stop - 1])
        start = stop
    return moved_UK


def _step_on_support_block(w_UK: Tensor, t_UK: Tensor, gram_KK: Tensor, size: int) -> Tensor:
    inside, support_US = (w_UK > 0).int().sort(dim=1, descending=True, stable=True)
    support_US, inside_US = support_US[:, :size], inside[:, :size].bool()
    gram_USS = gram_KK[support_US[:, :, None], support_US[:, None, :]]
    gram_USS = gram_USS * (inside_US[:, :, None] & inside_US[:, None, :])
    # Padding is an identity block. The ridge is far below the tolerance and regularizes duplicate components.
    ridge = 1e-14 * gram_KK.diagonal().max()
    gram_USS.diagonal(dim1=1, dim2=2).add_(torch.where(inside_US, ridge, 1.0))
    chol_USS, info_U = torch.linalg.cholesky_ex(gram_USS)
    now_US = torch.gather(w_UK, 1, support_US)
    target_US = torch.gather(t_UK, 1, support_US) * inside_US
    best_US = torch.cholesky_solve(target_US[:, :, None], chol_USS)[:, :, 0]
    best_US = torch.where((info_U == 0)[:, None], best_US, now_US)
    falling = inside_US & (best_US < 0)
    ratio_US = torch.where(falling, now_US / (now_US - best_US), torch.ones_like(now_US))
    step_U1 = ratio_US.amin(dim=1, keepdim=True)
    moved_US = torch.lerp(now_US, best_US, step_U1)
    # The coefficient that limits the step is set to exactly zero, not to zero up to rounding.
    moved_US = torch.where((falling & (ratio_US <= step_U1)) | ~inside_US, 0.0, moved_US.clamp(min=0.0))
    return torch.zeros_like(w_UK).scatter_(1, support_US, moved_US)
