"""Stage 3: the components, of the sketch, into directions of parameter space."""

from __future__ import annotations

import math
import shutil

import numpy as np

from pipeline.progress import ProgressDisplay, SilentProgress
from pipeline.result_tables import (
    rows_to_columns,
)
from pipeline.run_directory import RunDirectory
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
    model_spec,
    open_stage,
    sketch_spec,
    worker_spec,
)
from pipeline.store import (
    DirectionStore,
    FisherStore,
    StoreError,
    read_json,
    read_table,
    write_table,
)


def lift(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Lift the components from the sketch to directions in parameter space."""
    with open_stage(run, "lift", after="factorize") as stage:
        if stage.done:
            return stage.done
        progress, config = progress or SilentProgress(), run.config
        n_components = config.factorization.n_components
        layout = FisherStore.open(run.fishers).attrs["parameter_layout"]
        shapes = {name: tuple(shape) for name, shape in zip(layout["names"], layout["shapes"], strict=True)}
        n_parameters = sum(math.prod(shape) for shape in shapes.values())
        model = model_spec(run, fingerprint_of(run))  # refused before anything is written where there is none
        results = run.partial_results("lift")
        if not run.directions.exists():
            run.reopen("lift")  # or a crash would leave a complete stage with an empty store
            shutil.rmtree(results, ignore_errors=True)  # of directions that somebody deleted
            DirectionStore.create(run.directions, n_components=n_components, shapes=shapes, attrs={})
        try:
            DirectionStore.open(run.directions)
        except StoreError:  # of which somebody deleted what was damaged
            DirectionStore.restore(run.directions, n_components=n_components, shapes=shapes, attrs={})
        lifted = {component: read_json(path) for component, path in finished(results).items()}
        missing = [component for component in range(n_components) if component not in lifted]
        worker = worker_spec(
            run,
            LiftWorker,
            model=model,
            labels=label_spec(config),
            sketch=sketch_spec(config),
            examples=fitted_examples(run),
            paths=LiftPaths(run.factorization, run.directions, results),
            checksums=checksums_of(run),
            batch_size=FisherStore.open(run.fishers).attrs["batch_size"],
        )
        with (
            progress.stage("lift", n_components, "directions", done=len(lifted)) as tick,
            executor_for(run, executor) as workers,
        ):
            blocks = _blocks(run, missing, n_parameters, workers.workers)
            for block, facts in workers.map(worker, "lift", blocks, keep_going=True):
                lifted |= dict(zip(block, facts, strict=True))
                tick(len(lifted))
        facts = [lifted[component] for component in range(n_components)]
        energy = [
            {"component": fact["component"], "parameter": name, "energy": share}
            for fact in facts
            for name, share in fact["energy"].items()
        ]
        cosines = [fact["cosine"] for fact in facts]
        components = read_table(run.table("components"), "components").to_pydict() | {"lift_cosine": cosines}
        write_table(run.table("layer_energy"), "layer_energy", rows_to_columns(energy, "layer_energy"))
        write_table(run.table("components"), "components", components)
        return stage.complete({"n_components": n_components, "median_cosine": float(np.median(cosines))})


def _blocks(run: RunDirectory, missing: list[int], n_parameters: int, workers: int) -> list[tuple[int, ...]]:
    """Components to lift in one pass: as many as the memory limit allows, yet a share for every worker."""
    direction_bytes = 4 * n_parameters
    fitting = max(1, run.config.lift.memory_limit_mb * 2**20 // direction_bytes)
    size = max(1, min(fitting, math.ceil(len(missing) / workers)))
    return [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]
