"""The stage `verify`: effects of steps along each direction, compared with controls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from npeff.execution.executor import Executor
from npeff.runs.config_reading import ConfigError
from npeff.runs.definition import Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, ProgressDisplay, display
from npeff.runs.stage import open_stage, unit_checksums
from npeff.stages.earlier_results import direction_checksums, fingerprint_of, lifted_components, prediction_batch_size
from npeff.stages.factorize.live_history import write_summary
from npeff.stages.verify import VERIFY
from npeff.stages.verify.options import VerificationOptions, VerificationPaths
from npeff.stages.verify.worker import VerificationWorker
from npeff.stages.worker_specs import model_executor_for, model_spec, worker_spec
from npeff.statistics.joint_ablation import joint_ablations, summary
from npeff.statistics.verdict import Scores, scoreboard, verdicts
from npeff.storage.atomic import is_committed
from npeff.storage.location import absolute_location
from npeff.store.component_store import open_factorization
from npeff.store.tables import read_table, read_tables, rows_to_columns, write_table

_LARGE_ERROR = 1.0
"""Median relative error of predicted effects above which a line tells it."""


def verify(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Move the model along each direction and compare the effect with controls.

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
    with open_stage(run, VERIFY) as stage:
        components, results = lifted_components(run), run.partial_results("verify")
        if stage.done and set(components) <= set(stage.done.get("components", range(stage.done["n_components"]))):
            return stage.done
        if run.config.verification.by == "evidence" and open_factorization(run.factorization).evidence is None:
            problem = "verification.by: evidence needs stored evidence, which this factorization does not have"
            raise RunDirectoryError(problem, "use by: coefficient, or a factorization of Fishers in the sketch")
        stage.discard_foreign_units(progress)
        paths = VerificationPaths.of(run, results, checksums=direction_checksums(run), lineage=stage.lineage)
        options = _options(run, components)
        verified = _verified(paths, options)
        worker = worker_spec(
            run,
            VerificationWorker,
            model=model_spec(run, fingerprint_of(run)),
            paths=paths,
            options=options,
        )
        missing = [component for component in components if component not in verified]
        with (
            progress.stage("verify", len(components), "components", done=len(verified)) as tick,
            model_executor_for(run, executor) as workers,
        ):
            for component, rows in workers.map(worker, "verify", missing, keep_going=True):
                verified[component] = rows
                tick(len(verified))
        rows = [row for component in sorted(verified) for row in verified[component]]
        write_table(run.table("verification"), "verification", rows_to_columns(rows, "verification"), stage.lineage)
        joined = {table: _join(run, table, paths, sorted(verified), stage.lineage) for table in options.joined_tables}
        scores = scoreboard(verdicts(rows))
        for score in scores:
            if score.failure is not None:
                progress.say(f"warning: the components fail the verification: {score.failure}")
        errors = _prediction_errors(rows, joined["selectivity"].to_pylist())
        _tell_large_errors(errors, progress)
        facts = {
            "n_components": len(verified),
            "components": sorted(verified),
            "scores": [score.to_json() for score in scores],
            **_passes(rows, len(verified)),
            **errors,
            **_joint_ablation(joined.get("joint_ablation"), rows),
        }
        done = stage.complete(facts | {"units": unit_checksums(run, VERIFY, sorted(verified))})
        _write_scores(run, scores, progress)
        return done


def _tell_large_errors(errors: Summary, progress: ProgressDisplay) -> None:
    if (largest := max(errors.values(), default=0.0)) > _LARGE_ERROR:
        progress.say(
            f"verify: the effects on other examples, which are predicted, have a median relative error of "
            f"{largest:.0%} where they were measured: verification.exact: true measures all of them"
        )


def _write_scores(run: RunDirectory, scores: Sequence[Scores], progress: ProgressDisplay) -> None:
    """Add the scores to the run of ``factorization.metrics``. The verification is complete without it."""
    numbers = {
        f"verify/{score.examples}/{name}": value
        for score in scores
        for name in ("median_kl_ratio", "share_above_controls", "share_surely_above_controls")
        if (value := getattr(score, name)) is not None and math.isfinite(value)
    }
    try:
        write_summary(run.metrics, run.config.factorization.metrics, f"{run.path.name}/{run.name}", numbers)
    except ConfigError as error:
        progress.say(f"warning: the scores are not logged: {error}")


def _options(run: RunDirectory, components: list[int]) -> VerificationOptions:
    config, wanted = run.config, run.config.verification
    origin = config.resolved("verification.ablation_origin")
    return VerificationOptions(
        n_top=wanted.top_examples,
        n_baseline=wanted.baseline_examples,
        target_kl=wanted.target_kl,
        epsilon=wanted.epsilon,
        n_selectivity=wanted.selectivity_examples,
        n_correlation=wanted.correlation_examples,
        seed=config.seed,
        batch_size=prediction_batch_size(run),
        exact=wanted.exact,
        lifted=components,
        semi_orthogonal=wanted.orthogonalize == "semi",
        by_evidence=wanted.by == "evidence",
        ablation=wanted.ablation,
        joint_ablation=wanted.joint_ablation,
        origin=None if origin is None else absolute_location(Path(origin)),
    )


def _join(
    run: RunDirectory, table: str, paths: VerificationPaths, components: list[int], lineage: str | None
) -> pa.Table:
    """Write a table of all components from the files of the components. Returns the table."""
    joined = read_tables((paths.file(table, component) for component in components), table)
    write_table(run.table(table), table, joined, lineage)
    return joined


def _verified(paths: VerificationPaths, options: VerificationOptions) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of the finished components. Those of an earlier version, which measured something else or less,
    do not count."""
    complete = [
        component
        for component in finished(paths.results)
        if all(is_committed(paths.file(table, component)) for table in options.joined_tables)
    ]
    stored = {each: read_table(paths.file("verification", each), "verification").to_pylist() for each in complete}
    return {each: rows for each, rows in stored.items() if all(row["informative"] is not None for row in rows)}


def _passes(rows: list[dict[str, Any]], n_components: int) -> Summary:
    """Return the number of examples that were passed through the model, as a fact of the record."""
    total = sum(row["examples_passed"] or 0 for row in rows)
    return {"examples_passed": total, "examples_passed_per_component": round(total / max(1, n_components))}


def _joint_ablation(table: pa.Table | None, rows: list[dict[str, Any]]) -> Summary:
    """Return the summary of the table `joint_ablation`, if there is one, as a fact of the record."""
    if table is None:
        return {}
    removals = table.to_pylist()
    split = next((row["examples"] for row in removals), None)
    matched = {row["component"] for row in rows if row["matched"] and row["examples"] == split}
    return {"joint_ablation": {"examples": split, **summary(joint_ablations(removals), matched)}}


def _prediction_errors(rows: list[dict[str, Any]], selectivity: list[dict[str, Any]]) -> Summary:
    """Return the median relative errors of the predicted effects that were also measured, as facts of the record."""
    pairs = {
        "selectivity_error": [(row["kl"], row["kl_checked"]) for row in selectivity],
        "other_kl_ratio_error": [(row["other_kl_ratio"], row["other_kl_ratio_checked"]) for row in rows],
    }
    errors = {
        name: [abs(predicted / checked - 1) for predicted, checked in found if predicted is not None and checked]
        for name, found in pairs.items()
    }
    return {name: statistics.median(found) for name, found in errors.items() if found}
