"""Small batches in float64: tables with a joint covariance, and texts of different lengths."""

from __future__ import annotations

import torch
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import CovarianceKind, Moments
from npeff.input_fisher.noise import InputNoise, factor_covariance
from torch import Tensor

N_CLASSES = 3
N_FEATURES = 2


def _weights(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(rows: list[int], n_positions: int = 5) -> FlatInputs:
    """Some rows of a table whose entries are correlated, and a network of them."""
    size = n_positions * N_FEATURES
    values = _weights(40, size, 0) @ (torch.eye(size, dtype=torch.float64) + 0.4 * _weights(size, size, 1))
    first, second = _weights(size, 6, 2) / 2, _weights(6, N_CLASSES, 3)

    def logits(values_BPF: Tensor) -> Tensor:
        return (values_BPF.flatten(1) @ first).tanh() @ second

    values_BPF = values.view(40, n_positions, N_FEATURES)[rows]
    return FlatInputs(values_BPF, logits, torch.ones(values_BPF.shape[:2], dtype=torch.bool))


def texts(rows: list[int], padded_to: int = 6) -> FlatInputs:
    """Some of 12 texts with 1 to 5 positions, and a network that is bound to the batch, since it ignores padding."""
    lengths = [1 + row % 5 for row in rows]
    values_BPF = torch.full((len(rows), padded_to, N_FEATURES), 7.0, dtype=torch.float64)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        values_BPF[place, :length] = 0.5 + _weights(length, N_FEATURES, 10 + row)
    used_BP = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    first, second = _weights(N_FEATURES, 6, 4), _weights(6, N_CLASSES, 5)
    places_P1 = torch.linspace(1, 2, 20, dtype=torch.float64)[:padded_to, None]

    def logits(values_BPF: Tensor) -> Tensor:
        hidden_BP6 = (values_BPF @ first * places_P1).tanh()
        return (hidden_BP6 * used_BP[..., None]).sum(1) @ second

    return FlatInputs(values_BPF, logits, used_BP, exchangeable=True)


def noise(inputs: FlatInputs, kind: CovarianceKind = "full", spread: float = 0.5) -> InputNoise:
    moments = Moments.of(inputs, kind)
    return InputNoise(moments.mean_PF, factor_covariance(moments, kind, 1e-3), spread)
