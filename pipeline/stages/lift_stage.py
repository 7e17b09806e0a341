"""Stage 3: the components, of the sketch, into directions of parameter space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
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

_Block = tuple[int, ...]


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
        if any(fact.get("polished") for fact in lifted.values()) and not set(chosen) <= set(lifted):
            lifted = {}  # a polished direction rests on all as they were before
            remove_directory(results)
        missing = [component for component in chosen if component not in lifted]
        total = len(lifted) + len(missing)
        kind, paths = config.factorization.kind, LiftPaths(run.factorization, run.directions, results)
        worker = worker_spec(
            run,
            LiftWorker if kind == "fishers" else DiagonalLiftWorker,
            **({} if kind == "fishers" else {"kind": kind}),
            model=model,
            labels=label_spec(config),
            sketch=sketch_spec(config),
            examples=fitted_examples(run),
            paths=paths,
            checksums=checksums_of(run),
            batch_size=FisherStore.open(run.fishers).attrs["batch_size"],
        )
        with executor_for(run, executor) as workers:
            blocks_of = partial(_blocks, run, n_parameters, workers.workers)
            with progress.stage("lift", total, "directions", done=len(lifted)) as tick:
                for block, facts in workers.map(worker, "lift", blocks_of(missing), keep_going=True):
                    lifted |= dict(zip(block, facts, strict=True))
                    tick(len(lifted))
            _polish(
                config.lift.polish_steps,
                partial(workers.map, worker, keep_going=True),
                blocks_of,
                paths,
                lifted,
                progress,
            )
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


def _polish(
    steps: int,
    map_blocks: Callable[[str, list[tuple[int, _Block]]], Iterable[tuple[tuple[int, _Block], Any]]],
    blocks_of: Callable[[list[int]], list[_Block]],
    paths: LiftPaths,
    lifted: dict[int, dict[str, Any]],
    progress: ProgressDisplay,
) -> None:
    """Further steps, of which each has two passes; brings `lifted`, what is known of every direction, up to date.

    After a crash a step goes on from the components that it has scored, and then from those that it has made.
    """
    components = sorted(lifted)
    done = 2 * sum(fact.get("polished", 0) for fact in lifted.values())
    with progress.stage("polish", 2 * steps * len(components), "passes of directions", done=done) as tick:
        for step in range(1, steps + 1):
            left = [component for component in components if lifted[component].get("polished", 0) < step]
            if not left:
                continue
            unscored = [component for component in left if not paths.scores_file(step, component).exists()]
            for (_, block), _ in map_blocks("score", [(step, block) for block in blocks_of(unscored)]):
                tick(done := done + len(block))
            for (_, block), facts in map_blocks("polish", [(step, block) for block in blocks_of(left)]):
                lifted |= dict(zip(block, facts, strict=True))
                tick(done := done + len(block))
            remove_directory(paths.scores_file(step, 0).parent)


def _blocks(run: RunDirectory, n_parameters: int, workers: int, missing: list[int]) -> list[_Block]:
    """Components to lift in one pass: as many as the memory limit allows, yet a share for every worker."""
    # of diagonals, their own sums beside those of gradients
    direction_bytes = (4 if run.config.factorization.kind == "fishers" else 8) * n_parameters
    fitting = max(1, run.config.lift.memory_limit_mb * 2**20 // direction_bytes)
    size = max(1, min(fitting, math.ceil(len(missing) / workers)))
    return [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]
