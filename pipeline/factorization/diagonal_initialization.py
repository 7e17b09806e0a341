"""Where D-NPEFF starts: several seeded starts on a small dense part of the data, the best kept.

The part is a subsample's heaviest columns: the entries or groups with the largest sums of squares. One start there is
NNDSVD (Boutsidis & Gallopoulos, Pattern Recognition 41, 2008), the others are examples drawn as k-means++ draws them,
by what the ones before leave unexplained. Each is polished by iterations of the solver; the one of least loss goes on.

Of NNDSVD only H is needed, as the coefficients follow from the components. For the same reason the columns outside of
the part may begin at zero: the first pass over all data finds coefficients by the others, and then fills them in.

Shapes: M subsampled examples, C columns of the part, P entries or groups, K components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from pipeline.factorization.diagonal import DiagonalShard
from pipeline.factorization.diagonal_solver import (
    DiagonalState,
    diagonal_stopping_reason,
    initial_diagonal_state,
    step_diagonal,
)
from pipeline.factorization.problem import InvalidProblemError, validate_size
from pipeline.factorization.solver import SolverOptions

_MOST_COLUMNS = 2048
_TRIAL_ITERATIONS = 30
_MOST_ITERATIONS = 150
_TOLERANCE = 1e-5


def initialize_diagonal(fishers_MP: Any, n_components: int, seed: int, n_starts: int = 4) -> Tensor:
    """Starting components (K, P), non-negative unit rows in the data's precision; the same for the same arguments.

    Args:
        fishers_MP: of the subsample, dense or a SciPy sparse matrix.
        n_components: K, at most M.
        seed: of the starts.
        n_starts: how many are tried.

    Raises:
        InvalidProblemError: if the diagonals are not finite and non-negative, all zero, or fewer than components.
    """
    validate_size(fishers_MP.shape[0], 1, n_components)
    part_MC, columns_C = _heaviest_columns(fishers_MP)
    if not bool(part_MC.any()):
        raise InvalidProblemError("every diagonal Fisher is zero: there is nothing to factorize")
    generator = torch.Generator().manual_seed(seed)
    trials = [_polished(part_MC, _nndsvd(part_MC, n_components, generator))]
    trials += [_polished(part_MC, _spread_examples(part_MC, n_components, generator)) for _ in range(n_starts - 1)]
    shard, state = min(trials, key=lambda trial: trial[1].best_loss)
    options = SolverOptions(n_components=n_components, max_iterations=_MOST_ITERATIONS, tolerance=_TOLERANCE)
    while diagonal_stopping_reason(state, options) is None:
        state, _ = step_diagonal([shard], state, options)
    components_KP = part_MC.new_zeros(n_components, fishers_MP.shape[1])
    components_KP[:, columns_C] = torch.nn.functional.normalize(state.best_components_KP, dim=1)
    return components_KP


def _heaviest_columns(fishers_MP: Any) -> tuple[Tensor, Tensor]:
    """The part as a dense matrix (M, C), and which columns it has (C,), ascending."""
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


def _polished(part_MC: Tensor, start_KC: Tensor) -> tuple[DiagonalShard, DiagonalState]:
    shard = DiagonalShard(part_MC)
    options = SolverOptions(n_components=len(start_KC), max_iterations=_TRIAL_ITERATIONS, tolerance=_TOLERANCE)
    state = initial_diagonal_state(start_KC, options)
    while diagonal_stopping_reason(state, options) is None:
        state, _ = step_diagonal([shard], state, options)
    return shard, state


def _nndsvd(part_MC: Tensor, n_components: int, generator: torch.Generator) -> Tensor:
    """Of each leading singular pair (u, v) the sign whose positive parts are larger, ‖u₊‖‖v₊‖ or ‖u₋‖‖v₋‖: its v.

    Components beyond the rank are examples.
    """
    n_leading = min(n_components, *part_MC.shape)
    probe = torch.randn(part_MC.shape[1], min(n_leading + 16, *part_MC.shape), generator=generator).to(part_MC)
    for _ in range(2):
        probe = torch.linalg.qr(part_MC.T @ (part_MC @ probe)).Q
    u_MQ, _, rotation = torch.linalg.svd(part_MC @ probe, full_matrices=False)
    u_MK, v_CK = u_MQ[:, :n_leading], (probe @ rotation.T)[:, :n_leading]
    weights = [
        torch.linalg.norm((s * u_MK).clamp(min=0), dim=0) * torch.linalg.norm((s * v_CK).clamp(min=0), dim=0)
        for s in (1, -1)
    ]
    signs_K = torch.where(weights[0] >= weights[1], 1.0, -1.0).to(part_MC)
    start_KC = (v_CK * signs_K).clamp(min=0.0).T.contiguous()
    missing = n_components - n_leading
    return start_KC if not missing else torch.cat([start_KC, _spread_examples(part_MC, missing, generator)])


def _spread_examples(part_MC: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Examples, each drawn with probability proportional to the squared sine of its angle to the nearest before it,
    times its squared length; any example when no such one is left.

    Source: Arthur & Vassilvitskii, k-means++ (SODA 2007), by what a non-negative multiple of a drawn one leaves.
    """
    squares_M = part_MC.square().sum(dim=1).double()
    left_M, drawn = squares_M.clone(), []
    for _ in range(n):
        weights_M = left_M if bool((left_M > 0).any()) else squares_M
        drawn.append(int(torch.multinomial(weights_M.cpu(), 1, generator=generator)))
        row_C = part_MC[drawn[-1]]
        length = float(torch.linalg.norm(row_C))
        along_M = (part_MC @ (row_C / length)).double()
        left_M = torch.minimum(left_M, (squares_M - along_M.square()).clamp(min=0.0))
        left_M[drawn[-1]] = 0.0
    return part_MC[drawn].clone()
