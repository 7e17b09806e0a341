"""A run with a mean diagonal Fisher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import npeff
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory


def prepared(path: Path, seed: int = 0, **fishers: Any) -> RunDirectory:
    document = {
        "run_dir": str(path),
        "task": {"name": "tiny_task:TinyTask", "options": {"seed": seed}},
        "fishers": {"sketch": {"kind": "identity"}, "diagonal": {"mean": True}, **fishers},
        "factorization": {"n_components": 2},
        "executor": {"kind": "serial"},
    }
    run = RunDirectory.create(RunConfig.model_validate(document))
    npeff.compute_fishers(run)
    return run
