"""Fisher information while a model is trained: an optimizer and a penalty, for any training loop in torch."""

from __future__ import annotations

from npeff.training.errors import TrainingError
from npeff.training.ewc import EWC
from npeff.training.fadam import FAdam

__all__ = ["EWC", "FAdam", "TrainingError"]
