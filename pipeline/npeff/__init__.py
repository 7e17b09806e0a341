"""NPEFF: factorize the per-example Fishers of a trained model, and verify what the components claim.

    import npeff

    run = npeff.run(npeff.RunConfig.from_yaml("jobs/quickstart.yaml"))
    npeff.ComponentStore.open(run.path).top_examples(component=0)

Names are loaded when they are first used, so that importing the package imports neither ray nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npeff.factorization.diagonals.estimator import DiagonalNPEFF
    from npeff.factorization.estimator import NPEFF
    from npeff.query.components import ComponentStore
    from npeff.runs.config import RunConfig
    from npeff.runs.directory import RunDirectory
    from npeff.stages.attribute.stage import attribute
    from npeff.stages.check.stage import check
    from npeff.stages.factorize.stage import factorize
    from npeff.stages.fishers.stage import compute_fishers
    from npeff.stages.lift.stage import lift
    from npeff.stages.pipeline import report, run
    from npeff.stages.repair.stage import repair
    from npeff.stages.select.stage import select
    from npeff.stages.transform.stage import transform
    from npeff.stages.verify.stage import verify
    from npeff.tasks import Examples, Task

_HOMES = {
    "RunConfig": "npeff.runs.config",
    "RunDirectory": "npeff.runs.directory",
    "DiagonalNPEFF": "npeff.factorization.diagonals.estimator",
    "NPEFF": "npeff.factorization.estimator",
    "ComponentStore": "npeff.query.components",
    "Task": "npeff.tasks",
    "Examples": "npeff.tasks",
    "compute_fishers": "npeff.stages.fishers.stage",
    "report": "npeff.stages.pipeline",
    "run": "npeff.stages.pipeline",
    **{
        name: f"npeff.stages.{name}.stage"
        for name in ("attribute", "check", "factorize", "lift", "repair", "select", "transform", "verify")
    },
}

__all__ = [
    "NPEFF",
    "ComponentStore",
    "DiagonalNPEFF",
    "Examples",
    "RunConfig",
    "RunDirectory",
    "Task",
    "attribute",
    "check",
    "compute_fishers",
    "factorize",
    "lift",
    "repair",
    "report",
    "run",
    "select",
    "transform",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
