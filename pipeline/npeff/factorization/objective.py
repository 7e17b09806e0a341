"""The loss of a factorization as a function of statistics that are sums over examples.

With Â_i = A_i/√‖F_i‖_F, components H (unit rows) and coefficients W ≥ 0,

    f = Σ_i ‖Â_iᵀ Â_i − Σ_j W_ij h_j h_jᵀ‖²_F = Σ_i ‖F̂_i‖² − 2⟨W, T⟩ + ⟨Wᵀ W, (H Hᵀ)∘(H Hᵀ)⟩,  T_ij = ‖Â_i h_j‖²

(Matena & Raffel, arXiv 2310.04649). With example weights v_i, each term of the sums over i is multiplied by v_i. The
objective is the loss plus two optional penalties, which are invariant to the scale of the data:

    l1:             2 λ Σ_i v_i ‖F̂_i‖_F Σ_j W_ij             (with one component, W_ij = 0 if T_ij ≤ λ ‖F̂_i‖)
    orthogonality:  γ Σ_i v_i ‖F̂_i‖² · mean over j ≠ l of (h_j·h_l)²         (in units of the explained fraction)

A step depends on the data only through `Statistics`. Each worker computes the statistics of its own examples, and their
sum over the workers is the statistics of the data set.

Shapes: N examples, R rank, D sketch, K components, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

N_CANDIDATES = 4
"""Number of replacements for dead components. Each costs a transfer of D numbers, only if a component is dead."""

_DEAD_ENERGY = 1e-12
"""A component is dead when Σ_i W_ij² is below this fraction of the largest."""


@dataclass
class Statistics:
    """Weighted sums over examples at given components H, in float64."""

    u_KD: Tensor
    """U = Σ_i (W_i ∘ Â_i Hᵀ)ᵀ Â_i (K, D). The gradient of f is −4 (U − S H)."""
    ww_KK: Tensor
    """WᵀW (K, K)."""
    wt: float
    """⟨W, T⟩."""
    fisher_square_sum: float
    """Σ_i ‖Â_iᵀ Â_i‖²_F of the given factors, which are sketched."""
    n_examples: int
    coefficient_sum: float = 0.0
    """Σ_i ‖Â_iᵀ Â_i‖_F Σ_j W_ij."""

    @classmethod
    def zeros(cls, n_components: int, dim: int, *, device: torch.device | None = None) -> Statistics:
        """Return the statistics of zero examples."""
        u_KD = torch.zeros(n_components, dim, dtype=torch.float64, device=device)
        ww_KK = torch.zeros(n_components, n_components, dtype=torch.float64, device=device)
        return cls(u_KD, ww_KK, 0.0, 0.0, 0)

    def merge(self, other: Statistics) -> Statistics:
        """Add the statistics of other examples at the same components, in place, and return self."""
        assert self.u_KD.shape == other.u_KD.shape, (self.u_KD.shape, other.u_KD.shape)
        self.u_KD += other.u_KD
        self.ww_KK += other.ww_KK
        self.wt += other.wt
        self.fisher_square_sum += other.fisher_square_sum
        self.n_examples += other.n_examples
        self.coefficient_sum += other.coefficient_sum
        return self

    def pack(self) -> Tensor:
        """Return one float64 vector of K·D + K² + 4 numbers. The sum of two such vectors is the vector of the merge."""
        scalars = [self.wt, self.fisher_square_sum, self.coefficient_sum, float(self.n_examples)]
        return torch.cat([self.u_KD.flatten(), self.ww_KK.flatten(), self.u_KD.new_tensor(scalars)])

    @classmethod
    def unpack(cls, packed: Tensor, n_components: int, dim: int) -> Statistics:
        """Invert `pack`. The tensors are views of `packed`."""
        u, ww, scalars = packed.split([n_components * dim, n_components**2, 4])
        wt, fisher_square_sum, coefficient_sum, n_examples = scalars.tolist()
        u_KD, ww_KK = u.view(n_components, dim), ww.view(n_components, -1)
        return cls(u_KD, ww_KK, wt, fisher_square_sum, round(n_examples), coefficient_sum)

    def loss(self, components_KD: Tensor) -> float:
        """Return f at the components of the statistics."""
        gram_KK = (components_KD @ components_KD.T).square()
        return self.fisher_square_sum - 2.0 * self.wt + float(torch.sum(self.ww_KK * gram_KK))

    def penalties(self, components_KD: Tensor, l1: float, orthogonality: float) -> float:
        """Return the sum of the penalties at the components of the statistics."""
        off_diagonal = (components_KD @ components_KD.T).square().triu(diagonal=1)
        pressure = 2.0 * self.orthogonality_weight(orthogonality) * float(off_diagonal.sum())
        return 2.0 * l1 * self.coefficient_sum + pressure

    def orthogonality_weight(self, orthogonality: float) -> float:
        """Return c of the penalty c Σ_{j≠l} (h_j·h_l)²."""
        k = len(self.ww_KK)
        return orthogonality * self.fisher_square_sum / max(1, k * (k - 1))

    @property
    def energy_K(self) -> Tensor:
        """Σ_i W_ij² of each component (K,)."""
        return self.ww_KK.diagonal()

    @property
    def dead_K(self) -> Tensor:
        """Mask (K,) of the components that no example uses."""
        return self.energy_K <= _DEAD_ENERGY * self.energy_K.max()


def explained(loss: float, fisher_square_sum: float) -> float:
    """Return 1 − f / Σ_i ‖F̂_i‖²: 1 for a perfect fit, 0 without components."""
    return 1.0 - loss / fisher_square_sum


@dataclass(frozen=True)
class Candidates:
    """Replacements for dead components, computed from the worst-fitted examples, worst first; float64.

    There are always `N_CANDIDATES` rows, so all workers exchange tensors of the same shape. A row with residual 0 is
    padding.
    """

    residuals_M: Tensor
    directions_MD: Tensor

    @classmethod
    def none(cls, dim: int, device: torch.device | None = None) -> Candidates:
        """Return only padding."""
        residuals_M = torch.zeros(N_CANDIDATES, dtype=torch.float64, device=device)
        return cls(residuals_M, residuals_M.new_zeros(N_CANDIDATES, dim))

    def pack(self) -> Tensor:
        """Return one float64 vector of M·(D + 1) numbers, which is gathered (not summed) from the workers."""
        return torch.cat([self.residuals_M, self.directions_MD.flatten()])

    @classmethod
    def unpack(cls, packed: Tensor) -> Candidates:
        """Invert `pack`."""
        return cls(packed[:N_CANDIDATES], packed[N_CANDIDATES:].view(N_CANDIDATES, -1))


def merge_candidates(candidates: Sequence[Candidates]) -> Candidates:
    """Return the worst-fitted of all candidates. The result does not depend on the partition into shards."""
    residuals = torch.cat([c.residuals_M for c in candidates])
    worst = residuals.argsort(descending=True, stable=True)[:N_CANDIDATES]
    return Candidates(residuals[worst], torch.cat([c.directions_MD for c in candidates])[worst])
