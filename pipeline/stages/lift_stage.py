"""Stage 3: the components, of the sketch, into directions of parameter space."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.progress import ProgressDisplay, SilentProgress
from pipeline.result_tables import (
    rows_to_columns,
)
from pipeline.run_directory import RunDirectory, RunDirectoryError
from pipeline.runtime.diagonal_lift_actor import DiagonalLiftWorker
from pipeline.runtime.executor import Executor
from pipeline.runtime.lift_actor import LiftPaths, LiftWorker
from pipeline.stage import (
    Summary,
    checksums_of,
    executor_for,
    fingerprint_of,
    finished,
    fitted_examples,
    label_spec,
    lifted_components,
    model_spec,
    open_stage,
    sketch_spec,
    worker_spec,
)
from pipeline.store import (
    DirectionStore,
    FisherStore,
    StoreError,
    is_committed,
    read_json,
    read_table,
    remove_directory,
    write_table,
)


def lift(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Lift the components from the sketch to directions in parameter space."""
    with open_stage(run, "lift", after="factorize") as stage:
        config, n_components = run.config, run.config.factorization.n_components
        chosen = list(config.lift.components or range(n_components))
        if chosen[-1] >= n_components:
            raise RunDirectoryError(
                f"{run.path} has components 0 to {n_components - 1}, no {chosen[-1]}: correct lift.components"
            )
        if stage.done and set(chosen) <= set(lifted_components(run)):
            return stage.done
        progress = progress or SilentProgress()
        layout = FisherStore.open(run.fishers).attrs["parameter_layout"]
        shapes = {name: tuple(shape) for name, shape in zip(layout["names"], layout["shapes"], strict=True)}
        n_parameters = sum(math.prod(shape) for shape in shapes.values())
        store_layout: dict[str, Any] = {
            "n_components": n_components,
            "shapes": shapes,
            "attrs": {},
            "dtype": config.lift.dtype,
        }
        model = model_spec(run, fingerprint_of(run))  # refused before anything is written where there is none
        results = run.partial_results("lift")
        if not is_committed(run.directions):
            run.reopen("lift")  # or a crash would leave a complete stage with an empty store
            remove_directory(results)  # of directions that somebody deleted
            DirectionStore.create(run.directions, **store_layout)
        try:
            DirectionStore.open(run.directions)
        except StoreError:  # of which somebody deleted what was damaged
            DirectionStore.restore(run.directions, **store_layout)
        lifted = {component: read_json(path) for component, path in finished(results).items()}
        missing = [component for component in chosen if component not in lifted]
        total = len(lifted) + len(missing)
        kind = config.factorization.kind
        worker = worker_spec(
            run,
            LiftWorker if kind == "fishers" else DiagonalLiftWorker,
            **({} if kind == "fishers" else {"kind": kind}),
            model=model,
            labels=label_spec(config),
            sketch=sketch_spec(config),
            examples=fitted_examples(run),
            paths=LiftPaths(run.factorization, run.directions, results),
            checksums=checksums_of(run),
            batch_size=FisherStore.open(run.fishers).attrs["batch_size"],
        )
        with (
            progress.stage("lift", total, "directions", done=len(lifted)) as tick,
            executor_for(run, executor) as workers,
        ):
            blocks = _blocks(run, missing, n_parameters, workers.workers)
            for block, facts in workers.map(worker, "lift", blocks, keep_going=True):
                lifted |= dict(zip(block, facts, strict=True))
                tick(len(lifted))
        facts = [lifted[component] for component in sorted(lifted)]
        energy = [
            {"component": fact["component"], "parameter": name, "energy": share}
            for fact in facts
            for name, share in fact["energy"].items()
        ]
        cosines = {fact["component"]: fact["cosine"] for fact in facts}
        column = [cosines.get(component) for component in range(n_components)]
        components = read_table(run.table("components"), "components").to_pydict() | {"lift_cosine": column}
        write_table(run.table("layer_energy"), "layer_energy", rows_to_columns(energy, "layer_energy"))
        write_table(run.table("components"), "components", components)
        median = float(np.median(list(cosines.values())))
        return stage.complete({"n_components": len(lifted), "components": sorted(lifted), "median_cosine": median})


def _blocks(run: RunDirectory, missing: list[int], n_parameters: int, workers: int) -> list[tuple[int, ...]]:
    """Components to lift in one pass: as many as the memory limit allows, yet a share for every worker."""
    # of diagonals, their own sums beside those of gradients
    direction_bytes = (4 if run.config.factorization.kind == "fishers" else 8) * n_parameters
    fitting = max(1, run.config.lift.memory_limit_mb * 2**20 // direction_bytes)
    size = max(1, min(fitting, math.ceil(len(missing) / workers)))
    return [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]
