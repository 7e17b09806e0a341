"""A shard of diagonal Fishers with their coefficients, and the passes of D-NPEFF over it.

With the diagonals as rows of X ≥ 0, D-NPEFF (Matena & Raffel, arXiv 2310.04649) is non-negative matrix factorization,

    f(W, H) = ‖X − W H‖²_F = ‖X‖² − 2⟨WᵀX, H⟩ + ⟨WᵀW, H Hᵀ⟩,  W, H ≥ 0.

For fixed W, the loss of any H, and so the optimal H, depends on the data only through WᵀX, WᵀW and ‖X‖². These sums are
the `DiagonalStatistics`, and their sum over the workers is the statistics of the data set.

Products have the precision of the data. Sums over blocks, and so the objective, are float64.

Shapes: N examples of this shard, B of a block, P entries or groups of a diagonal, K components, M candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npeff.factorization.diagonals.blocks import Block, block_of
from npeff.factorization.nnls import hals_, nnls
from npeff.factorization.objective import N_CANDIDATES, Candidates
from npeff.factorization.problem import InvalidProblemError

_BLOCK_EXAMPLES = 4096
"""Examples per block: enough for products at full speed. The coefficients of a block should fit in the cache."""

SLAB_COLUMNS = 8192
"""Number of columns of the components that are processed at a time, so that they fit in the cache."""

_DEAD_ENERGY = 1e-12
"""A component is dead when ‖w_j‖² ‖h_j‖² is below this fraction of the largest."""


@dataclass
class DiagonalStatistics:
    """Sums over examples at given coefficients, in float64."""

    wx_KP: Tensor
    """WᵀX (K, P)."""
    ww_KK: Tensor
    """WᵀW (K, K)."""
    fisher_square_sum: float
    """‖X‖²_F."""
    n_examples: int

    @classmethod
    def zeros(cls, n_components: int, dim: int, *, device: torch.device | None = None) -> DiagonalStatistics:
        """Return the statistics of zero examples."""
        wx_KP = torch.zeros(n_components, dim, dtype=torch.float64, device=device)
        ww_KK = torch.zeros(n_components, n_components, dtype=torch.float64, device=device)
        return cls(wx_KP, ww_KK, 0.0, 0)

    def merge(self, other: DiagonalStatistics) -> DiagonalStatistics:
        """Add the statistics of other examples, in place, and return self."""
        assert self.wx_KP.shape == other.wx_KP.shape, (self.wx_KP.shape, other.wx_KP.shape)
        self.wx_KP += other.wx_KP
        self.ww_KK += other.ww_KK
        self.fisher_square_sum += other.fisher_square_sum
        self.n_examples += other.n_examples
        return self

    def pack(self) -> Tensor:
        """Return one float64 vector of K·P + K² + 2 numbers. The sum of two such vectors is the vector of the merge."""
        scalars = [self.fisher_square_sum, float(self.n_examples)]
        return torch.cat([self.wx_KP.flatten(), self.ww_KK.flatten(), self.wx_KP.new_tensor(scalars)])

    @classmethod
    def unpack(cls, packed: Tensor, n_components: int, dim: int) -> DiagonalStatistics:
        """Invert `pack`. The tensors are views of `packed`."""
        wx, ww, scalars = packed.split([n_components * dim, n_components**2, 2])
        fisher_square_sum, n_examples = scalars.tolist()
        return cls(wx.view(n_components, dim), ww.view(n_components, -1), fisher_square_sum, round(n_examples))

    def loss(self, components_KP: Tensor) -> float:
        """Return f at any components and the coefficients of the statistics."""
        h_KP = components_KP.double()
        return (
            self.fisher_square_sum
            - 2.0 * float(torch.sum(self.wx_KP * h_KP))
            + float(torch.sum(self.ww_KK * (h_KP @ h_KP.T)))
        )

    def energy_K(self, components_KP: Tensor) -> Tensor:
        """Return ‖w_j‖² ‖h_j‖² of each component (K,), which is Σ_i W_ij² for unit components."""
        return self.ww_KK.diagonal() * components_KP.double().square().sum(dim=1)

    def dead_K(self, components_KP: Tensor) -> Tensor:
        """Return the mask (K,) of the components that no example uses."""
        energy_K = self.energy_K(components_KP)
        return energy_K <= _DEAD_ENERGY * energy_K.max()


class DiagonalShard:
    """Normalized diagonal Fishers X (N, P), their warm-start coefficients W (N, K) and, after a pass, the misfits.

    Args:
        fishers_NP: f_i/‖f_i‖₂, non-negative, float32 or float64: a dense tensor or array, which is not copied, or a
            SciPy sparse matrix, whose products are computed on the CPU.
        coefficients_NK: initial coefficients of the first pass; zeros by default.
        outside_N: sum of squares of the entries that are in no column, which no component explains; zeros by default.

    Raises:
        InvalidProblemError: if the diagonals are not a finite, non-negative matrix of floating-point numbers.
    """

    def __init__(
        self,
        fishers_NP: Any,
        coefficients_NK: Tensor | np.ndarray | None = None,
        outside_N: Tensor | None = None,
    ) -> None:
        if len(fishers_NP.shape) != 2:
            raise InvalidProblemError(f"diagonal Fishers must be a matrix, not of shape {tuple(fishers_NP.shape)}")
        self.n_examples, self.dim = fishers_NP.shape
        empty = block_of(fishers_NP[:0])
        self._blocks = [(place, block_of(fishers_NP[place])) for place in _slices(self.n_examples)]
        self.dtype, self.device = empty.dtype, empty.device
        self.squares_N = torch.cat([block.squares_B() for block in (empty, *(block for _, block in self._blocks))])
        """‖x_i‖², including the entries outside of the columns, float64."""
        if outside_N is not None:
            self.squares_N += outside_N
        if not bool(torch.isfinite(self.squares_N).all()):
            first = int((~torch.isfinite(self.squares_N)).nonzero()[0, 0])
            raise InvalidProblemError(f"the diagonal Fisher of example {first} is not finite: remove invalid examples")
        self.misfits_N = self.squares_N.clone()
        """‖x_i − Σ_j W_ij h_j‖² of the last pass, float64."""
        self.coefficients_NK = torch.zeros(self.n_examples, 0, dtype=self.dtype, device=self.device)
        """W, in the precision of the data; it has no columns before the first pass."""
        self._trial_NK = self.coefficients_NK
        if coefficients_NK is not None:
            self.coefficients_NK = torch.as_tensor(coefficients_NK).to(self.coefficients_NK, copy=True)

    def accumulate(self, components_KP: Tensor, *, sweeps: int = 4) -> DiagonalStatistics:
        """Compute trial coefficients by `sweeps` sweeps of HALS at the given components, and return their statistics.

        The sweeps start from the current coefficients, which `settle` then replaces by the trial or keeps.
        """
        h_KP = components_KP.to(dtype=self.dtype, device=self.device)
        gram_KK = _gram(h_KP)
        gram_low_KK = gram_KK.to(h_KP)
        start_NK = self._coefficients(len(h_KP))
        self._trial_NK = torch.empty_like(start_NK)
        statistics = DiagonalStatistics.zeros(*h_KP.shape, device=self.device)
        for place, block in self._blocks:
            xh_KB = block.times(h_KP)
            w_KB = hals_(start_NK[place].T.contiguous(), xh_KB, gram_low_KK, sweeps)
            self._trial_NK[place] = w_KB.T
            self._add_block(statistics, place, block, xh_KB, w_KB, gram_KK)
        return statistics

    def settle(self, accepted: bool) -> None:
        """Replace the coefficients by those of the last pass if it is accepted."""
        if accepted:
            self.coefficients_NK = self._trial_NK

    def rescale(self, factors_K: Tensor) -> None:
        """Multiply the coefficients of each component by the factor by which the component was divided."""
        self.coefficients_NK = self._coefficients(len(factors_K)) * factors_K.to(self.coefficients_NK)

    def finish(self, components_KP: Tensor) -> DiagonalStatistics:
        """Set the coefficients to their optimum at the given components and return the statistics.

        All computations are in float64. The coefficients are rounded to the precision of the data before the statistics
        are computed, so the loss is that of the stored coefficients, up to rounding in float64.
        """
        h_KP = components_KP.to(dtype=torch.float64, device=self.device)
        gram_KK = _gram(h_KP)
        coefficients_NK = self._coefficients(len(h_KP))
        statistics = DiagonalStatistics.zeros(*h_KP.shape, device=self.device)
        for place, block in self._blocks:
            block = block.double()
            xh_KB = block.times(h_KP)
            coefficients_NK[place] = nnls(xh_KB.T, gram_KK, coefficients_NK[place]).to(coefficients_NK)
            w_KB = coefficients_NK[place].double().T.contiguous()
            self._add_block(statistics, place, block, xh_KB, w_KB, gram_KK)
        return statistics

    def candidates(self, components_KP: Tensor) -> Candidates:
        """Return replacements for dead components, computed from the worst-fitted examples of the last pass.

        The replacement from an example is the positive part of its residual, max(0, x_i − Σ_j W_ij h_j), as a unit
        vector.

        Args:
            components_KP: the components of the last pass.
        """
        misfits, worst = self.misfits_N.sort(descending=True, stable=True)
        n = min(N_CANDIDATES, self.n_examples)
        missing_MP = self.rows(worst[:n]) - self._trial_NK[worst[:n]].double() @ components_KP.double()
        candidates = Candidates.none(self.dim, self.device)
        candidates.residuals_M[:n] = misfits[:n]
        candidates.directions_MD[:n] = torch.nn.functional.normalize(missing_MP.clamp(min=0.0), dim=1)
        return candidates

    def rows(self, indices: Tensor) -> Tensor:
        """Return the diagonals of the given examples, dense, float64, in the given order."""
        chosen_MP = torch.zeros(len(indices), self.dim, dtype=torch.float64, device=self.device)
        for place, block in self._blocks:
            inside_M = (indices >= place.start) & (indices < place.stop)
            chosen_MP[inside_M] = block.rows(indices[inside_M] - place.start).double()
        return chosen_MP

    def _coefficients(self, n_components: int) -> Tensor:
        if self.coefficients_NK.shape[1] == 0:
            self.coefficients_NK = self.coefficients_NK.new_zeros(self.n_examples, n_components)
        assert self.coefficients_NK.shape == (self.n_examples, n_components), self.coefficients_NK.shape
        return self.coefficients_NK

    def _add_block(
        self,
        statistics: DiagonalStatistics,
        place: slice,
        block: Block,
        xh_KB: Tensor,
        w_KB: Tensor,
        gram_KK: Tensor,
    ) -> None:
        statistics.wx_KP += block.weighted_sums(w_KB)
        w_KB = w_KB.double()
        squares_B = self.squares_N[place]
        fitted_B = (w_KB * (2 * xh_KB.double() - gram_KK @ w_KB)).sum(dim=0)
        self.misfits_N[place] = squares_B - fitted_B
        statistics.ww_KK.addmm_(w_KB, w_KB.T)
        statistics.fisher_square_sum += float(squares_B.sum())
        statistics.n_examples += len(squares_B)


def _slices(n_examples: int) -> list[slice]:
    starts = range(0, n_examples, _BLOCK_EXAMPLES)
    return [slice(start, min(start + _BLOCK_EXAMPLES, n_examples)) for start in starts]


def _gram(h_KP: Tensor) -> Tensor:
    """Return H Hᵀ in float64, converting only some columns at a time."""
    gram_KK = torch.zeros(len(h_KP), len(h_KP), dtype=torch.float64, device=h_KP.device)
    for slab_KS in h_KP.split(SLAB_COLUMNS, dim=1):
        slab_KS = slab_KS.double()
        gram_KK.addmm_(slab_KS, slab_KS.T)
    return gram_KK
