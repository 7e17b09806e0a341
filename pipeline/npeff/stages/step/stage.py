"""The stage `step`: one natural-gradient step of the model towards labels."""

from __future__ import annotations

import json
import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.execution.executor import Executor, WorkerSpec, result_of
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, ProgressDisplay, SilentProgress, display
from npeff.runs.stage import Stage, forget_other_requests, open_stage
from npeff.stages.earlier_results import checksums_of, fingerprint_of, prediction_batch_size
from npeff.stages.held_out import held_out_record, held_out_text
from npeff.stages.step import STEP
from npeff.stages.step.fisher_rows import RunRows, preconditioner
from npeff.stages.step.labels import Labelled
from npeff.stages.step.worker import Size, StepWorker
from npeff.stages.worker_specs import model_executor_for, model_spec, refuse_divided, worker_spec
from npeff.storage.atomic import remove_directory
from npeff.storage.checksums import json_checksum, read_json
from npeff.store.array_files import read_arrays, write_arrays
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import rows_to_columns, write_table
from npeff.training import ExactPreconditioner
from npeff.training.conjugate_gradients import CGState
from npeff.training.natural_gradient import Solution
from npeff.variables import for_hash
from npeff.verification import Edit, RepairCandidate, choose_step

_EXAMPLES_AT_ONCE = 1024
"""Examples of one item of the gradient. The number is fixed, so that sums do not depend on the number of workers."""


def step(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Take one damped natural-gradient step of the model towards labels, and evaluate it on held-out examples.

    The step is −η (F̄ + λI)⁻¹ g. g is the gradient of the mean loss of the labelled examples, and F̄ the mean Fisher of
    the fitted examples.

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
    refuse_divided(run.config, "step")
    with open_stage(run, STEP) as stage:
        results = run.partial_results("step")
        labelled = Labelled.of(run)
        _refuse_empirical(run)
        request = _request(run, stage, labelled)
        if stage.done and stage.done["request"] == request:
            progress.say(_outcome(stage.done))
            return stage.done
        checksums_of(run)
        run.reopen("step")
        if forget_other_requests(results, request):
            remove_directory(run.stepped)
        with model_executor_for(run, executor) as workers:
            work = _Step(run, workers, progress, labelled, stage.lineage)
            found = work.direction()
            rows = work.rows()
            chosen = next((row for row in rows if row["chosen"]), None)
            summary: Summary = {
                "request": request,
                "settings": run.config.step.model_dump(mode="json"),
                "n_labelled": len(labelled.examples_n),
                **found,
                "step": None if chosen is None else chosen["step"],
                "loss_after": None if chosen is None else chosen["loss"],
                "held_out": None,
            }
            if chosen is not None and len(labelled.held_out):
                summary["held_out"] = held_out_record(*work.call("judge", (chosen["step"], labelled.held_out)))
            if chosen is not None:
                argument = (chosen["step"], run.stepped, {"run": run.path.name, **summary})
                summary["model_checksum"] = work.call("save", argument)
        write_table(run.shared_table("step"), "step", rows_to_columns(rows, "step"), stage.lineage)
        progress.say(_outcome(summary))
        return stage.complete(summary)


class _Step:
    """The parts of a step, each of which is stored when it is finished."""

    def __init__(
        self,
        run: RunDirectory,
        workers: Executor,
        progress: ProgressDisplay,
        labelled: Labelled,
        lineage: str | None,
    ) -> None:
        self._run, self._workers, self._progress = run, workers, progress
        self._labelled, self._lineage, self._results = labelled, lineage, run.partial_results("step")

    def direction(self) -> Summary:
        """Compute the natural gradient and store it. Returns facts about it."""
        file = self._results / "direction.safetensors"
        if not file.exists():
            loss, gradient = self._gradient()
            facts: Summary = {"loss_before": loss, "iterations": None, "relative_error": None, "converged": True}
            wanted = self._run.config.step
            shown = SilentProgress() if wanted.kind == "exact" else self._progress  # it shows the iterations instead
            rows = RunRows(self._run, self._workers, self._labelled.fitted_N, shown)
            options = wanted.rank, wanted.tolerance, wanted.max_iterations
            made = preconditioner(rows, wanted.kind, wanted.damping, *options)
            if isinstance(made, ExactPreconditioner):
                solution = self._solved(made, gradient)
                direction = solution.direction
                for name in ("iterations", "relative_error", "converged"):
                    facts[name] = getattr(solution, name)
            else:
                direction = made.precondition(gradient)
            arrays = {name: values.numpy() for name, values in direction.items()}
            write_arrays(file, arrays, {"facts": json.dumps(facts)})
        facts = json.loads(read_arrays(file)[1]["facts"])
        return facts

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table `step`: the step sizes that are tried, of which at most one is chosen."""
        wanted = self._run.config.step
        given = wanted.step_size
        sizes = [Size(0, given, None)] if given else [Size(i, None, kl) for i, kl in enumerate(wanted.kl_steps)]
        trials = self._trials(sizes)
        tried = [trials[size.number] for size in sizes if trials[size.number]["step"] is not None]
        n = len(self._labelled.examples_n)
        before_n = _mask(self.call("unedited", None)["correct"], n)
        candidates = [
            RepairCandidate((Edit(0, trial["step"]),), ~before_n, _mask(trial["correct"], n)) for trial in tried
        ]
        if given:
            chosen: RepairCandidate | None = candidates[0]
        else:
            chosen = choose_step(candidates, before_n, before_n, wanted.max_harm)
        return [
            {
                "step": trial["step"],
                "kl": trial["kl"],
                "loss": trial["loss"],
                "gained": int(candidate.correct_after_N.sum()) - int(before_n.sum()),
                "broken": candidate.broken(before_n),
                "accuracy_tuning": float(candidate.correct_after_N.mean()),
                "chosen": candidate is chosen,
            }
            for trial, candidate in zip(tried, candidates, strict=True)
        ]

    def call(self, method: str, argument: object) -> Any:
        """Call a method of one worker and return the result."""
        return result_of(self._workers, self._worker, method, argument)

    def _gradient(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the mean loss of the labelled examples and its gradient."""
        examples = self._labelled.examples_n
        starts = range(0, len(examples), _EXAMPLES_AT_ONCE)
        items = [(start, tuple(examples[start : start + _EXAMPLES_AT_ONCE].tolist())) for start in starts]
        found = {}
        with self._progress.stage("gradient", len(items), "parts of the examples") as tick:
            for item, result in self._workers.map(self._worker, "gradient", items, keep_going=True):
                found[item[0]] = result
                tick(len(found))
        loss, gradient = found[0]
        for start in starts[1:]:
            loss += found[start][0]
            for name, values in found[start][1].items():
                gradient[name] += values
        if not all(bool(torch.isfinite(values).all()) for values in gradient.values()):
            raise RunDirectoryError("the gradient of the loss is not finite: check the labelled examples")
        if not any(bool(values.any()) for values in gradient.values()):
            raise RunDirectoryError(
                "the gradient of the loss is zero: the model is certain of the given labels, or the selected "
                "parameters do not change the logits"
            )
        return loss, gradient

    def _trials(self, sizes: list[Size]) -> dict[int, dict[str, Any]]:
        files = {size.number: self._results / f"trial-{size.number:03d}.json" for size in sizes}
        found = {number: read_json(file) for number, file in files.items() if file.exists()}
        missing = [size for size in sizes if size.number not in found]
        with self._progress.stage("step", len(sizes), "step sizes", done=len(found)) as tick:
            tried = self._workers.map(self._worker, "trial", missing, keep_going=True) if missing else ()
            for size, trial in tried:
                found[size.number] = trial
                tick(len(found))
        return found

    def _solved(self, made: ExactPreconditioner, gradient: dict[str, torch.Tensor]) -> Solution:
        """Return the solution of the iterations, each of which is stored."""
        state = self._stored_state()
        squared_norm = sum(float(values.double().square().sum()) for values in gradient.values())
        with self._progress.stage("iterations", 100, "% of the decrease of the error") as tick:

            def after(state: CGState) -> None:
                self._store_state(state)
                error = state.relative_error(made.damping, squared_norm)
                tick(min(99, _share(error, made.tolerance)), f"iteration {state.iteration}, error {error:.1e}")

            solution = made.solve(gradient, state, after)
            tick(100, f"{solution.iterations} iterations", last=True)
        return solution

    def _stored_state(self) -> CGState | None:
        file = self._results / "iterations.safetensors"
        if not file.exists():
            return None
        arrays, texts = read_arrays(file)
        fields: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in _VECTORS}
        return CGState(**fields, **json.loads(texts["numbers"]))

    def _store_state(self, state: CGState) -> None:
        arrays: dict[str, NDArray[Any]] = {name: getattr(state, name).numpy() for name in _VECTORS}
        numbers = {name: getattr(state, name) for name in ("iteration", "slope", "decreases")}
        write_arrays(self._results / "iterations.safetensors", arrays, {"numbers": json.dumps(numbers)})

    @cached_property
    def _worker(self) -> WorkerSpec:
        return worker_spec(
            self._run,
            StepWorker,
            model=model_spec(self._run, fingerprint_of(self._run)),
            results=self._results,
            examples_n=self._labelled.examples_n,
            classes_n=self._labelled.classes_n,
            batch_size=prediction_batch_size(self._run),
            gradient_batch_size=int(FisherStore.read_attributes(self._run.fishers)["batch_size"]),
            lineage=self._lineage,
        )


_VECTORS = ("solution_n", "residual_n", "search_n", "right_n")


def _share(error: float, tolerance: float) -> int:
    """Return the share of the logarithmic decrease of the error to the tolerance, in percent."""
    return int(100 * math.log(min(1.0, max(error, tolerance))) / math.log(tolerance))


def _mask(places: list[int], n: int) -> NDArray[np.bool_]:
    return np.isin(np.arange(n), places)


def _request(run: RunDirectory, stage: Stage, labelled: Labelled) -> str:
    """Return a hash of the settings, the labels and the results that the step depends on."""
    settings = run.config.step.model_dump(mode="json", exclude={"towards"})
    labels = [labelled.examples_n.tolist(), labelled.classes_n.tolist(), labelled.held_out.tolist()]
    return json_checksum({"settings": for_hash(settings), "labels": labels, "lineage": stage.lineage})


def _refuse_empirical(run: RunDirectory) -> None:
    if run.config.fishers.labels == "empirical":
        raise RunDirectoryError(
            f"the Fishers of {run.path} were computed with the labels of the data (empirical), which is not the Fisher "
            "of the model: use a run with another fishers.labels"
        )


def _outcome(summary: Summary) -> str:
    iterations = "" if summary["iterations"] is None else f" after {summary['iterations']} iterations"
    if not summary["converged"]:
        iterations += f", which end at a relative error of {summary['relative_error']:.1e}"
    if summary["step"] is None:
        return f"step{iterations}: no step size corrects wrong predictions without harm; the model is unchanged"
    begin, found = f"step: size {summary['step']:.3g}{iterations}", summary["held_out"]
    if found is None:
        return f"{begin}; not evaluated, because there are no other held-out examples with a label"
    return f"{begin}; {held_out_text(found)}"
