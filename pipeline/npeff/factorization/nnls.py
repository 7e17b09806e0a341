"""Non-negative least squares for many examples that share one Gram matrix.

Every example i solves  min over w ≥ 0 of  wᵀ G w − 2 wᵀ t_i,  G (K, K) positive semidefinite, t_i (K,).

`descend_` is what an iteration of the solver uses: some cheap descent over all examples at once, by `hals_` or by
`accelerated_`, whichever the cost rule says is faster on the device at hand. `nnls` goes to the optimum: HALS sweeps
propose a support, a Cholesky factorization per example gives the exact values on it, as in the active-set method of
Lawson & Hanson (1974, ch. 23) but with whole sweeps choosing what enters.

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
"""Components between two matrix products of `hals_`: what lies outside their block changes only there."""

_STEPS_PER_SWEEP = 4
"""Steps of `accelerated_` that come as far as one sweep of `hals_`: in the solver, on a planted problem with a shared
direction, 64 steps and 16 sweeps reach the same point."""


@dataclass(frozen=True)
class _DeviceCosts:
    """Seconds of a kernel's launch, of one multiply-add in a matrix product, and of one number read or written."""

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
"""Of one CPU core, measured; of a large GPU, assumed from usual figures: the launches decide there by a wide margin."""


def descend_(coefficients_KN: Tensor, targets_KN: Tensor, gram_KK: Tensor, sweeps: int | None = None) -> Tensor:
    """Lower the objective of every example from the given coefficients, in place.

    Args:
        coefficients_KN: w ≥ 0, where to start.
        targets_KN: t.
        gram_KK: G.
        sweeps: of `hals_`, or the equivalent of `accelerated_`; `sweeps_for` the Gram matrix unless given.
    """
    sweeps = sweeps_for(gram_KK) if sweeps is None else sweeps
    if accelerated_is_faster(gram_KK.device.type, *coefficients_KN.shape):
        return accelerated_(coefficients_KN, targets_KN, gram_KK, _STEPS_PER_SWEEP * sweeps)
    return hals_(coefficients_KN, targets_KN, gram_KK, sweeps)


def accelerated_is_faster(device: str, n_components: int, n_examples: int) -> bool:
    """The cost rule. It depends on nothing else, so that a run repeats bit for bit."""
    costs = _COSTS.get(device, _COSTS["cuda"])
    step, sweep = (f(n_components, n_examples) for f in (costs.accelerated_step, costs.hals_sweep))
    return _STEPS_PER_SWEEP * step < sweep


def sweeps_for(gram_KK: Tensor) -> int:
    """How many sweeps an iteration of the solver should make at this Gram matrix of unit components.

    Its eigenvalues are 1 in the mean. An error along an eigenvector near the mean is what is left when the largest, κ,
    rules the step; accelerated methods need O(√κ) steps against it, and sweeps at κ = 1 need two or three.
    """
    return 2 + math.ceil(2 * math.sqrt(max(1.0, largest_eigenvalue_bound(gram_KK))))


def largest_eigenvalue_bound(gram_KK: Tensor) -> float:
    """No less than the largest eigenvalue of G, and close to it where G has no negative entries.

    For v > 0 the largest ratio (|G| v)_k / v_k bounds it from above (Collatz & Wielandt); v comes of power iterations.
    """
    magnitudes_KK = gram_KK.double().abs()
    v = torch.ones_like(magnitudes_KK[0])
    for _ in range(10):
        v = magnitudes_KK @ v
        v = v / v.max().clamp(min=torch.finfo(v.dtype).tiny) + 1e-3
    return float(((magnitudes_KK @ v) / v).max())


def hals_(coefficients_KN: Tensor, targets_KN: Tensor, gram_KK: Tensor, sweeps: int) -> Tensor:
    """Exact coordinate descent in place: w_k ← max(0, w_k + (t_k − G_k·w)/G_kk), component after component.

    Components are rows, so that one update streams contiguous memory. What other blocks of components contribute to
    G_k·w stands still while a block is swept: one matrix product per block holds it. A component with G_kk = 0 gets
    w_k = 0. No sweep raises the objective of any example, and one that starts at zero leaves it (unlike multiplicative
    updates).

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
    """Projected gradient steps with Nesterov's momentum, in place: one matrix product a step, whatever K is.

    w ← max(0, y − (G y − t)/L), L ≥ λ_max(G); y extrapolates the last two w of each example, whose momentum begins anew
    whenever it points uphill. Examples that ended higher than they began keep what they had: none is raised. A
    component with G_kk = 0 gets w_k = 0.

    Source: Beck & Teboulle, SIAM J. Imaging Sci. 2 (2009), FISTA; O'Donoghue & Candès, Found. Comput. Math. 15 (2015),
    the gradient scheme of restarting.
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
    """The optimal non-negative coefficients (N, K) in float64.

    An example is solved when its optimality conditions hold: w ≥ 0, and with g = G w − t, |min(w_k, g_k)| ≤
    tolerance · max(1, ‖t‖_∞) for every k with G_kk > 0. Each round lowers the objective: sweeps of `hals_`, then a step
    towards the unconstrained optimum on the support, cut short where a coefficient would turn negative. Should G be so
    close to singular that an example is not solved within the rounds, its best coefficients are returned.

    Args:
        targets_NK: t_i in its rows.
        gram_KK: G, symmetric positive semidefinite.
        start_NK: where to start from, non-negative; zeros by default. It is not modified.
        tolerance: of the optimality conditions.
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
    """Move each row to the optimum over its support {k : w_k > 0}, or as far towards it as w ≥ 0 allows."""
    sizes_U, order_U = (w_UK > 0).sum(dim=1).sort(stable=True)
    sizes = sizes_U.tolist()
    moved_UK = w_UK.clone()
    start = sum(size == 0 for size in sizes)
    while start < len(sizes):
        # Supports are padded to the largest of their block. They ascend, so halving a block also makes it narrower.
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
    # Padding becomes an identity block; the ridge, far below the tolerance, keeps duplicate components solvable.
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
    # The coefficient that limits the step leaves the support exactly, not to within rounding.
    moved_US = torch.where((falling & (ratio_US <= step_U1)) | ~inside_US, 0.0, moved_US.clamp(min=0.0))
    return torch.zeros_like(w_UK).scatter_(1, support_US, moved_US)
