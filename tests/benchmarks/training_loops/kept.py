"""Results of single trainings in files, from which an interrupted benchmark continues."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np


def kept(folder: Path, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array of this name in the folder, which is computed and written where it is missing."""
    path = folder / f"{re.sub(r'[^0-9A-Za-z.]+', '-', name)}.npy"
    if path.exists():
        found: np.ndarray = np.load(path, allow_pickle=False)
        return found
    found = compute()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as stream:
        np.save(stream, found)
    partial.replace(path)
    return found
