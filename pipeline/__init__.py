"""NPEFF: factorize the per-example Fishers of a trained model, and verify what the components claim.

    import pipeline as npeff

    run = npeff.run(npeff.RunConfig.from_yaml("jobs/quickstart.yaml"))
    npeff.ComponentStore.open(run.path).top_examples(component=0)

Names are loaded when they are first used, so that importing the package imports neither ray nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.factorization.diagonals.estimator import DiagonalNPEFF
    from pipeline.factorization.estimator import NPEFF
    from pipeline.query.components import ComponentStore
    from pipeline.runs.config import RunConfig
    from pipeline.runs.directory import RunDirectory
    from pipeline.stages.attribute.stage import attribute
    from pipeline.stages.check.stage import check
    from pipeline.stages.factorize.stage import factorize
    from pipeline.stages.fishers.stage import compute_fishers
    from pipeline.stages.lift.stage import lift
    from pipeline.stages.pipeline import report, run
    from pipeline.stages.repair.stage import repair
    from pipeline.stages.select.stage import select
    from pipeline.stages.transform.stage import transform
    from pipeline.stages.verify.stage import verify
    from pipeline.tasks import Examples, Task

_HOMES = {
    "RunConfig": "pipeline.runs.config",
    "RunDirectory": "pipeline.runs.directory",
    "DiagonalNPEFF": "pipeline.factorization.diagonals.estimator",
    "NPEFF": "pipeline.factorization.estimator",
    "ComponentStore": "pipeline.query.components",
    "Task": "pipeline.tasks",
    "Examples": "pipeline.tasks",
    "compute_fishers": "pipeline.stages.fishers.stage",
    "report": "pipeline.stages.pipeline",
    "run": "pipeline.stages.pipeline",
    **{
        name: f"pipeline.stages.{name}.stage"
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
