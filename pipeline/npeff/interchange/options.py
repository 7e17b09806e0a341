"""Options of the import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npeff.runs.config_reading import ConfigError

MOST_COUNTED = np.iinfo(np.uint16).max
"""Largest value of ``min_nonzero``."""


@dataclass(frozen=True)
class ImportOptions:
    """Options for the conversion of a file to a run."""

    n_components: int = 32
    """Number of components of the later factorization. An imported decomposition has its own number."""
    max_dim: int = 65_536
    """Largest number of parameters with values that are not hashed. Each is then a coordinate."""
    dim: int = 4096
    """Number of coordinates after hashing."""
    min_nonzero: int = 1
    """Parameters with fewer values in the whole file are dropped."""
    held_out_fraction: float = 1 / 3
    """Fraction of the examples to hold out of the fit. Not used for an imported decomposition."""
    seed: int = 0
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    class_names: Sequence[str] = ()
    """Names of the classes, which the files do not contain. The default is "class 0", ..."""

    def __post_init__(self) -> None:
        sizes = ("n_components", "max_dim", "dim", "min_nonzero")
        if wrong := [f"{name} = {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]:
            raise ConfigError(f"{', '.join(wrong)} must be at least 1")
        if self.min_nonzero > MOST_COUNTED:
            raise ConfigError(f"min_nonzero = {self.min_nonzero} must be at most {MOST_COUNTED}")
        if not 0 <= self.held_out_fraction < 1:
            raise ConfigError(f"held_out_fraction = {self.held_out_fraction} must be at least 0 and below 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed} must be at least 0 and below 2**63")
