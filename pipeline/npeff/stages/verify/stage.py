"""The stage `verify`: effects of steps along each direction, compared with controls."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from npeff.execution.executor import Executor
from npeff.runs.definition import Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import open_stage, unit_checksums
from npeff.stages.inputs import direction_checksums, fingerprint_of, lifted_components, prediction_batch_size
from npeff.stages.verify import VERIFY
from npeff.stages.verify.worker import VerificationOptions, VerificationPaths, VerificationWorker
from npeff.stages.worker_specs import executor_for, model_spec, worker_spec
from npeff.statistics.verdict import scoreboard, verdicts
from npeff.storage.location import absolute_location
from npeff.store.tables import read_table, rows_to_columns, write_table


def verify(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Move the model along each direction and compare the effect with controls.

    Args:
        run: the run.
        executor: executor for the work. A new one is created if None.
        progress: display for the progress. No progress is shown if None.

    Returns:
        The record of the stage.

    Raises:
        NpeffError: the stage cannot be completed. The message is one line with the cause and the remedy.
    """
    with open_stage(run, VERIFY) as stage:
        components, results = lifted_components(run), run.partial_results("verify")
        if stage.done and set(components) <= set(stage.done.get("components", range(stage.done["n_components"]))):
            return stage.done
        progress, config, wanted = progress or SilentProgress(), run.config, run.config.verification
        stage.discard_foreign_units(progress)
        verified = {
            component: read_table(path, "verification").to_pylist() for component, path in finished(results).items()
        }
        origin = config.resolved("verification.ablation_origin")
        paths = VerificationPaths(
            run.factorization, run.directions, run.table("examples"), results, direction_checksums(run), stage.lineage
        )
        worker = worker_spec(
            run,
            VerificationWorker,
            model=model_spec(run, fingerprint_of(run)),
            paths=paths,
            options=VerificationOptions(
                n_top=wanted.top_examples,
                n_baseline=wanted.baseline_examples,
                target_kl=wanted.target_kl,
                epsilon=wanted.epsilon,
                n_selectivity=wanted.selectivity_examples,
                n_correlation=wanted.correlation_examples,
                seed=config.seed,
                batch_size=prediction_batch_size(run),
                lifted=components,
                semi_orthogonal=wanted.orthogonalize == "semi",
                ablation=wanted.ablation,
                origin=None if origin is None else absolute_location(Path(origin)),
            ),
        )
        missing = [component for component in components if component not in verified]
        with (
            progress.stage("verify", len(components), "components", done=len(verified)) as tick,
            executor_for(run, executor) as workers,
        ):
            for component, rows in workers.map(worker, "verify", missing, keep_going=True):
                verified[component] = rows
                tick(len(verified))
        rows = [row for component in sorted(verified) for row in verified[component]]
        write_table(run.table("verification"), "verification", rows_to_columns(rows, "verification"), stage.lineage)
        parts = [read_table(paths.selectivity_file(component), "selectivity") for component in sorted(verified)]
        write_table(run.table("selectivity"), "selectivity", pa.concat_tables(parts), stage.lineage)
        if wanted.ablation:
            parts = [read_table(paths.ablation_file(component), "ablation") for component in sorted(verified)]
            write_table(run.table("ablation"), "ablation", pa.concat_tables(parts), stage.lineage)
        scores = [asdict(score) for score in scoreboard(verdicts(rows))]
        summary = {"n_components": len(verified), "components": sorted(verified), "scores": scores}
        return stage.complete(summary | {"units": unit_checksums(run, VERIFY, sorted(verified))})
