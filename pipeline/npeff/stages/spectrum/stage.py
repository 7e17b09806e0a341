"""The stage `spectrum`: the eigenvalues of the mean Fisher, from the stored Fishers alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npeff.execution.executor import Executor, WorkerSpec, result_of
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, ProgressDisplay, display
from npeff.runs.stage import forget_other_requests, open_stage, record_of
from npeff.stages.earlier_results import checksums_of, verified_diagonal
from npeff.stages.fishers import FISHERS
from npeff.stages.spectrum import SPECTRUM, headline
from npeff.stages.spectrum.group_sums import GroupFiles
from npeff.stages.spectrum.plan import ALL, N_GROUPS, SETS, SpectrumPlan
from npeff.stages.spectrum.tables import Found, statistics_rows, write_tables
from npeff.stages.spectrum.worker import SpectrumWorker
from npeff.stages.worker_specs import device_of, executor_for, worker_spec
from npeff.storage.atomic import remove_directory
from npeff.storage.checksums import json_checksum
from npeff.store.diagonal_store import read_traces
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table


def spectrum(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Compute the eigenvalues of the mean Fisher and their statistics. The model is not needed.

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
    with open_stage(run, SPECTRUM) as stage:
        if stage.done:
            return stage.done
        folder = run.partial_results("spectrum")
        checksums, attributes = checksums_of(run), FisherStore.read_attributes(run.fishers)
        diagonal = verified_diagonal(run) if run.config.fishers.diagonal.mean else None
        n_parameters = int(record_of(run, FISHERS)["n_parameters"])
        plan = _plan(run, attributes["dim"], attributes["rank"], attributes["shard_size"], len(checksums))
        signature = json_checksum({"shards": {str(shard): each for shard, each in checksums.items()}})
        forget_other_requests(folder, signature)
        files = GroupFiles(folder, signature, plan.dim)
        worker = worker_spec(
            run,
            SpectrumWorker,
            fishers=run.fishers,
            checksums=checksums,
            plan=plan,
            files=files,
            device=device_of(run.config),
        )
        with executor_for(run, executor) as workers:
            _add_up(workers, worker, plan, files, progress)
            totals = result_of(workers, worker, "totals", None)
            sums = _eigenvalues(workers, worker, plan, progress)
        found = Found(sums, totals, plan, n_parameters, attributes["labels"]["kind"])
        traces = {} if diagonal is None else read_traces(diagonal)
        rows = statistics_rows(found, traces)
        write_tables(run, found, rows, stage.lineage)
        remove_directory(folder)
        values = {row["name"]: row["value"] for row in rows if row["n_examples"] == plan.n_examples}
        summary = {
            "n_examples": plan.n_examples,
            "n_parameters": n_parameters,
            "n_rows": plan.n_rows,
            "computed_from": plan.kind,
            "not_computed": _not_computed(plan),
            "directions_90": None if values["directions_90"] is None else int(values["directions_90"]),
            "effective_rank": values["effective_rank"],
        }
        progress.say(f"spectrum: {headline(summary)}")
        return stage.complete(summary)


def _plan(run: RunDirectory, dim: int, rank: int, shard_size: int, n_shards: int) -> SpectrumPlan:
    examples = read_table(run.shared_table("examples"), "examples", ["valid", "fisher_norm", "fisher_rank"])
    valid = examples.filter(examples["valid"])
    largest = float(np.max(valid["fisher_norm"].to_numpy(), initial=0.0))
    return SpectrumPlan(
        n_examples=len(valid),
        n_rows=int(valid["fisher_rank"].to_numpy().sum()),
        dim=dim,
        scale=largest if largest > 0 else 1.0,
        n_shards=n_shards,
        rows_per_shard=min(shard_size, len(examples)) * rank,
    )


def _not_computed(plan: SpectrumPlan) -> str | None:
    if plan.kind != "traces":
        return None
    return (
        f"no eigenvalues: {plan.n_rows:,} rows in {plan.dim:,} dimensions are too many; use a fishers.sketch of fewer "
        "dimensions in a new run_dir"
    )


def _add_up(
    workers: Executor, worker: WorkerSpec, plan: SpectrumPlan, files: GroupFiles, progress: ProgressDisplay
) -> None:
    """Add the missing parts of each group. The parts of a group are added one after another."""
    n_parts = [len(plan.parts(group)) for group in range(N_GROUPS)]
    n_added = [files.n_parts(group) for group in range(N_GROUPS)]
    done = sum(n_added)
    with progress.stage("spectrum", sum(n_parts), "sums", done=done) as tick:
        for part in range(max(n_parts)):
            missing = [(group, part) for group in range(N_GROUPS) if n_added[group] <= part < n_parts[group]]
            for _ in workers.map(worker, "add", missing) if missing else ():
                done += 1
                tick(done)


def _eigenvalues(
    workers: Executor, worker: WorkerSpec, plan: SpectrumPlan, progress: ProgressDisplay
) -> dict[tuple[int, ...], NDArray[np.float64]]:
    """Return the eigenvalues of the sums over all groups and over each set; none if they are not computed."""
    if plan.kind == "traces" or plan.n_examples == 0:
        return {}
    found = {}
    with progress.stage("eigenvalues", 1 + len(SETS), "matrices") as tick:
        for chosen, eigenvalues_D in workers.map(worker, "eigenvalues", [ALL, *SETS]):
            found[chosen] = eigenvalues_D
            tick(len(found))
    return found
