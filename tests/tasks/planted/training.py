"""What tasks with models of their own have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from npeff.tasks import Task


def check_trained_once(make: Callable[[], Task], tmp_path: Path) -> None:
    """The model is trained once, and the same way every time."""
    weights = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        made = make()
        made.prepare(folder)
        (stored,) = folder.iterdir()
        stamp = stored.stat().st_mtime_ns
        made.prepare(folder)
        assert stored.stat().st_mtime_ns == stamp
        weights.append(made.model(folder).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
