"""The stage `inputs`: the Fisher information of the inputs of some examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.execution.executor import Executor, WorkerSpec, result_of
from npeff.input_fisher.moments import Moments, merged
from npeff.runs.config_input_sections import InputsConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.definition import Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import Stage, forget_other_requests, open_stage, unit_checksums, unit_files
from npeff.stages.earlier_results import fingerprint_of
from npeff.stages.inputs import INPUTS
from npeff.stages.inputs.covariance import EVERY, InputFacts, is_current, refuse_covariance, write_covariances
from npeff.stages.inputs.examples import ChosenExamples
from npeff.stages.inputs.scores import mean_scores
from npeff.stages.inputs.worker import TABLES, InputPaths, InputWorker
from npeff.stages.worker_specs import model_executor_for, model_spec, worker_spec
from npeff.storage.checksums import json_checksum
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table, read_tables, rows_to_columns, write_table

_BLOCK, _TESTED_BLOCK = 16, 4
"""Examples of a block, which one call of a worker computes, and tested examples of a block. A test takes thousands of
passes, and a call must end within ``executor.timeout_s``."""
_SMALL_MODEL, _LARGER = 1_000_000, 4
"""For models with at most so many parameters, blocks are larger by this factor."""


def inputs(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Compute the Fisher information of the inputs of some examples, split over their positions.

    Args:
        run: the run.
        executor: executor for the work. A new one is created if None.
        progress: display for the progress. No progress is shown if None.

    Returns:
        The record of the stage.

    Raises:
        NpeffError: the stage cannot be completed. The message is one line with the cause and the remedy.
    """
    with open_stage(run, INPUTS) as stage:
        options = run.config.inputs_or_default
        chosen = ChosenExamples.of(run, options)
        facts_of_request = {"examples": chosen.explained, "tested": chosen.tested, "lineage": stage.lineage}
        request = json_checksum(facts_of_request | {"settings": INPUTS.settings(run.config), "seed": run.config.seed})
        if stage.done and stage.done["request"] == request:
            return stage.done
        progress, results = progress or SilentProgress(), run.partial_results("inputs")
        run.reopen("inputs")
        forget_other_requests(results, request)
        stage.discard_foreign_units(progress)
        explained, worker = chosen.explained, _worker(run, stage, options, chosen)
        with model_executor_for(run, executor) as workers:
            facts, lengths = _inspect(workers, worker, options, explained)
            covariances = _covariances(run, options, chosen)
            refuse_covariance(options, facts, len(covariances))
            if not is_current(run.input_covariance, covariances, stage.lineage):
                moments = _moments(workers, worker, chosen.fitted, facts.n_parts(options, len(covariances)), progress)
                write_covariances(run.input_covariance, moments, options, facts, covariances, stage.lineage)
            factor = _LARGER if facts.n_parameters <= _SMALL_MODEL else 1
            blocks, done = chosen.blocks(factor * _BLOCK, factor * _TESTED_BLOCK, lengths), finished(results)
            missing = [block for block in blocks if block.number not in done]
            n_done = len(blocks) - len(missing)
            with progress.stage("inputs", len(blocks), "blocks of examples", done=n_done) as tick:
                for _ in workers.map(worker, "compute", missing, keep_going=True):
                    n_done += 1
                    tick(n_done)
        tables = _write_tables(run, stage, len(blocks))
        found = tables["inputs"]["information"].drop_null().to_numpy()
        _say_what_is_left_out(tables, len(found), progress)
        summary = {
            "request": request,
            "n_examples": len(explained),
            "n_invalid": len(explained) - len(found),
            "n_blocks": len(blocks),
            **{key: getattr(options, key) for key in ("label", "covariance", "scope", "spread", "split", "ridge")},
            "median_information": float(np.median(found)) if len(found) else None,
            "units": unit_checksums(run, INPUTS, range(len(blocks))),
        }
        return stage.complete(summary)


def _say_what_is_left_out(tables: Mapping[str, pa.Table], n_finite: int, progress: ProgressDisplay) -> None:
    """Name the numbers of examples without information, and without positions."""
    n_explained = len(tables["inputs"])
    if n_invalid := n_explained - n_finite:
        progress.say(f"{n_invalid} of {n_explained} examples have non-finite logits or gradients and are left out")
    if n_without := n_finite - pc.count_distinct(tables["input_shares"]["example"]).as_py():
        progress.say(f"{n_without} of {n_explained} examples have no positions that are inputs")


def _worker(run: RunDirectory, stage: Stage, options: InputsConfig, chosen: ChosenExamples) -> WorkerSpec:
    labels = run.config.fishers.label_spec(run.config.seed)
    if options.label == "all" and labels.kind == "empirical":
        raise ConfigError(
            "inputs.label: all needs the label rows of a Fisher, and this run has fishers.labels: empirical: set "
            "inputs.label to prediction"
        )
    attributes = FisherStore.read_attributes(run.fishers)
    batch_size = int(attributes["batch_size"])
    return worker_spec(
        run,
        InputWorker,
        model=model_spec(run, fingerprint_of(run)),
        labels=labels,
        options=options,
        seed=run.config.seed,
        batch_size=batch_size,
        rows_per_pass=batch_size * max(1, int(attributes["rank"]) // 2),
        paths=InputPaths(run.input_covariance, run.partial_results("inputs"), stage.lineage),
        tested=chosen.tested,
        donors=chosen.donors,
    )


def _inspect(
    workers: Executor, worker: WorkerSpec, options: InputsConfig, explained: Sequence[int]
) -> tuple[InputFacts, list[int] | None]:
    """Return facts about the inputs and the lengths of the explained examples, after the checks that need no others."""
    facts: InputFacts
    facts, lengths = result_of(workers, worker, "inspect", tuple(explained))
    if facts.several_predictions and options.label != "all":
        raise ConfigError(
            f"inputs.label: {options.label} explains one prediction, and the examples of this task have several: set "
            "inputs.label to all"
        )
    if facts.several_predictions and options.faithfulness.examples:
        raise ConfigError(
            "inputs.faithfulness tests the attributions of one prediction, and the examples of this task have several: "
            "set inputs.faithfulness.examples to 0"
        )
    return facts, lengths


def _covariances(run: RunDirectory, options: InputsConfig, chosen: ChosenExamples) -> dict[int, str]:
    """Return the number of each covariance, and the name of its class."""
    if options.scope == "all":
        return {EVERY: ""}
    classes = read_table(run.table("classes"), "classes")
    names = dict(zip(classes["class"].to_pylist(), classes["name"].to_pylist(), strict=True))
    return {number: names.get(number, str(number)) for number in sorted(chosen.labels.unique().to_pylist())}


def _moments(
    workers: Executor, worker: WorkerSpec, fitted: NDArray[np.int64], n_parts: int, progress: ProgressDisplay
) -> dict[int, Moments]:
    """Return the moments of the inputs of the fitted examples, by the number of the covariance.

    The parts do not depend on the workers, and are merged in order.
    """
    parts = [tuple(part.tolist()) for part in np.array_split(fitted, min(n_parts, len(fitted)))]
    found: dict[tuple[int, ...], dict[int, Moments]] = {}
    n_left_out = 0
    with progress.stage("covariance", len(parts), "parts") as tick:
        for part, (moments, n_not_finite) in workers.map(worker, "moments", parts):
            found[part] = moments
            n_left_out += n_not_finite
            tick(len(found))
    if n_left_out:
        progress.say(f"{n_left_out} examples with inputs that are not finite are left out of the covariance")
    in_order = [found[part] for part in parts]
    numbers = {number for moments in in_order for number in moments}
    return {number: merged(each[number] for each in in_order if number in each) for number in numbers}


def _write_tables(run: RunDirectory, stage: Stage, n_blocks: int) -> dict[str, pa.Table]:
    """Write the tables of the stage from the results of the blocks, and return them."""
    files = [unit_files(run, INPUTS, block) for block in range(n_blocks)]
    tables = {}
    for name in TABLES:
        whole = read_tables((each[name] for each in files), name)
        tables[name] = whole.take(pc.array_sort_indices(whole["example"]))  # a stable sort
        write_table(run.table(name), name, tables[name], stage.lineage)
    means = mean_scores(tables["faithfulness_scores"], run.config.seed)
    write_table(run.table("faithfulness"), "faithfulness", rows_to_columns(means, "faithfulness"), stage.lineage)
    return tables
