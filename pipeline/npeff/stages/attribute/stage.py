"""The stage `attribute`: the positions in its top examples where each direction acts."""

from __future__ import annotations

from npeff.execution.executor import Executor
from npeff.runs.definition import Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import forget_other_requests, open_stage, unit_checksums
from npeff.stages.attribute import ATTRIBUTE
from npeff.stages.attribute.worker import AttributionPaths, AttributionWorker
from npeff.stages.earlier_results import direction_checksums, fingerprint_of, lifted_components
from npeff.stages.worker_specs import model_executor_for, model_spec, worker_spec
from npeff.store.tables import read_table, read_tables, write_table

_TABLE = "position_shares"


def attribute(
    run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None
) -> Summary:
    """Split the evidence of the components' top examples over their tokens, if the task provides tokens.

    Args:
        run: the run.
        executor: executor for the work. A new one is created if None.
        progress: display for the progress. No progress is shown if None.

    Returns:
        The record of the stage.

    Raises:
        NpeffError: the stage cannot be completed. The message is one line with the cause and the remedy.
    """
    with open_stage(run, ATTRIBUTE) as stage:
        components, count = lifted_components(run), run.config.report.top_examples
        if stage.done and stage.done["top_examples"] == count and stage.done["components"] == components:
            return stage.done
        progress, results = progress or SilentProgress(), run.partial_results("attribute")
        forget_other_requests(results, f"{count} top examples")
        stage.discard_foreign_units(progress)
        top = read_table(run.table("top_examples"), "top_examples").select(["component", "rank", "example"])
        examples: dict[int, list[int]] = {component: [] for component in components}
        for row in top.to_pylist():
            if row["rank"] < count and row["component"] in examples:
                examples[row["component"]].append(row["example"])
        worker = worker_spec(
            run,
            AttributionWorker,
            model=model_spec(run, fingerprint_of(run)),
            labels=run.config.fishers.label_spec(run.config.seed),
            paths=AttributionPaths(run.directions, results, direction_checksums(run), stage.lineage),
            examples=examples,
        )
        done = finished(results)
        missing = [component for component in components if component not in done]
        with (
            progress.stage("attribute", len(components), "components", done=len(components) - len(missing)) as tick,
            model_executor_for(run, executor) as workers,
        ):
            n_done = len(components) - len(missing)
            for _ in workers.map(worker, "attribute", missing, keep_going=True):
                n_done += 1
                tick(n_done)
        files = finished(results)
        table = read_tables((files[component] for component in components), _TABLE)
        write_table(run.table(_TABLE), _TABLE, table, stage.lineage)
        units = unit_checksums(run, ATTRIBUTE, components)
        return stage.complete({"top_examples": count, "components": components, "n_rows": len(table), "units": units})
