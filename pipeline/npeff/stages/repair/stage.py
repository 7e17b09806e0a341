"""Beside the stages: mend wrong predictions by steps along the components that stand for them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.execution.executor import Executor, WorkerSpec
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import forget_other_requests, open_stage, record_of
from npeff.stages.inputs import fingerprint_of, lifted_components
from npeff.stages.lift import LIFT
from npeff.stages.repair import REPAIR
from npeff.stages.repair.worker import Attempt, Batch, RepairWorker
from npeff.stages.worker_specs import executor_for, model_spec, worker_spec
from npeff.statistics.mcnemar import mcnemar
from npeff.storage.atomic import remove_directory
from npeff.storage.checksums import read_json, write_json_atomically
from npeff.store.component_store import open_factorization
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table, rows_to_columns, write_table
from npeff.verification import Edit, RepairCandidate, choose_step, joint_steps, over_represented, top_examples

_WEIGHTS_OF_RIGHT = (10.0, 5.0, 3.0)
"""Of a prediction that is right before all edits, in the losses that steps along several components are sought by."""

_SHARES = (1.0, 0.8, 0.6, 0.4)
"""Of the steps at the least loss, which is not the count of what is mended and broken."""

_EDITS_SHOWN = 6
_EXAMPLES_AT_ONCE = 1024
"""Of one call of a worker. Not for the workers' number to decide: sums would depend on it."""


def repair(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Edit the model along components whose top examples it gets wrong, and judge that on held-out examples."""
    with open_stage(run, REPAIR) as stage:
        progress, wanted = progress or SilentProgress(), run.config.repair
        request, lifted = _request(run), lifted_components(run)
        if stage.done and stage.done["request"] == request and stage.done.get("components", lifted) == lifted:
            progress.say(_outcome(stage.done))
            return stage.done
        run.reopen("repair")
        if forget_other_requests(run.partial_results("repair"), request):
            remove_directory(run.repaired)
        examples = _Examples.of(run)
        with executor_for(run, executor) as workers:
            search = _Search(run, workers, progress, examples)
            rows = search.over_represented()
            likely = [row["component"] for row in rows if row["q_value"] <= wanted.significance]
            edits, steps = search.edits([component for component in likely if component in lifted], lifted)
            summary: Summary = {
                "request": request,
                "components": lifted,
                "edits": [asdict(edit) for edit in edits],
                "held_out": None,
            }
            if edits and len(examples.held_out):
                before, after = search.ask("judge", (tuple(edits), examples.held_out))
                result = mcnemar(np.array(before), np.array(after))
                summary["held_out"] = {**asdict(result), "accuracy_before": float(np.mean(before))}
            if edits:
                asked = (tuple(edits), run.repaired, {"run": run.path.name, **summary})
                summary["model_checksum"] = search.ask("save", asked)
        write_table(run.table("repair"), "repair", rows_to_columns(rows, "repair"))
        write_table(run.table("repair_steps"), "repair_steps", rows_to_columns(steps, "repair_steps"))
        progress.say(_outcome(summary))
        return stage.complete(summary)


@dataclass(frozen=True)
class _Examples:
    """Those with a label and one prediction, by number."""

    tuning: NDArray[np.int64]
    """That the components were fitted on: signs and steps are chosen by them."""
    held_out: NDArray[np.int64]
    wrong_N: NDArray[np.bool_]
    coefficients_NK: NDArray[np.float32]

    @classmethod
    def of(cls, run: RunDirectory) -> _Examples:
        table = read_table(run.table("examples"), "examples")
        known_N = table["correct"].is_valid().to_numpy() & table["valid"].to_numpy()
        fit_N = np.asarray(table["split"].to_pylist()) == "fit"
        if not bool((known_N & fit_N).any()):
            raise RunDirectoryError(
                f"the examples of {run.path} have no known labels, or several predictions each: repair needs examples "
                "with one prediction, and their labels"
            )
        return cls(
            tuning=np.flatnonzero(known_N & fit_N),
            held_out=np.flatnonzero(known_N & ~fit_N),
            wrong_N=~table["correct"].fill_null(True).to_numpy(),
            coefficients_NK=open_factorization(run.factorization).read_coefficients(),
        )


class _Search:
    """For the edits, on workers."""

    def __init__(self, run: RunDirectory, workers: Executor, progress: ProgressDisplay, examples: _Examples) -> None:
        self._run, self._workers, self._progress, self._examples = run, workers, progress, examples
        among_N = np.zeros(len(examples.wrong_N), dtype=bool)
        among_N[examples.tuning] = True
        self._among_N = among_N
        count = run.config.repair.top_examples
        self._tops = [top_examples(w_N, among_N, count) for w_N in examples.coefficients_NK.T]

    def over_represented(self) -> list[dict[str, Any]]:
        """Rows of the table `repair`, the least likely by chance first."""
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
        """The edits, and rows of the table `repair_steps`: along one of the components after the other, as long as one
        helps, and then, where that helps more, along all that are lifted at once."""
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
                tuple(Edit(component, share * step) for component, step in zip(lifted, steps, strict=True))
                for steps in self._together(edits, lifted, shortest)
                for share in _SHARES
            ]
            right = dict(self._workers.map(self._worker, "right_after", scaled))
            chosen = choose([self._candidate(steps, correct_n, right[steps]) for steps in scaled])
            edits = edits if chosen is None else list(chosen.edits)
        return edits, rows

    def _together(self, edits: list[Edit], components: list[int], unit: float) -> list[list[float]]:
        """Steps along all components at which the tuning examples' loss is low, for each weight of right ones."""
        most, passes = self._run.config.repair.joint_passes, 0
        step_of = {edit.component: edit.step for edit in edits}
        steps = np.array([step_of.get(component, 0.0) for component in components])
        found = []
        with self._progress.stage("repair", most * len(_WEIGHTS_OF_RIGHT), "passes over all steps at once") as tick:
            for weight in _WEIGHTS_OF_RIGHT:

                def slopes_at(steps: NDArray[np.float64], weight: float = weight) -> tuple[float, NDArray[np.float64]]:
                    nonlocal passes
                    loss, slopes = self._slopes(passes, components, steps.tolist(), weight)
                    passes += 1
                    tick(min(passes, most * len(_WEIGHTS_OF_RIGHT) - 1), f"loss {loss:.4g}")
                    return loss, np.array(slopes)

                steps = joint_steps(slopes_at, steps, unit, most)
                found.append(steps.tolist())
            tick(passes, last=True)
        return found

    def _slopes(
        self, number: int, components: list[int], steps: list[float], weight: float
    ) -> tuple[float, list[float]]:
        """Pass `number` over the tuning examples, unless it was made before."""
        file = self._run.partial_results("repair") / f"together-{number:04d}.json"
        found = read_json(file) if file.exists() else {}
        if found.get("steps") != steps or found["weight"] != weight:
            tuning = self._examples.tuning
            weights = np.where(self._examples.wrong_N[tuning], 1.0, weight) / len(tuning)
            at = tuple(Edit(component, step) for component, step in zip(components, steps, strict=True))
            starts = range(0, len(tuning), _EXAMPLES_AT_ONCE)
            parts = [slice(start, start + _EXAMPLES_AT_ONCE) for start in starts]
            batches = [Batch(at, tuning[part], weights[part]) for part in parts]
            answers = dict(self._workers.map(self._worker, "slopes", batches))
            ordered = [answers[batch] for batch in batches]
            found = {
                "steps": steps,
                "weight": weight,
                "loss": sum(loss for loss, _ in ordered),
                "slopes": np.sum([slopes for _, slopes in ordered], axis=0).tolist(),
            }
            write_json_atomically(file, found)
        return found["loss"], found["slopes"]

    def _candidate(self, edits: tuple[Edit, ...], correct_n: NDArray[np.bool_], right: list[int]) -> RepairCandidate:
        """The edits, after which the tuning examples at the places `right` are."""
        tops = np.concatenate([self._tops[edit.component] for edit in edits])
        return RepairCandidate(
            edits=edits,
            target_N=np.isin(self._examples.tuning, tops) & ~correct_n,
            correct_after_N=np.isin(np.arange(len(correct_n)), right),
        )

    def ask(self, method: str, argument: object) -> Any:
        """One call of one worker."""
        return next(iter(self._workers.map(self._worker, method, [argument])))[1]

    def _attempts(self, edits: tuple[Edit, ...], components: list[int]) -> dict[int, list[dict[str, Any]]]:
        attempts = [Attempt(edits, component, self._tops[component]) for component in components]
        files = {attempt.component: self._run.partial_results("repair") / attempt.file for attempt in attempts}
        found = {j: read_json(file)["trials"] for j, file in files.items() if file.exists()}
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
            batch_size=FisherStore.open(self._run.fishers).attrs["batch_size"],
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


def _request(run: RunDirectory) -> str:
    """What the outcome depends on, as a hash."""
    record_of(run, LIFT)
    # the directions follow from the components: lifted again, they are the same
    components = open_factorization(run.factorization).attrs["checksums"]
    facts = [run.config.repair.model_dump(mode="json"), components]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _outcome(summary: Summary) -> str:
    if not summary["edits"]:
        return "repair: no component's direction mends wrong predictions without harm; the model stays as it is"
    edits = ", ".join(f"component {edit['component']} by {edit['step']:+.3g}" for edit in summary["edits"])
    if len(summary["edits"]) > _EDITS_SHOWN:
        edits = f"steps along {len(summary['edits'])} components at once"
    found = summary["held_out"]
    if found is None:
        return f"repair: {edits}; no held-out examples to judge it on"
    return (
        f"repair: {edits}; held-out accuracy {found['accuracy_before']:.2%} → "
        f"{found['accuracy_before'] + found['change']:.2%} ({found['mended']} mended, {found['broken']} broken of "
        f"{found['n']}; change {found['low']:+.2%} to {found['high']:+.2%}, p = {found['p_value']:.2g})"
    )
