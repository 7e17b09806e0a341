"""Fisher information while a model is trained: an optimizer and penalties, for any training loop in torch."""

from __future__ import annotations

from npeff.training.errors import TrainingError
from npeff.training.ewc import EWC
from npeff.training.fadam import FAdam
from npeff.training.functional_entropy import FunctionalInformation

__all__ = ["EWC", "FAdam", "FunctionalInformation", "TrainingError"]
