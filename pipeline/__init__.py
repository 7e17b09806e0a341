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
    from pipeline.config import RunConfig
    from pipeline.factorization.diagonal_estimator import DiagonalNPEFF
    from pipeline.factorization.estimator import NPEFF
    from pipeline.query import ComponentStore
    from pipeline.run_directory import RunDirectory
    from pipeline.stages import (
        attribute,
        check,
        compute_fishers,
        factorize,
        lift,
        repair,
        report,
        run,
        select,
        transform,
        verify,
    )
    from pipeline.tasks import Examples, Task

_HOMES = {
    "RunConfig": "pipeline.config",
    "RunDirectory": "pipeline.run_directory",
    "DiagonalNPEFF": "pipeline.factorization.diagonal_estimator",
    "NPEFF": "pipeline.factorization.estimator",
    "ComponentStore": "pipeline.query",
    "Task": "pipeline.tasks",
    "Examples": "pipeline.tasks",
    **dict.fromkeys(
        (
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
        ),
        "pipeline.stages",
    ),
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
