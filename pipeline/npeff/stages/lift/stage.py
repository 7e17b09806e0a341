"""The stage `lift`: directions of the components in parameter space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from npeff.execution.executor import Executor
from npeff.options.kinds import is_diagonal
from npeff.runs.config import RunConfig
from npeff.runs.definition import Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import open_stage
from npeff.stages.inputs import checksums_of, fingerprint_of, lifted_components
from npeff.stages.lift import LIFT
from npeff.stages.lift.worker import LiftBlock, LiftPaths, LiftWorker
from npeff.stages.worker_specs import executor_for, fitted_examples, model_spec, worker_spec
from npeff.storage.atomic import is_committed, remove_directory
from npeff.storage.checksums import read_json
from npeff.storage.errors import StoreError
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.lineage import group_lineage
from npeff.store.tables import read_table, rows_to_columns, table_lineage, write_table


def lift(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Lift the components from the sketch to directions in parameter space.

    Args:
        run: the run.
        executor: executor for the work. A new one is created if None.
        progress: display for the progress. No progress is shown if None.

    Returns:
        The record of the stage.

    Raises:
        NpeffError: the stage cannot be completed. The message is one line with the cause and the remedy.
    """
    with open_stage(run, LIFT) as stage:
        config, n_components = run.config, run.config.factorization.n_components
        chosen = list(config.lift.components or range(n_components))
        if chosen[-1] >= n_components:
            raise RunDirectoryError(
                f"{run.path} has no component {chosen[-1]}: choose lift.components from 0 to {n_components - 1}"
            )
        if stage.done and set(chosen) <= set(lifted_components(run)):
            return stage.done
        fishers, checksums = FisherStore.read_attributes(run.fishers), checksums_of(run)
        layout = fishers["parameter_layout"]
        shapes = {name: tuple(shape) for name, shape in zip(layout["names"], layout["shapes"], strict=True)}
        model = model_spec(run, fingerprint_of(run))  # raises before anything is written if there is no model
        results, progress = run.partial_results("lift"), progress or SilentProgress()
        _prepare_store(run, shapes, stage.lineage, progress)
        stage.discard_foreign_units(progress)
        lifted = {component: read_json(path) for component, path in finished(results).items()}
        if any(fact.get("polished") for fact in lifted.values()) and not set(chosen) <= set(lifted):
            lifted = {}  # a polished direction depends on the former directions of all components
            remove_directory(results)
        paths = LiftPaths(run.factorization, run.directions, results)
        worker = worker_spec(
            run,
            LiftWorker,
            kind=config.factorization.kind if is_diagonal(config.factorization.kind) else "fishers",
            lineage=stage.lineage,
            model=model,
            labels=config.fishers.label_spec(config.seed),
            sketch=config.fishers.sketch,
            seed=config.seed,
            examples=fitted_examples(run),
            paths=paths,
            checksums=checksums,
            batch_size=fishers["batch_size"],
        )
        with executor_for(run, executor) as workers:
            work = _Work(
                map=partial(workers.map, worker, keep_going=True),
                workers=workers.workers,
                n_shards=len(checksums),
                fitting=_fitting(config, sum(math.prod(shape) for shape in shapes.values())),
                paths=paths,
                lifted=lifted,
                progress=progress,
            )
            work.lift(chosen)
            work.polish(config.lift.polish_steps)
        for folder in (paths.sums, paths.scores):
            remove_directory(folder)
        median = _write_tables(run, lifted, stage.lineage)
        summary = {"n_components": len(lifted), "components": sorted(lifted), "median_cosine": median}
        units = {f"{component:05d}": fact["checksum"] for component, fact in lifted.items() if "checksum" in fact}
        return stage.complete(summary | {"units": units})


def _prepare_store(
    run: RunDirectory, shapes: dict[str, tuple[int, ...]], lineage: str | None, progress: ProgressDisplay
) -> None:
    """Create the store of directions, or restore its metadata. Directions that are already lifted are kept, unless they
    were made from other components or with other settings."""
    layout: dict[str, Any] = {
        "n_components": run.config.factorization.n_components,
        "shapes": shapes,
        "attrs": {} if lineage is None else {"lineage": lineage},
        "dtype": run.config.lift.dtype,
    }
    if _is_foreign(run, lineage):
        progress.say("the directions were made from other components or with other settings; computing them again")
        remove_directory(run.directions)
    if not is_committed(run.directions):
        run.reopen("lift")  # or a crash would leave a complete stage with an empty store
        remove_directory(run.partial_results("lift"))  # remains of a deleted store
        DirectionStore.create(run.directions, **layout)
        return
    try:
        DirectionStore.open(run.directions)
    except StoreError:  # the user deleted damaged files of the store
        DirectionStore.restore(run.directions, **layout)


def _is_foreign(run: RunDirectory, lineage: str | None) -> bool:
    try:
        return (
            is_committed(run.directions)
            and lineage is not None
            and group_lineage(run.directions) not in (None, lineage)
        )
    except StoreError:  # the metadata are damaged or were deleted
        return False


def _write_tables(run: RunDirectory, lifted: dict[int, dict[str, Any]], lineage: str | None) -> float:
    """Write the energies of the directions and their cosines to the components. Returns the median cosine."""
    energy = [
        {"component": component, "parameter": name, "energy": fraction}
        for component, fact in sorted(lifted.items())
        for name, fraction in fact["energy"].items()
    ]
    cosines = {component: fact["cosine"] for component, fact in lifted.items()}
    column = [cosines.get(component) for component in range(run.config.factorization.n_components)]
    table = run.table("components")
    components = read_table(table, "components").to_pydict() | {"lift_cosine": column}
    write_table(run.table("layer_energy"), "layer_energy", rows_to_columns(energy, "layer_energy"), lineage)
    write_table(table, "components", components, table_lineage(table))
    return float(np.median(list(cosines.values())))


def _fitting(config: RunConfig, n_parameters: int) -> int:
    """Return the number of components whose sums fit a worker's memory limit."""
    fitting = config.lift.memory_limit_mb * 2**20 // (4 * n_parameters)
    if is_diagonal(config.factorization.kind):
        fitting = (fitting - 1) // 2  # diagonals and gradients of the components, and the sum of all diagonals
    return max(1, fitting)


@dataclass
class _Work:
    """The remaining work of the lift, distributed over the workers."""

    map: Callable[[str, list[Any]], Iterable[tuple[Any, Any]]]
    """Calls a method of the workers for each item. Yields pairs of an item and its result in order of completion."""
    workers: int
    n_shards: int
    fitting: int
    paths: LiftPaths
    lifted: dict[int, dict[str, Any]]
    """Facts of every finished direction, by component. The methods update it."""
    progress: ProgressDisplay

    def lift(self, chosen: list[int]) -> None:
        """Compute the missing directions of the chosen components."""
        missing = [component for component in chosen if component not in self.lifted]
        parts = min(self.workers // math.ceil(len(chosen) / self.fitting), self.n_shards) if missing else 1
        if parts > 1:
            blocks = self._blocks_in_parts(chosen, missing, parts)
            pieces = [replace(block, part=part) for block in blocks for part in range(parts)]
            with self.progress.stage("lift", len(pieces), "parts of the examples") as tick:
                for done, _ in enumerate(self.map("add_up", pieces), 1):
                    tick(done)
        total = len(self.lifted) + len(missing)
        with self.progress.stage("lift", total, "directions", done=len(self.lifted)) as tick:
            if parts > 1:
                singly = [(block, each) for block in blocks for each in block.components if each in missing]
                for (_, component), facts in self.map("finish", singly):
                    self.lifted[component] = facts
                    tick(len(self.lifted))
                return
            blocks = [LiftBlock(components) for components in self._cut(missing, self._share(missing))]
            for block, found in self.map("lift", blocks):
                self.lifted |= dict(zip(block.components, found, strict=True))
                tick(len(self.lifted))

    def _blocks_in_parts(self, chosen: list[int], missing: list[int], parts: int) -> list[LiftBlock]:
        """Return blocks of the missing components.

        Blocks with complete sums from before a crash are reused. Sums of other blocks, for example with another number
        of workers, are deleted.
        """
        there = {path.name for path in self.paths.sums.glob("*.f32")}
        blocks = [LiftBlock(components, parts=parts) for components in self._cut(chosen, self.fitting)]
        blocks = [
            block for block in blocks if self._sums_of(block) <= there and not set(block.components).isdisjoint(missing)
        ]
        taken = {component for block in blocks for component in block.components}
        left = [component for component in missing if component not in taken]
        blocks += [LiftBlock(components, parts=parts) for components in self._cut(left, self.fitting)]
        for name in there.difference(*map(self._sums_of, blocks)):
            (self.paths.sums / name).unlink()
        return blocks

    def _sums_of(self, block: LiftBlock) -> set[str]:
        return {self.paths.sums_file(replace(block, part=part)).name for part in range(block.parts)}

    def polish(self, steps: int) -> None:
        """Take the remaining polishing steps. After a crash, a step resumes with the components that are not yet
        scored or polished."""
        components = sorted(self.lifted)
        done = 2 * sum(fact.get("polished", 0) for fact in self.lifted.values())
        if done == (total := 2 * steps * len(components)):
            return
        with self.progress.stage("polish", total, "passes of directions", done=done) as tick:
            for step in range(1, steps + 1):
                left = [component for component in components if self.lifted[component].get("polished", 0) < step]
                if not left:
                    continue
                unscored = [each for each in left if not self.paths.scores_file(step, each).exists()]
                done += len(left) - len(unscored)
                for method, those in (("score", unscored), ("polish", left)):
                    blocks = self._cut(those, self._share(those))
                    for (_, block), facts in self.map(method, [(step, block) for block in blocks]):
                        self.lifted |= dict(zip(block, facts or (), strict=False))
                        tick(done := done + len(block))
                remove_directory(self.paths.scores_file(step, 0).parent)

    def _share(self, components: list[int]) -> int:
        """Return the number of components of a block: limited by memory, and small enough to give all workers one."""
        return max(1, min(self.fitting, math.ceil(len(components) / self.workers)))

    @staticmethod
    def _cut(components: list[int], size: int) -> list[tuple[int, ...]]:
        return [tuple(components[first : first + size]) for first in range(0, len(components), size)]
