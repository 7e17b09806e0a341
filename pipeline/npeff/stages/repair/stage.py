"""The stage `repair`: correct wrong predictions by steps along components that represent mistakes."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.execution.executor import Executor, WorkerSpec, result_of
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, ProgressDisplay, display
from npeff.runs.stage import forget_other_requests, open_stage, record_of
from npeff.stages.earlier_results import direction_checksums, fingerprint_of, lifted_components, prediction_batch_size
from npeff.stages.held_out import held_out_record, held_out_text
from npeff.stages.lift import LIFT
from npeff.stages.repair import REPAIR
from npeff.stages.repair.directions import OwnDirections, own_directions
from npeff.stages.repair.worker import Attempt, Batch, RepairWorker
from npeff.stages.worker_specs import model_executor_for, model_spec, refuse_divided, worker_spec
from npeff.storage.atomic import remove_directory
from npeff.storage.checksums import read_json, write_json_atomically
from npeff.store.component_store import open_factorization
from npeff.store.splits import is_fit
from npeff.store.tables import read_table, rows_to_columns, write_table
from npeff.verification import Edit, RepairCandidate, choose_step, joint_steps, over_represented, top_examples

_WEIGHTS_OF_CORRECT = (10.0, 5.0, 3.0)
"""Weights of a prediction that is correct before all edits, in the losses that joint steps minimize. A wrong prediction
has weight 1."""

_FRACTIONS = (1.0, 0.8, 0.6, 0.4)
"""Fractions of the steps of least loss that are tried, because the loss does not count corrected and broken
predictions."""

_EDITS_SHOWN = 6
_EXAMPLES_AT_ONCE = 1024
"""Examples of one item. The number is fixed, so that sums do not depend on the number of workers."""


def repair(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Correct wrong predictions by steps along components, and evaluate the result on held-out examples.

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
    refuse_divided(run.config, "repair")
    with open_stage(run, REPAIR) as stage:
        wanted = run.config.repair
        own = own_directions(run, progress.say)
        request, lifted = _request(run, own), lifted_components(run)
        if stage.done and stage.done["request"] == request and stage.done.get("components", lifted) == lifted:
            progress.say(_outcome(stage.done))
            return stage.done
        run.reopen("repair")
        if forget_other_requests(run.partial_results("repair"), request):
            remove_directory(run.repaired)
        examples = _Examples.of(run)
        with model_executor_for(run, executor) as workers:
            search = _Search(run, workers, progress, examples, stage.lineage, own)
            rows = search.over_represented()
            likely = [row["component"] for row in rows if row["q_value"] <= wanted.significance]
            edits, steps = search.edits([component for component in likely if component in lifted], lifted)
            summary: Summary = {
                "request": request,
                "components": lifted,
                "direction": "lifted" if own is None else "own",
                "median_cosine": None if own is None else float(np.median(own.cosines_K)),
                "edits": [asdict(edit) for edit in edits],
                "held_out": None,
            }
            if edits and len(examples.held_out):
                summary["held_out"] = held_out_record(*search.call("judge", (tuple(edits), examples.held_out)))
            if edits:
                argument = (tuple(edits), run.repaired, {"run": run.path.name, **summary})
                summary["model_checksum"] = search.call("save", argument)
        write_table(run.table("repair"), "repair", rows_to_columns(rows, "repair"), stage.lineage)
        write_table(run.table("repair_steps"), "repair_steps", rows_to_columns(steps, "repair_steps"), stage.lineage)
        progress.say(_outcome(summary))
        return stage.complete(summary)


@dataclass(frozen=True)
class _Examples:
    """Numbers of the examples with a label and one prediction."""

    tuning: NDArray[np.int64]
    """Examples that the components were fitted on. Signs and steps are chosen on them."""
    held_out: NDArray[np.int64]
    wrong_N: NDArray[np.bool_]
    coefficients_NK: NDArray[np.float32]

    @classmethod
    def of(cls, run: RunDirectory) -> _Examples:
        table = read_table(run.table("examples"), "examples", ["correct", "split", "valid"])
        known_N = table["correct"].is_valid().to_numpy() & table["valid"].to_numpy()
        fit_N = is_fit(table["split"])
        if not bool((known_N & fit_N).any()):
            raise RunDirectoryError(
                f"the examples of {run.path} have no known labels or several predictions each: use examples with known "
                "labels and one prediction each, in a new run_dir"
            )
        return cls(
            tuning=np.flatnonzero(known_N & fit_N),
            held_out=np.flatnonzero(known_N & ~fit_N),
            wrong_N=~table["correct"].fill_null(True).to_numpy(),
            coefficients_NK=open_factorization(run.factorization).read_coefficients(),
        )


class _Search:
    """Search for the edits, on workers."""

    def __init__(
        self,
        run: RunDirectory,
        workers: Executor,
        progress: ProgressDisplay,
        examples: _Examples,
        lineage: str | None,
        own: OwnDirections | None,
    ) -> None:
        self._run, self._workers, self._progress, self._examples = run, workers, progress, examples
        self._lineage, self._own = lineage, own
        among_N = np.zeros(len(examples.wrong_N), dtype=bool)
        among_N[examples.tuning] = True
        self._among_N = among_N
        count = run.config.repair.top_examples
        self._tops = [top_examples(w_N, among_N, count) for w_N in examples.coefficients_NK.T]

    def over_represented(self) -> list[dict[str, Any]]:
        """Return the rows of the table `repair`, in ascending order of their p-values."""
        found = over_represented(self._tops, self._examples.wrong_N, self._among_N)
        rows = [
            {
                "component": component,
                "n_top": int(found.n_top_K[component]),
                "n_wrong": int(found.n_wrong_K[component]),
                "odds_ratio": float(found.odds_ratios_K[component]),
                "p_value": float(found.p_values_K[component]),
                "q_value": float(found.q_values_K[component]),
            }
            for component in range(len(self._tops))
        ]
        return sorted(rows, key=lambda row: (row["p_value"], row["component"]))

    def edits(self, components: list[int], lifted: list[int]) -> tuple[list[Edit], list[dict[str, Any]]]:
        """Return the edits and the rows of the table `repair_steps`.

        The search adds edits along single components as long as one helps. It then tries joint steps along all lifted
        components, and takes them if they help more.
        """
        wanted, edits, rows = self._run.config.repair, list[Edit](), list[dict[str, Any]]()
        unedited_n = correct_n = ~self._examples.wrong_N[self._examples.tuning]
        shortest = math.inf

        def choose(tried: list[RepairCandidate]) -> RepairCandidate | None:
            chosen = choose_step(tried, correct_n, unedited_n, wanted.max_harm)
            rows.extend(_step_row(len(edits), each, correct_n, unedited_n, each is chosen) for each in tried)
            return chosen

        while len(edits) < wanted.max_edits:
            left = [component for component in components if component not in {edit.component for edit in edits}]
            tried = [
                self._candidate((Edit(component, trial["sign"] * trial["length"]),), correct_n, trial["correct"])
                for component, trials in self._attempts(tuple(edits), left).items()
                for trial in trials
            ]
            shortest = min(shortest, *(each.length for each in tried)) if tried else shortest
            if (chosen := choose(tried)) is None:
                break
            edits += chosen.edits
            correct_n = chosen.correct_after_N
        if wanted.joint_passes and math.isfinite(shortest):
            scaled = [
                tuple(Edit(component, fraction * step) for component, step in zip(lifted, steps, strict=True))
                for steps in self._together(edits, lifted, shortest)
                for fraction in _FRACTIONS
            ]
            right = dict(self._workers.map(self._worker, "right_after", scaled))
            chosen = choose([self._candidate(steps, correct_n, right[steps]) for steps in scaled])
            edits = edits if chosen is None else list(chosen.edits)
        return edits, rows

    def _together(self, edits: list[Edit], components: list[int], unit: float) -> list[list[float]]:
        """Return steps along all components that minimize the loss on the tuning examples, for each weight of correct
        predictions."""
        most, passes = self._run.config.repair.joint_passes, 0
        step_of = {edit.component: edit.step for edit in edits}
        steps = np.array([step_of.get(component, 0.0) for component in components])
        found = []
        with self._progress.stage("repair", most * len(_WEIGHTS_OF_CORRECT), "passes of joint steps") as tick:
            for weight in _WEIGHTS_OF_CORRECT:

                def loss_at(steps: NDArray[np.float64], weight: float = weight) -> tuple[float, NDArray[np.float64]]:
                    nonlocal passes
                    loss, derivatives = self._loss_and_derivatives(passes, components, steps.tolist(), weight)
                    passes += 1
                    tick(min(passes, most * len(_WEIGHTS_OF_CORRECT) - 1), f"loss {loss:.4g}")
                    return loss, np.array(derivatives)

                steps = joint_steps(loss_at, steps, unit, most)
                found.append(steps.tolist())
            tick(passes, last=True)
        return found

    def _loss_and_derivatives(
        self, number: int, components: list[int], steps: list[float], weight: float
    ) -> tuple[float, list[float]]:
        """Compute pass ``number`` over the tuning examples, or read its stored result."""
        file = self._run.partial_results("repair") / f"together-{number:04d}.json"
        found = read_json(file) if file.exists() else {}
        if found.get("steps") != steps or found["weight"] != weight:
            tuning = self._examples.tuning
            weights = np.where(self._examples.wrong_N[tuning], 1.0, weight) / len(tuning)
            at = tuple(Edit(component, step) for component, step in zip(components, steps, strict=True))
            starts = range(0, len(tuning), _EXAMPLES_AT_ONCE)
            parts = [slice(start, start + _EXAMPLES_AT_ONCE) for start in starts]
            batches = [Batch(at, tuning[part], weights[part]) for part in parts]
            results = dict(self._workers.map(self._worker, "loss_and_derivatives", batches))
            ordered = [results[batch] for batch in batches]
            found = {
                "steps": steps,
                "weight": weight,
                "loss": sum(loss for loss, _ in ordered),
                "slopes": np.sum([derivatives for _, derivatives in ordered], axis=0).tolist(),
            }
            write_json_atomically(file, found)
        return found["loss"], found["slopes"]

    def _candidate(self, edits: tuple[Edit, ...], correct_n: NDArray[np.bool_], right: list[int]) -> RepairCandidate:
        """Return a candidate with these edits, after which the tuning examples at positions ``right`` are correct."""
        tops = np.concatenate([self._tops[edit.component] for edit in edits])
        return RepairCandidate(
            edits=edits,
            target_N=np.isin(self._examples.tuning, tops) & ~correct_n,
            correct_after_N=np.isin(np.arange(len(correct_n)), right),
        )

    def call(self, method: str, argument: object) -> Any:
        """Call a method of one worker and return the result."""
        return result_of(self._workers, self._worker, method, argument)

    def _attempts(self, edits: tuple[Edit, ...], components: list[int]) -> dict[int, list[dict[str, Any]]]:
        attempts = [Attempt(edits, component, self._tops[component]) for component in components]
        files = {attempt.component: self._run.partial_results("repair") / attempt.file for attempt in attempts}
        stored = {j: read_json(file) for j, file in files.items() if file.exists()}
        found = {j: each["trials"] for j, each in stored.items() if each.get("lineage") in (None, self._lineage)}
        missing = [attempt for attempt in attempts if attempt.component not in found]
        with self._progress.stage("repair", len(attempts), "components", done=len(found)) as tick:
            tried = self._workers.map(self._worker, "attempt", missing, keep_going=True) if missing else ()
            for attempt, trials in tried:
                found[attempt.component] = trials
                tick(len(found))
        return {component: found[component] for component in components}

    @cached_property
    def _worker(self) -> WorkerSpec:
        return worker_spec(
            self._run,
            RepairWorker,
            model=model_spec(self._run, fingerprint_of(self._run)),
            directions=self._run.directions,
            results=self._run.partial_results("repair"),
            tuning=self._examples.tuning,
            kl_steps=self._run.config.repair.kl_steps,
            batch_size=prediction_batch_size(self._run),
            checksums=direction_checksums(self._run),
            coefficients_KK=None if self._own is None else self._own.coefficients_KK,
            lineage=self._lineage,
        )


def _step_row(
    edit: int,
    candidate: RepairCandidate,
    correct_n: NDArray[np.bool_],
    unedited_n: NDArray[np.bool_],
    chosen: bool,
) -> dict[str, Any]:
    change_n = candidate.correct_after_N.astype(int) - correct_n.astype(int)
    one = candidate.edits[0] if len(candidate.edits) == 1 else None
    return {
        "edit": edit,
        "component": one.component if one else None,
        "sign": int(np.sign(one.step)) if one else None,
        "step": candidate.length,
        "n_target": int(candidate.target_N.sum()),
        "mended_target": int(change_n[candidate.target_N].sum()),
        "gained": int(change_n.sum()),
        "broken": candidate.broken(unedited_n),
        "accuracy_tuning": float(candidate.correct_after_N.mean()),
        "chosen": chosen,
    }


def _request(run: RunDirectory, own: OwnDirections | None) -> str:
    """Return a hash of the settings and results that the repair depends on."""
    lift = record_of(run, LIFT)
    # the components and the settings of the lift determine the directions
    components = open_factorization(run.factorization).attrs["checksums"]
    facts = [run.config.repair.model_dump(mode="json"), components, *([lift["lineage"]] if "lineage" in lift else [])]
    facts.append("lifted" if own is None else "own")  # which of them are used also depends on the lifted components
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _outcome(summary: Summary) -> str:
    if not summary["edits"]:
        return "repair: no step corrects wrong predictions without harm; the model is unchanged"
    edits = ", ".join(f"component {edit['component']} by {edit['step']:+.3g}" for edit in summary["edits"])
    if len(summary["edits"]) > _EDITS_SHOWN:
        edits = f"steps along {len(summary['edits'])} components at once"
    found = summary["held_out"]
    if found is None:
        return f"repair: {edits}; not evaluated, because there are no held-out examples"
    return f"repair: {edits}; {held_out_text(found)}"
