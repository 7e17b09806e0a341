"""The errors of training."""

from __future__ import annotations

from npeff.errors import NpeffError


class TrainingError(NpeffError):
    """An optimizer or a penalty cannot be used with these options, parameters or Fishers."""
