"""A shard of the examples with their coefficients, and the passes over it.

A pass is the only computation of the solver whose cost grows with the number of examples. For each block of factors, it
computes two matrix products, in float64 for float64 factors and in float32 otherwise. Sums over blocks are float64. On
a CPU, factors in half precision are converted to float32 one block at a time. On a GPU, they are multiplied in half
precision and accumulated in float32.

Shapes: N examples of this shard, B examples of a block, R rank, D sketch, K components, M candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from npeff.factorization.factor_source import FactorsInMemory, FactorSource
from npeff.factorization.half_products import HALVES, product
from npeff.factorization.nnls import descend_, nnls, sweeps_for
from npeff.factorization.objective import N_CANDIDATES, Candidates, Statistics
from npeff.factorization.problem import InvalidProblemError, refuse_not_finite, validate_shape

_UPCAST_EXAMPLES = 64
"""Number of examples that are converted to float64 at a time. The converted examples should fit in the cache."""


class ExampleShard:
    """Normalized factors Â (N, R, D), their warm-start coefficients W (N, K) and, after a pass, the misfits.

    Rows of factors may be zero; they do not change any result. If all rows of an example are zero, its coefficients are
    zero.

    Args:
        factors: Â_i = A_i/√‖F_i‖_F: an array (N, R, D), which is not copied, or a source of factors.
        coefficients_NK: initial coefficients of the first pass; zeros by default.
        weights_N: weights of the examples in every sum, finite and non-negative; 1 by default. The optimal coefficients
            of an example do not depend on its weight.

    Raises:
        InvalidProblemError: if the factors are not a finite floating-point array (N, R, D), or the weights are not N
            finite non-negative numbers.
    """

    def __init__(
        self,
        factors: Tensor | np.ndarray | FactorSource,
        coefficients_NK: Tensor | np.ndarray | None = None,
        weights_N: Tensor | np.ndarray | None = None,
    ) -> None:
        if isinstance(factors, Tensor | np.ndarray):
            factors_NRD = torch.as_tensor(factors)
            validate_shape(factors_NRD)
            factors = FactorsInMemory([factors_NRD])
        self.source: FactorSource = factors
        self.device, self.rank, self.dim = factors.device, factors.rank, factors.dim
        self.n_examples = factors.n_examples
        self.dtype = torch.float32 if factors.dtype in HALVES else factors.dtype
        """Of the coefficients and of the products."""
        self.coefficients_NK = torch.zeros(self.n_examples, 0, dtype=self.dtype, device=self.device)
        """W; it has no columns before the first pass."""
        if coefficients_NK is not None:
            self.coefficients_NK = torch.as_tensor(coefficients_NK).to(self.coefficients_NK, copy=True)
        self.evidence_NK = torch.zeros(self.n_examples, 0, dtype=torch.float32, device=self.device)
        """‖Â_i h_j‖² for the components of `finish`; it has no columns before."""
        self.fisher_squares_N = self._fisher_squares()
        refuse_not_finite(self.fisher_squares_N)
        self.weights_N = self._weights(weights_N)
        self.misfits_N = self.fisher_squares_N.clone()
        """‖F̂_i − Σ_j W_ij h_j h_jᵀ‖² of the last pass, float64."""

    @property
    def factors_NRD(self) -> Tensor:
        """All factors (N, R, D). The shard must have its factors in memory."""
        assert isinstance(self.source, FactorsInMemory)
        return self.source.whole()

    def accumulate(self, components_KD: Tensor, *, sweeps: int | None = None, l1: float = 0.0) -> Statistics:
        """Improve the coefficients at the given components by `descend_`.

        Args:
            components_KD: H, unit rows.
            sweeps: number of sweeps of `descend_`; `sweeps_for` by default.
            l1: the penalty λ of `npeff.factorization.objective`, which changes the optimal coefficients.

        Returns:
            The statistics at the improved coefficients.
        """
        h_KD, gram_KK = self._components_and_gram(components_KD)
        sweeps = sweeps_for(gram_KK) if sweeps is None else sweeps
        h_KD, gram_low_KK = h_KD.to(self.dtype), gram_KK.to(self.dtype)
        coefficients_NK = self._coefficients(len(h_KD))
        statistics = Statistics.zeros(len(h_KD), self.dim, device=self.device)
        for block, factors_BRD in self._blocks():
            rows, b_KBR = self._project(factors_BRD, h_KD)
            t_KB = b_KBR.square().sum(dim=2)
            w_KB = coefficients_NK[block].T.contiguous()
            w_KB = descend_(w_KB, self._targets(t_KB, block, l1), gram_low_KK, sweeps)
            coefficients_NK[block] = w_KB.T
            self._add_block(statistics, block, rows, b_KBR, t_KB, w_KB, gram_KK)
        return statistics

    def coefficient_products(self, components_KD: Tensor, *, l1: float = 0.0) -> Tensor:
        """Return WᵀW (K, K), float64, of coefficients fitted to the given components, which are not stored."""
        h_KD, gram_KK = self._components_and_gram(components_KD)
        sweeps, h_KD, gram_low_KK = sweeps_for(gram_KK), h_KD.to(self.dtype), gram_KK.to(self.dtype)
        ww_KK = torch.zeros_like(gram_KK)
        for block, factors_BRD in self._blocks():
            _, b_KBR = self._project(factors_BRD, h_KD)
            t_KB = b_KBR.square().sum(dim=2)
            w_KB = descend_(torch.zeros_like(t_KB), self._targets(t_KB, block, l1), gram_low_KK, sweeps).double()
            ww_KK.addmm_(w_KB * self.weights_N[block], w_KB.T)
        return ww_KK

    def finish(self, components_KD: Tensor, *, l1: float = 0.0) -> Statistics:
        """Set the coefficients to their optimum at the given components, and the evidence; return the statistics.

        All computations are in float64. The coefficients are rounded to the precision of the factors before the
        statistics are computed, so the loss is that of the stored coefficients, up to rounding in float64.
        """
        h_KD, gram_KK = self._components_and_gram(components_KD)
        coefficients_NK = self._coefficients(len(h_KD))
        self.evidence_NK = self.evidence_NK.new_zeros(self.n_examples, len(h_KD))
        statistics = Statistics.zeros(len(h_KD), self.dim, device=self.device)
        for block, factors_BRD in self._blocks():
            rows, b_KBR = self._project(factors_BRD.double(), h_KD)
            t_KB = b_KBR.square().sum(dim=2)
            self.evidence_NK[block] = t_KB.T.to(self.evidence_NK)
            targets_KB = self._targets(t_KB, block, l1)
            coefficients_NK[block] = nnls(targets_KB.T, gram_KK, coefficients_NK[block]).to(coefficients_NK)
            w_KB = coefficients_NK[block].double().T.contiguous()
            self._add_block(statistics, block, rows, b_KBR, t_KB, w_KB, gram_KK)
        return statistics

    def candidates(self, components_KD: Tensor) -> Candidates:
        """Return replacements for dead components, computed from the worst-fitted examples of the last pass.

        The replacement from an example is the direction in its row space with the largest residual
        F̂_i − Σ_j W_ij h_j h_jᵀ: with Â_i = X diag(s) V, it is the top eigenvector of diag(s²) − V Hᵀ diag(W_i) H Vᵀ,
        mapped back by V.

        Args:
            components_KD: the components of the last pass.
        """
        n = min(N_CANDIDATES, self.n_examples)
        misfits, worst = (self.weights_N * self.misfits_N).sort(descending=True, stable=True)
        misfits, worst = misfits[:n], worst[:n]
        h_KD = components_KD.to(self.misfits_N)
        w_MK = self._coefficients(len(h_KD))[worst].double()
        _, s_MR, v_MRD = torch.linalg.svd(self.source.rows(worst).double(), full_matrices=False)
        vh_MRK = v_MRD @ h_KD.T
        residual_MRR = torch.diag_embed(s_MR.square()) - (vh_MRK * w_MK[:, None, :]) @ vh_MRK.mT
        top_MR = torch.linalg.eigh(residual_MRR).eigenvectors[:, :, -1]
        candidates = Candidates.none(self.dim, self.device)
        candidates.residuals_M[:n] = misfits
        candidates.directions_MD[:n] = (top_MR[:, None, :] @ v_MRD)[:, 0, :]
        return candidates

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the range of each block and its factors in the precision of products, valid until the next block."""
        start, converted = 0, torch.empty(0, dtype=self.dtype)
        for stored_BRD in self.source.blocks():
            block = slice(start, start + len(stored_BRD))
            start = block.stop
            if stored_BRD.dtype in HALVES and not stored_BRD.is_cuda:
                # All blocks use the same memory: the allocation of new pages takes longer than the conversion.
                converted = (
                    converted if converted.shape == stored_BRD.shape else torch.empty_like(stored_BRD, dtype=self.dtype)
                )
                yield block, converted.copy_(stored_BRD)
            else:
                yield block, stored_BRD

    def _components_and_gram(self, components_KD: Tensor) -> tuple[Tensor, Tensor]:
        h_KD = components_KD.to(device=self.device, dtype=torch.float64)
        return h_KD, (h_KD @ h_KD.T).square()

    def _coefficients(self, n_components: int) -> Tensor:
        if self.coefficients_NK.shape[1] == 0:
            self.coefficients_NK = self.coefficients_NK.new_zeros(self.n_examples, n_components)
        assert self.coefficients_NK.shape == (self.n_examples, n_components), self.coefficients_NK.shape
        return self.coefficients_NK

    def _targets(self, t_KB: Tensor, block: slice, l1: float) -> Tensor:
        """Return T − λ ‖F̂_i‖. The penalized NNLS problem is the problem without penalty, with these targets."""
        if l1 == 0.0:
            return t_KB
        return t_KB - l1 * self.fisher_squares_N[block].sqrt().to(t_KB)

    def _weights(self, weights_N: Tensor | np.ndarray | None) -> Tensor:
        if weights_N is None:
            return torch.ones_like(self.fisher_squares_N)
        weights = torch.as_tensor(weights_N).to(self.fisher_squares_N)
        if weights.shape != self.fisher_squares_N.shape or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise InvalidProblemError(
                f"example weights must be {self.n_examples} finite non-negative numbers: give one per example"
            )
        return weights

    def _fisher_squares(self) -> Tensor:
        squares = torch.empty(self.n_examples, dtype=torch.float64, device=self.device)
        # All parts use the same memory: the allocation of new pages takes longer than the conversion and the products.
        exact = squares.new_empty(_UPCAST_EXAMPLES, self.rank, self.dim)
        for block, factors_BRD in self._blocks():
            for part, rows_BRD in zip(
                squares[block].split(_UPCAST_EXAMPLES), factors_BRD.split(_UPCAST_EXAMPLES), strict=True
            ):
                exact_BRD = exact[: len(rows_BRD)].copy_(rows_BRD)
                part[:] = (exact_BRD @ exact_BRD.mT).square().sum(dim=(1, 2))
        return squares

    @staticmethod
    def _project(rows_BRD: Tensor, h_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the block as a matrix (B·R, D), and their products with the components (K, B, R)."""
        rows = rows_BRD.reshape(-1, rows_BRD.shape[2])
        return rows, product(h_KD, rows.T).view(len(h_KD), *rows_BRD.shape[:2])

    def _add_block(
        self,
        statistics: Statistics,
        block: slice,
        rows: Tensor,
        b_KBR: Tensor,
        t_KB: Tensor,
        w_KB: Tensor,
        gram_KK: Tensor,
    ) -> None:
        weights_B, fisher_squares_B = self.weights_N[block], self.fisher_squares_N[block]
        weighted_KB = w_KB * weights_B.to(w_KB)
        statistics.u_KD += product((weighted_KB[:, :, None] * b_KBR).view(len(w_KB), -1), rows)
        w_KB, t_KB = w_KB.double(), t_KB.double()
        wt_B = (w_KB * t_KB).sum(dim=0)
        self.misfits_N[block] = fisher_squares_B - 2 * wt_B + (w_KB * (gram_KK @ w_KB)).sum(dim=0)
        statistics.ww_KK.addmm_(w_KB * weights_B, w_KB.T)
        statistics.wt += float(weights_B @ wt_B)
        statistics.fisher_square_sum += float(weights_B @ fisher_squares_B)
        statistics.coefficient_sum += float(weights_B @ (fisher_squares_B.clamp(min=0.0).sqrt() * w_KB.sum(dim=0)))
        statistics.n_examples += len(wt_B)
