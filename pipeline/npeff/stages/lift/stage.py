"""The stage `lift`: directions of the components in parameter space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npeff.directions import Whitening, unit_sketches, whitening
from npeff.execution.executor import Executor, WorkerSpec
from npeff.models.loaded import ModelSpec
from npeff.options.kinds import is_diagonal
from npeff.runs.definition import Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, ProgressDisplay, display
from npeff.runs.stage import open_stage
from npeff.stages.earlier_results import checksums_of, fingerprint_of, lifted_components
from npeff.stages.lift import LIFT
from npeff.stages.lift.files import Combinations, LiftBlock, LiftPaths
from npeff.stages.lift.memory import fitting_directions
from npeff.stages.lift.worker import LiftWorker
from npeff.stages.worker_specs import fitted_examples, model_executor_for, model_spec, worker_spec
from npeff.storage.atomic import is_committed, remove_directory
from npeff.storage.checksums import read_json
from npeff.storage.errors import StoreError
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.lineage import group_lineage
from npeff.store.shard_records import ShardChecksums
from npeff.store.tables import read_table, rows_to_columns, table_lineage, write_table


def lift(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Lift the components from the sketch to directions in parameter space.

    Args:
        run: the run, its configuration, or the path of its directory or run file.
        executor: executor for the work. A new one is created if None.
        progress: display for the progress; see `npeff.runs.progress.display`.

    Returns:
        The record of the stage.

    Raises:
        NpeffError: the stage cannot be completed. The message is one line with the cause and the remedy.
    """
    run, progress = as_run(run), display(progress)
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
        fitting = fitting_directions(config, sum(math.prod(shape) for shape in shapes.values()))
        model = model_spec(run, fingerprint_of(run))  # raises before anything is written if there is no model
        results = run.partial_results("lift")
        _prepare_store(run, shapes, fishers["dim"], stage.lineage, progress)
        stage.discard_foreign_units(progress)
        lifted = {component: read_json(path) for component, path in finished(results).items()}
        damping = config.lift.damping if config.lift.direction == "whitened" else None
        if any(fact.get("polished") for fact in lifted.values()) and not set(chosen) <= set(lifted):
            lifted = {}  # a polished direction depends on the former directions of all components
            remove_directory(results)
        paths = LiftPaths(run.factorization, run.directions, results)
        worker = _worker(run, paths, model, checksums, damping, stage.lineage)
        with model_executor_for(run, executor) as workers:
            work = _Work(
                map=partial(workers.map, worker, keep_going=True),
                workers=workers.workers,
                n_shards=len(checksums),
                fitting=fitting,
                paths=paths,
                lifted=lifted,
                progress=progress,
            )
            without_polishing = not is_diagonal(config.factorization.kind) and not config.lift.polish_steps
            if without_polishing and not set(chosen) <= set(lifted):
                work.combine(damping)
            work.lift(chosen)
            work.polish(config.lift.polish_steps, whiten=damping is not None)
        for folder in (paths.sums, paths.scores):
            remove_directory(folder)
        _write_tables(run, lifted, stage.lineage)
        return stage.complete(_summary(lifted) | {"direction": config.lift.direction})


def _worker(
    run: RunDirectory,
    paths: LiftPaths,
    model: ModelSpec,
    checksums: dict[int, ShardChecksums],
    damping: float | None,
    lineage: str | None,
) -> WorkerSpec:
    config = run.config
    return worker_spec(
        run,
        LiftWorker,
        kind=config.factorization.kind if is_diagonal(config.factorization.kind) else "fishers",
        damping=damping,
        polished=bool(config.lift.polish_steps),
        lineage=lineage,
        model=model,
        labels=config.fishers.label_spec(config.seed),
        examples=fitted_examples(run),
        paths=paths,
        checksums=checksums,
        batch_size=FisherStore.read_attributes(run.fishers)["batch_size"],
    )


def _summary(lifted: dict[int, dict[str, Any]]) -> Summary:
    own = [fact["cosine_own"] for fact in lifted.values() if "cosine_own" in fact]  # not of earlier versions
    return {
        "n_components": len(lifted),
        "components": sorted(lifted),
        "median_cosine": float(np.median([fact["cosine"] for fact in lifted.values()])),
        "median_cosine_own": float(np.median(own)) if own else None,
        "units": {f"{component:05d}": fact["checksum"] for component, fact in lifted.items() if "checksum" in fact},
    }


def _prepare_store(
    run: RunDirectory, shapes: dict[str, tuple[int, ...]], dim: int, lineage: str | None, progress: ProgressDisplay
) -> None:
    """Create the store of directions, or restore its metadata. Directions that are already lifted are kept, unless they
    were made from other components or with other settings."""
    layout: dict[str, Any] = {
        "n_components": run.config.factorization.n_components,
        "shapes": shapes,
        "attrs": {"direction": run.config.lift.direction} | ({} if lineage is None else {"lineage": lineage}),
        "dtype": run.config.lift.dtype,
        "sketch_dim": dim,
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


def _write_tables(run: RunDirectory, lifted: dict[int, dict[str, Any]], lineage: str | None) -> None:
    """Write the energies of the directions, and their cosines to the table of components."""
    energy = [
        {"component": component, "parameter": name, "energy": fraction}
        for component, fact in sorted(lifted.items())
        for name, fraction in fact["energy"].items()
    ]
    columns = {
        column: [lifted.get(component, {}).get(fact) for component in range(run.config.factorization.n_components)]
        for column, fact in (("lift_cosine", "cosine"), ("cosine_own", "cosine_own"))
    }
    table = run.table("components")
    components = read_table(table, "components").to_pydict() | columns
    write_table(run.table("layer_energy"), "layer_energy", rows_to_columns(energy, "layer_energy"), lineage)
    write_table(table, "components", components, table_lineage(table))


_GROUPS = 64
"""Number of groups of shards whose sums are added up before the lift. It does not depend on the workers, so neither
does the rounding."""


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

    def combine(self, damping: float | None) -> None:
        """Compute the combinations of the components' sums, unless they are stored. Own directions without damping."""
        if is_committed(self.paths.combinations):
            return
        groups = [tuple(group.tolist()) for group in np.array_split(range(self.n_shards), min(_GROUPS, self.n_shards))]
        with self.progress.stage("sketch directions", len(groups) * (1 if damping is None else 2), "passes") as tick:
            done = 0

            def total(method: str, *argument: Tensor) -> Tensor:
                nonlocal done
                found = {}
                for (group, *_), part in self.map(method, [(group, *argument) for group in groups]):
                    found[group] = part
                    tick(done := done + 1)
                return torch.stack([found[group] for group in groups]).sum(0)

            sketches_KD, inverse_lengths_K = unit_sketches(total("sketch_sums"))
            if damping is None:
                used_K = (inverse_lengths_K > 0).double()
                found = Whitening(used_K.diag(), used_K)
            else:
                found = whitening(sketches_KD @ sketches_KD.T, total("product_sums", sketches_KD), damping)
        combinations = Combinations(found, inverse_lengths_K, found.combinations_KK @ sketches_KD)
        combinations.write(self.paths.combinations)

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

    def polish(self, steps: int, whiten: bool) -> None:
        """Take the remaining polishing steps, and whiten the polished directions.

        After a crash, a step resumes with the components that are not yet scored or polished.
        """
        components = sorted(self.lifted)
        taken = sum(fact.get("polished", 0) + (whiten and fact.get("whitened", False)) for fact in self.lifted.values())
        done, total = 2 * taken, 2 * (steps + whiten) * len(components)
        if not steps or done == total:
            return
        with self.progress.stage("polish", total, "passes of directions", done=done) as tick:

            def passes(method: str, step: int, left: list[int]) -> None:
                nonlocal done
                for (_, block), facts in self.map(
                    method, [(step, each) for each in self._cut(left, self._share(left))]
                ):
                    self.lifted |= dict(zip(block, facts or (), strict=False))
                    tick(done := done + len(block))

            def score(step: int, left: list[int]) -> None:
                nonlocal done
                unscored = [each for each in left if not self.paths.scores_file(step, each).exists()]
                done += len(left) - len(unscored)
                passes("score", step, unscored)

            for step in range(1, steps + 1):
                if left := [each for each in components if self.lifted[each].get("polished", 0) < step]:
                    score(step, left)
                    passes("polish", step, left)
                if not whiten or step < steps:  # whitening repeats the last step
                    remove_directory(self.paths.scores_file(step, 0).parent)
            left = [each for each in components if not self.lifted[each].get("whitened")] if whiten else []
            if len(left) == len(components):  # before a direction is replaced by its whitened direction
                score(steps + 1, left)
            passes("whiten", steps, left)

    def _share(self, components: list[int]) -> int:
        """Return the number of components of a block: limited by memory, and small enough to give all workers one."""
        return max(1, min(self.fitting, math.ceil(len(components) / self.workers)))

    @staticmethod
    def _cut(components: list[int], size: int) -> list[tuple[int, ...]]:
        return [tuple(components[first : first + size]) for first in range(0, len(components), size)]
