"""Fisher information while a model is trained: an optimizer, penalties and natural gradients, for any training loop in
torch."""

from __future__ import annotations

from npeff.training.errors import TrainingError
from npeff.training.ewc import EWC
from npeff.training.fadam import FAdam
from npeff.training.functional_entropy import FunctionalInformation
from npeff.training.kfac import KroneckerPreconditioner, KroneckerSums, kronecker_layers
from npeff.training.low_rank_penalty import LowRankFisher
from npeff.training.natural_gradient import (
    DiagonalPreconditioner,
    ExactPreconditioner,
    FisherRows,
    LowRankPreconditioner,
    Preconditioner,
)

__all__ = [
    "EWC",
    "DiagonalPreconditioner",
    "ExactPreconditioner",
    "FAdam",
    "FisherRows",
    "FunctionalInformation",
    "KroneckerPreconditioner",
    "KroneckerSums",
    "LowRankFisher",
    "LowRankPreconditioner",
    "Preconditioner",
    "TrainingError",
    "kronecker_layers",
]
