"""NPEFF: factorization of the per-example Fishers of a trained model, and verification of its components.

    import npeff

    run = npeff.run("jobs/quickstart.yaml")
    npeff.ComponentStore.open(run).component(0).show()

Public names are imported on first use. ``import npeff`` imports neither torch nor Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npeff.errors import NpeffError as NpeffError
    from npeff.factorization.diagonals.estimator import DiagonalNPEFF as DiagonalNPEFF
    from npeff.factorization.estimator import NPEFF as NPEFF
    from npeff.query.component import Component as Component
    from npeff.query.components import ComponentStore as ComponentStore
    from npeff.query.factorizations import compare_factorizations as compare_factorizations
    from npeff.reports.comparison import write_comparison as write_comparison
    from npeff.runs.config import RunConfig as RunConfig
    from npeff.runs.directory import RunDirectory as RunDirectory
    from npeff.runs.migration import migrate as migrate
    from npeff.runs.removal import remove_factorization as remove_factorization
    from npeff.stages.attribute.stage import attribute as attribute
    from npeff.stages.check.stage import check as check
    from npeff.stages.compare import compare as compare
    from npeff.stages.ewc import ewc as ewc
    from npeff.stages.factorize.stage import factorize as factorize
    from npeff.stages.fishers.stage import compute_fishers as compute_fishers
    from npeff.stages.inputs.stage import inputs as inputs
    from npeff.stages.label import annotate as annotate
    from npeff.stages.lift.stage import lift as lift
    from npeff.stages.natural_gradient import natural_gradient as natural_gradient
    from npeff.stages.pipeline import report as report
    from npeff.stages.pipeline import run as run
    from npeff.stages.repair.stage import repair as repair
    from npeff.stages.scale.stage import scale as scale
    from npeff.stages.select.stage import select as select
    from npeff.stages.spectrum.stage import spectrum as spectrum
    from npeff.stages.step.stage import step as step
    from npeff.stages.transform.stage import transform as transform
    from npeff.stages.verify.stage import verify as verify
    from npeff.tasks import Examples as Examples
    from npeff.tasks import Task as Task

    __version__: str

_MODULES = {
    "Component": "npeff.query.component",
    "ComponentStore": "npeff.query.components",
    "DiagonalNPEFF": "npeff.factorization.diagonals.estimator",
    "Examples": "npeff.tasks",
    "NPEFF": "npeff.factorization.estimator",
    "NpeffError": "npeff.errors",
    "RunConfig": "npeff.runs.config",
    "RunDirectory": "npeff.runs.directory",
    "Task": "npeff.tasks",
    "annotate": "npeff.stages.label",
    "check": "npeff.stages.check.stage",
    "compare": "npeff.stages.compare",
    "compare_factorizations": "npeff.query.factorizations",
    "ewc": "npeff.stages.ewc",
    "migrate": "npeff.runs.migration",
    "natural_gradient": "npeff.stages.natural_gradient",
    "remove_factorization": "npeff.runs.removal",
    "report": "npeff.stages.pipeline",
    "run": "npeff.stages.pipeline",
    "write_comparison": "npeff.reports.comparison",
}
"""Public names and their modules, without the functions of the stages, which `npeff.stages.registry` lists."""


def _modules() -> dict[str, str]:
    from npeff.stages.registry import STAGES

    functions = (stage.function.partition(":") for stage in STAGES)
    return _MODULES | {attribute: module for module, _, attribute in functions}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("npeff-pipeline")
    except PackageNotFoundError:  # a checkout on the path, as in a job of Ray
        return "not installed"


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        return _version()
    if name.startswith("__") or (module := _modules().get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted([*_modules(), "__version__"])
