"""Models that a task trains itself, once for each run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn


def train_once(file: Path, train: Callable[[], nn.Module]) -> None:
    """Train a model and write its weights to a file, unless the file exists. An interruption leaves no file."""
    if not file.exists():
        temporary = file.with_suffix(".partial")
        save_file(train().state_dict(), temporary)
        os.replace(temporary, file)


def with_weights(model: nn.Module, file: Path) -> nn.Module:
    """Load the weights that `train_once` has written into a model. Returns the model."""
    model.load_state_dict(load_file(file))
    return model
