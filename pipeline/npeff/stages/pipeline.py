"""The whole pipeline: each stage takes a run directory, goes on from what is in it, and leaves it one stage further.

    compute_fishers   model, examples        → fishers.zarr, shards/, tables/examples, tables/classes, …
    factorize         fishers.zarr           → factorization.zarr, tables/components, coefficients, history, …
    lift              fishers, factorization → directions.zarr, tables/layer_energy
    verify            directions, model      → tables/verification
    attribute         directions, model      → tables/position_shares: the tokens where a direction acts
    report            tables                 → report/index.html

and, beside them, before the factorization is paid for:

    select            fishers.zarr           → tables/selection: how many components there should be

and, after the lift, where labels are known:

    repair            directions, model      → tables/repair, repair/model.safetensors: wrong predictions, mended

and, at any time:

    check             everything             → what of it is damaged; makes that again

A stage that is complete returns what it recorded. All may be called again after any crash.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from npeff.query.components import ComponentStore
from npeff.reports.report import write_report
from npeff.reports.serve import serve
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import ProgressDisplay
from npeff.runs.stage import record_of, recorded
from npeff.stages.attribute.stage import attribute
from npeff.stages.check.stage import check
from npeff.stages.factorize.stage import factorize
from npeff.stages.fishers.stage import compute_fishers
from npeff.stages.inputs import lifted_components
from npeff.stages.lift.stage import lift
from npeff.stages.repair.stage import repair
from npeff.stages.select.stage import select
from npeff.stages.transform.stage import transform
from npeff.stages.verify.stage import verify
from npeff.stages.worker_specs import executor_for
from npeff.store.direction_store import DirectionStore

__all__ = [
    "STAGES",
    "attribute",
    "check",
    "compute_fishers",
    "export_direction",
    "factorize",
    "lift",
    "open_components",
    "repair",
    "report",
    "run",
    "select",
    "serve_report",
    "transform",
    "verify",
]


def run(config: RunConfig | RunDirectory, *, progress: ProgressDisplay | None = None) -> RunDirectory:
    """Every stage in order, going on from whatever is there already."""
    directory = config if isinstance(config, RunDirectory) else RunDirectory.create(config)
    stages = {
        "fishers": compute_fishers,
        "factorize": factorize,
        "lift": lift,
        "verify": verify,
        "attribute": attribute,
    }
    if progress is not None:
        progress.say(f"run {directory.path}")
    unfinished = any(recorded(directory, name) is None for name in stages)
    with directory.lock():
        # Workers are started once for all stages, and not at all where there is nothing to do.
        with executor_for(directory, None) if unfinished else nullcontext() as executor:
            for stage in stages.values():
                stage(directory, executor=executor, progress=progress)
        report(directory, progress=progress)
    return directory


def report(run: RunDirectory, *, progress: ProgressDisplay | None = None) -> Path:
    """Write the report, one HTML file, from whatever is there."""
    with run.lock():
        return write_report(run.path, top_examples=run.config.report.top_examples)


def serve_report(run: RunDirectory, port: int, say: Callable[[str], None]) -> None:
    """The report and a view to ask the component store in, on this machine only, until Ctrl-C; it only reads."""
    serve(run.path, port, run.config.report.top_examples, say)


def export_direction(run: RunDirectory, component: int, file: str | Path) -> None:
    """Write a component's unit direction as a safetensors file under the parameters' names."""
    record_of(run, "lift")
    directions = DirectionStore.open(run.directions)
    if component >= directions.n_components:
        raise RunDirectoryError(f"{run.path} has components 0 to {directions.n_components - 1}, no {component}")
    if component not in lifted_components(run):
        raise RunDirectoryError(
            f"component {component} is not lifted: run `npeff lift {run.path} -c {component}` first"
        )
    directions.export(component, file)


def open_components(run_dir: str | Path) -> ComponentStore:
    """A run's component store, to ask; it only reads."""
    return ComponentStore.open(run_dir)


STAGES: dict[str, Callable[..., object]] = {
    "fishers": compute_fishers,
    "factorize": factorize,
    "lift": lift,
    "verify": verify,
    "attribute": attribute,
    "report": report,
}
