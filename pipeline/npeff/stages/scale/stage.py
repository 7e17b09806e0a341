"""The stage `scale`: the perceptual scale of the model, as the length of paths between examples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npeff.execution.executor import Executor, WorkerSpec
from npeff.runs.config_input_sections import ScaleConfig
from npeff.runs.definition import Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, display
from npeff.runs.stage import Stage, forget_other_requests, is_request, open_stage, record_of, unit_checksums, unit_files
from npeff.stages.earlier_results import (
    direction_checksums,
    fingerprint_of,
    lifted_components,
    prediction_batch_size,
)
from npeff.stages.lift import LIFT
from npeff.stages.scale import SCALE, headline
from npeff.stages.scale.plan import PAIRS_OF_COMPONENT, Block, Ends, PlannedPath, Request
from npeff.stages.scale.worker import ScaleOptions, ScalePaths, ScaleWorker
from npeff.stages.worker_specs import model_executor_for, model_spec, worker_spec
from npeff.storage.checksums import json_checksum, read_json, write_json_atomically
from npeff.store.component_store import open_factorization
from npeff.store.tables import read_table, read_tables, write_table
from npeff.variables import for_hash, resolved
from npeff.verification import top_examples

_PATHS_OF_BLOCK = 4
"""Paths of one item. The number is fixed, so that results do not depend on the number of workers."""
_MOST_AT_ONCE = 64
_PLAN = "plan.json"


def scale(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Compute the Fisher-Rao length and the scale of paths between examples.

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
    with open_stage(run, SCALE) as stage:
        results, wanted = run.partial_results("scale"), _wanted(run)
        request = _request(run, stage, wanted)
        if stage.done and stage.done["request"] == request:
            return stage.done
        asked = _wanted_paths(run, wanted)
        with model_executor_for(run, executor) as workers:
            worker = _worker(run, wanted, stage.lineage)
            plan = _plan(results, request, asked, workers, worker)
            run.reopen("scale")  # from here on, nothing that was asked for is refused
            forget_other_requests(results, request)
            write_json_atomically(results / _PLAN, plan)
            stage.discard_foreign_units(progress)
            blocks = _blocks([(component, start, end) for component, start, end in plan["ends"]])
            done = finished(results)
            missing = [block for block in blocks if block.number not in done]
            n_paths = sum(len(block.paths) for block in blocks)
            n_done = n_paths - sum(len(block.paths) for block in missing)
            with progress.stage("scale", n_paths, "paths", done=n_done) as tick:
                for block, _ in workers.map(worker, "measure", missing, keep_going=True):
                    n_done += len(block.paths)
                    tick(n_done)
        numbers = [block.number for block in blocks]
        tables = {name: _joined(run, name, numbers) for name in SCALE.tables}
        for name, table in tables.items():
            write_table(run.table(name), name, table, stage.lineage)
        units = unit_checksums(run, SCALE, numbers)
        summary = {
            "request": request,
            "settings": _settings(run),
            "n_blocks": len(blocks),
            **_summary(tables["paths"]),
            "texts": plan["texts"],
            "units": units,
        }
        progress.say(f"scale: {headline(summary)}")
        if summary["texts"]:
            progress.say("scale: points between embedded tokens are no texts, so the paths lead through unknown inputs")
        return stage.complete(summary)


def _settings(run: RunDirectory) -> dict[str, Any]:
    """Return the settings for the record. They may be options of the command, and contain names of variables."""
    return run.config.scale_or_default.model_dump(mode="json")


def _wanted(run: RunDirectory) -> ScaleConfig:
    """Return the settings of the command, with the values of environment variables."""
    wanted = run.config.scale_or_default
    texts = {name: resolved(getattr(wanted, name), f"scale.{name}") for name in ("pairs", "along")}
    return wanted.model_copy(update=texts)


def _request(run: RunDirectory, stage: Stage, wanted: ScaleConfig) -> str:
    """Return a hash of the settings and the results that the paths depend on."""
    facts: list[Any] = [for_hash(_settings(run)), run.config.seed, stage.lineage]
    if wanted.components:
        facts.append(record_of(run, LIFT).get("lineage"))
        facts.append(open_factorization(run.factorization).attrs["checksums"])
    return json_checksum({"facts": facts})


def _worker(run: RunDirectory, wanted: ScaleConfig, lineage: str | None) -> WorkerSpec:
    checksums = direction_checksums(run) if wanted.components else {}
    at_once = max(1, min(_MOST_AT_ONCE, prediction_batch_size(run) // 2))  # a pass with derivatives is twice as large
    return worker_spec(
        run,
        ScaleWorker,
        model=model_spec(run, fingerprint_of(run)),
        paths=ScalePaths(run.partial_results("scale"), run.directions, checksums, lineage),
        options=ScaleOptions(wanted.points, wanted.tolerance, wanted.space, wanted.along, at_once),
    )


def _plan(results: Path, request: str, asked: Request, workers: Executor, worker: WorkerSpec) -> dict[str, Any]:
    """Return the ends of all paths, which a worker chooses once, and whether they lead from texts to texts."""
    file = results / _PLAN
    if file.exists() and is_request(results, request):
        planned: dict[str, Any] = read_json(file)
        return planned
    ((_, (ends, texts)),) = workers.map(worker, "plan", [asked])
    return {"ends": [list(each) for each in ends], "texts": texts}


def _wanted_paths(run: RunDirectory, wanted: ScaleConfig) -> Request:
    examples = read_table(run.table("examples"), "examples", ["id", "prediction", "valid"])
    valid_N = examples["valid"].to_numpy()
    if not valid_N.any():
        raise RunDirectoryError(f"no example of {run.path} has finite logits and gradients: check the examples")
    pairs: tuple[tuple[int, int], ...] | int
    if isinstance(wanted.pairs, int):
        pairs = wanted.pairs
    else:
        numbers = _Numbers(run, examples)
        pairs = tuple((numbers.of(first), numbers.of(second)) for first, second in wanted.pairs)
        if same := [first for first, second in pairs if first == second]:
            raise RunDirectoryError(f"scale.pairs has a pair with example {same[0]} twice: give two different examples")
    return Request(
        seed=run.config.seed,
        predictions=examples["prediction"].to_pylist(),
        candidates=np.flatnonzero(valid_N).tolist(),
        pairs=pairs,
        along=wanted.along,
        tops=_tops(run, wanted.components, valid_N),
    )


class _Numbers:
    """The numbers of examples by their ids."""

    def __init__(self, run: RunDirectory, examples: pa.Table) -> None:
        self._run, self._ids, self._valid_N = run, examples["id"], examples["valid"].to_numpy()

    def of(self, example: str) -> int:
        """Return the number of the example with this id or, if there is none, of this number."""
        found: list[int] = np.flatnonzero(pc.equal(self._ids, example).to_numpy()).tolist()
        if not found and example.isdecimal() and int(example) < len(self._valid_N):
            found = [int(example)]
        if not found:
            raise RunDirectoryError(
                f"scale.pairs: there is no example {example!r} in {self._run.path}: give ids, or numbers below "
                f"{len(self._valid_N)}"
            )
        if len(found) > 1:
            raise RunDirectoryError(f"scale.pairs: {len(found)} examples have the id {example!r}: give their numbers")
        if not self._valid_N[found[0]]:
            raise RunDirectoryError(f"scale.pairs: example {example!r} has logits that are not finite: choose another")
        return found[0]


def _tops(run: RunDirectory, components: Sequence[int], valid_N: np.ndarray) -> dict[int, list[int]]:
    """Return the examples with the largest coefficients of each component."""
    if not components:
        return {}
    lifted, n_components = lifted_components(run), run.config.factorization.n_components
    for component in components:
        if component >= n_components:
            raise RunDirectoryError(f"{run.path} has no component {component}: choose one of 0 to {n_components - 1}")
        if component not in lifted:
            raise RunDirectoryError(
                f"component {component} is not lifted: run `npeff lift {run.argument} -c {component}` first"
            )
    coefficients_NK = open_factorization(run.factorization).read_coefficients()
    return {
        component: top_examples(coefficients_NK[:, component], valid_N, PAIRS_OF_COMPONENT).tolist()
        for component in components
    }


def _blocks(ends: Sequence[Ends]) -> list[Block]:
    """Divide paths into blocks with the same component, or none."""
    paths = [PlannedPath(number, *each) for number, each in enumerate(ends)]
    parts = [
        group[start : start + _PATHS_OF_BLOCK]
        for group in (list(group) for _, group in groupby(paths, lambda path: path.component))
        for start in range(0, len(group), _PATHS_OF_BLOCK)
    ]
    return [Block(number, tuple(part)) for number, part in enumerate(parts)]


def _joined(run: RunDirectory, table: str, blocks: Sequence[int]) -> pa.Table:
    return read_tables((unit_files(run, SCALE, block)[table] for block in blocks), table)


def _summary(paths: pa.Table) -> Summary:
    """Return the fields of the record that describe the results."""
    rows = [row for row in paths.to_pylist() if row["space"] == "model"]
    plain = [row for row in rows if row["component"] is None]
    found: Summary = {"n_paths": len(rows)}
    for name in ("length", "efficiency", "half_at"):
        values = [row[name] for row in plain if row[name] is not None]
        found[f"median_{name}"] = float(np.median(values)) if values else None
    found["n_tolerance_missed"] = sum(not row["tolerance_met"] for row in rows)
    found["n_not_finite"] = sum(row["length"] is None for row in rows)
    matching = [row["matching"] for row in paths.to_pylist() if row["matching"] is not None]
    found["median_matching"] = float(np.median(matching)) if matching else None
    return found
