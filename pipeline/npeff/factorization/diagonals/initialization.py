"""Starting components of D-NPEFF: the best of several seeded starts on a small dense part of the data.

The part contains the heaviest columns of a subsample: the entries or groups with the largest sums of squares. The first
start is NNDSVD (Boutsidis & Gallopoulos, Pattern Recognition 41, 2008), the second is NNDSVD with its zeros filled in,
and the others are means of a few examples. All but the first are positive. They are smoothed by some multiplicative
updates (Lee & Seung, NIPS 2000), whose many small steps mostly lead to better minima than HALS from the same starts.
All starts are then refined by iterations of the solver, and the one with the smallest loss is selected.

Only H of NNDSVD is needed, because the coefficients follow from the components. For the same reason, the columns
outside of the part can be zero at first: the first pass over all columns computes coefficients from the other columns,
and the step then fills in these columns. The result on the part is compared with NNDSVD of all columns: both are
refined on all columns, and the better one is returned.

`n_starts: 1` skips the trial runs to save time. The single start is NNDSVD, smoothed if the part contains all columns.

Shapes: M subsampled examples, C columns of the part, P entries or groups, K components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from npeff.factorization.diagonals.blocks import block_of
from npeff.factorization.diagonals.shard import DiagonalShard
from npeff.factorization.diagonals.solver import (
    DiagonalState,
    diagonal_stopping_reason,
    initial_diagonal_state,
    step_diagonal,
)
from npeff.factorization.problem import InvalidProblemError, validate_size
from npeff.options.solver import SolverOptions

_MOST_COLUMNS = 2048
_EXTRA_DIMENSIONS = 16
_POWER_ITERATIONS = 7
_EXAMPLES_OF_A_MEAN = 5
_SMOOTHING_ITERATIONS = 10
_MOST_SMOOTHING = 60
"""Smoothing iterations if the part contains all columns: the problem is small, and no other passes follow."""
_TRIAL_ITERATIONS = 10
_MOST_ITERATIONS = 150
_LAST_ITERATIONS = 40
"""Iterations of both results on all columns. NNDSVD starts with a much larger loss and mostly ends with the smaller."""
_TOLERANCE = 1e-5


def initialize_diagonal(fishers_MP: Any, n_components: int, seed: int, n_starts: int = 4) -> Tensor:
    """Compute starting components. The result is deterministic.

    Args:
        fishers_MP: diagonals of the subsample, dense or a SciPy sparse matrix.
        n_components: K, at most M.
        seed: seed of the starts.
        n_starts: number of positive starts, which are compared with each other and with NNDSVD; 1 skips the trial runs.

    Returns:
        Non-negative unit rows (K, P), in the precision of the data.

    Raises:
        InvalidProblemError: if the diagonals are not finite and non-negative, are all zero, or are fewer than K.
    """
    validate_size(fishers_MP.shape[0], 1, n_components)
    part_MC, columns_C = _heaviest_columns(fishers_MP)
    if not bool(part_MC.any()):
        raise InvalidProblemError("every diagonal Fisher is zero: there is nothing to factorize")
    generator = torch.Generator().manual_seed(seed)
    whole = len(columns_C) == fishers_MP.shape[1]
    if n_starts == 1 and not whole:
        return _nndsvd(fishers_MP, n_components, generator).to(part_MC)
    smoothing = _MOST_SMOOTHING if whole else _SMOOTHING_ITERATIONS
    nndsvd_KC = _nndsvd(part_MC, n_components, generator)
    positive = [torch.where(nndsvd_KC > 0, nndsvd_KC, nndsvd_KC.mean())]
    positive += [_means_of_examples(part_MC, n_components, generator) for _ in range(n_starts - 1)]
    smoothed = [_smoothed(part_MC, start_KC, smoothing) for start_KC in positive]
    if n_starts == 1:
        return torch.nn.functional.normalize(smoothed[0], dim=1)
    starts = [nndsvd_KC, *smoothed]
    trials = [_polished(part_MC, start_KC, _TRIAL_ITERATIONS) for start_KC in starts]
    shard, state = min(trials, key=lambda trial: trial[1].best_loss)
    if whole:
        state = _advanced(shard, state, _options(n_components, _MOST_ITERATIONS))
        return torch.nn.functional.normalize(state.best_components_KP, dim=1)
    components_KP = part_MC.new_zeros(n_components, fishers_MP.shape[1])
    components_KP[:, columns_C] = torch.nn.functional.normalize(state.best_components_KP, dim=1)
    rivals = [components_KP, _nndsvd(fishers_MP, n_components, generator).to(components_KP)]
    last = [_polished(fishers_MP, start_KP, _LAST_ITERATIONS)[1] for start_KP in rivals]
    return torch.nn.functional.normalize(min(last, key=lambda state: state.best_loss).best_components_KP, dim=1)


def _heaviest_columns(fishers_MP: Any) -> tuple[Tensor, Tensor]:
    """Return the part as a dense matrix (M, C), and the indices of its columns (C,), ascending."""
    sparse = scipy.sparse.issparse(fishers_MP)
    if sparse:
        squares_P = torch.from_numpy(np.asarray(fishers_MP.multiply(fishers_MP).sum(axis=0)).ravel())
    else:
        fishers_MP = torch.as_tensor(fishers_MP)
        squares_P = torch.linalg.vector_norm(fishers_MP, dim=0, dtype=torch.float64).square()
    columns_C = squares_P.double().argsort(descending=True, stable=True)[:_MOST_COLUMNS].sort().values
    if sparse:
        return torch.from_numpy(fishers_MP.tocsc()[:, columns_C.numpy()].toarray(order="C")), columns_C
    return (fishers_MP[:, columns_C] if len(columns_C) < fishers_MP.shape[1] else fishers_MP), columns_C


def _polished(fishers_MP: Any, start_KP: Tensor, most: int) -> tuple[DiagonalShard, DiagonalState]:
    shard, options = DiagonalShard(fishers_MP), _options(len(start_KP), most)
    return shard, _advanced(shard, initial_diagonal_state(start_KP, options), options)


def _options(n_components: int, most: int) -> SolverOptions:
    return SolverOptions(n_components=n_components, max_iterations=most, tolerance=_TOLERANCE)


def _advanced(shard: DiagonalShard, state: DiagonalState, options: SolverOptions) -> DiagonalState:
    while diagonal_stopping_reason(state, options) is None:
        state, _ = step_diagonal([shard], state, options)
    return state


def _nndsvd(fishers_MP: Any, n_components: int, generator: torch.Generator) -> Tensor:
    """Return the components of NNDSVD as unit rows (K, P).

    For each leading singular pair (u, v), the component is v₊ or v₋, whichever of ‖u₊‖‖v₊‖ and ‖u₋‖‖v₋‖ is larger.
    Components beyond the rank are means of examples.
    """
    n_leading = min(n_components, *fishers_MP.shape)
    n_probes = min(n_leading + _EXTRA_DIMENSIONS, *fishers_MP.shape)
    probe = torch.randn(fishers_MP.shape[1], n_probes, dtype=torch.float64, generator=generator)
    empty = block_of(fishers_MP[:0])
    probe = probe.to(empty.device, empty.dtype)
    for _ in range(_POWER_ITERATIONS):
        probe = torch.linalg.qr(_times(fishers_MP.T, _times(fishers_MP, probe))).Q
    u_MQ, _, rotation = torch.linalg.svd(_times(fishers_MP, probe), full_matrices=False)
    pairs = [(sign * u_MQ[:, :n_leading], sign * (probe @ rotation.T)[:, :n_leading]) for sign in (1, -1)]
    positive = [(u_MK.clamp(min=0.0), v_PK.clamp(min=0.0)) for u_MK, v_PK in pairs]
    weights = [torch.linalg.norm(u_MK, dim=0) * torch.linalg.norm(v_PK, dim=0) for u_MK, v_PK in positive]
    start_KP = torch.where(weights[0] >= weights[1], positive[0][1], positive[1][1]).T
    start_KP = torch.nn.functional.normalize(start_KP, dim=1)
    if n_leading == n_components:
        return start_KP.contiguous()
    return torch.cat([start_KP, _means_of_examples(fishers_MP, n_components - n_leading, generator)])


def _times(fishers_MP: Any, factor_PQ: Tensor) -> Tensor:
    if scipy.sparse.issparse(fishers_MP):
        return torch.from_numpy(fishers_MP @ factor_PQ.numpy())
    return torch.as_tensor(fishers_MP) @ factor_PQ


def _means_of_examples(part_MC: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return unit rows, each the mean of a few random examples, with zeros replaced by the mean over all rows."""
    drawn = torch.randint(len(part_MC), (n, _EXAMPLES_OF_A_MEAN), generator=generator).to(part_MC.device)
    start_KC = torch.nn.functional.normalize(part_MC[drawn].mean(dim=1), dim=1)
    return torch.where(start_KC > 0, start_KC, start_KC.mean()) if n else start_KC


def _smoothed(part_MC: Tensor, start_KC: Tensor, iterations: int) -> Tensor:
    """Return the components after multiplicative updates of W and H, from W = X Hᵀ with the best common scale."""
    h_KC, w_MK = start_KC, part_MC @ start_KC.T
    w_MK = w_MK * (w_MK.square().sum() / torch.sum((w_MK.T @ w_MK) * (h_KC @ h_KC.T)))
    tiny = torch.finfo(part_MC.dtype).tiny
    for _ in range(iterations):
        w_MK = w_MK * (part_MC @ h_KC.T) / (w_MK @ (h_KC @ h_KC.T)).clamp(min=tiny)
        h_KC = h_KC * (w_MK.T @ part_MC) / ((w_MK.T @ w_MK) @ h_KC).clamp(min=tiny)
    return h_KC
