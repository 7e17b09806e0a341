"""The stage `select`: recommend a number of components."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from npeff.execution.executor import Executor, WorkerSpec
from npeff.factorization import FitComparison, InvalidProblemError, compare_fits, recommend, search, validate_size
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, ProgressDisplay, display
from npeff.runs.stage import open_stage, record_of
from npeff.stages.earlier_results import checksums_of, count_fit_examples
from npeff.stages.fishers import FISHERS
from npeff.stages.fishers.tables import ensure_split
from npeff.stages.fits.stability import fitting_worker
from npeff.stages.fits.worker import PARTS, FitRequest, FitResult
from npeff.stages.select import SELECT
from npeff.stages.worker_specs import executor_for
from npeff.store.fit_store import FitStore, StoredFit
from npeff.store.tables import rows_to_columns, write_table


def select(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Recommend a number of components, from fits of several numbers with several seeds and halves of the examples.

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
    with open_stage(run, SELECT) as stage:
        if (kind := run.config.factorization.kind) != "fishers":
            raise RunDirectoryError(
                f"npeff select does not support factorization.kind: {kind}, which {run.path} has: set "
                "factorization.kind: fishers and another factorization.name"
            )
        wanted = run.config.selection
        checksums_of(run)
        request = _request(run)
        if stage.done and stage.done["request"] == request:
            return stage.done
        ensure_split(run)
        n_half = min(count_fit_examples(run), wanted.max_examples) // 2
        validate_size(n_half, record_of(run, FISHERS)["rank"], max(wanted.components))
        run.reopen("select")
        with executor_for(run, executor) as workers:
            fits = _Fits(run, workers, progress)
            tried = list(wanted.components)
            if wanted.refine:
                rows, recommended = search(tried, fits.gather)
            else:
                rows = fits.gather(tried)
                recommended = recommend(rows)
        _write_tables(run, rows, recommended.n_components, fits, stage.lineage)
        progress.say(f"recommended: factorization.n_components: {recommended.n_components}")
        progress.say(recommended.reason)
        return stage.complete({"request": request, **asdict(recommended), "n_fits": sum(row.n_fits for row in rows)})


@dataclass
class _Fits:
    """The fits of a run. Missing fits are computed."""

    run: RunDirectory
    workers: Executor
    progress: ProgressDisplay

    def __post_init__(self) -> None:
        self.store = FitStore(self.run.partial_results("select"), _request(self.run)["fits"])

    def gather(self, numbers: list[int]) -> list[FitComparison]:
        """Return the comparison of the fits with these numbers of components."""
        requests = [request for n_components in numbers for request in self.requests(n_components)]
        missing = [request for request in requests if not self.store.has(request.name)]
        # The largest fits take longest. They come first, so that workers end together and the time left is not
        # underestimated.
        missing.sort(key=lambda request: -request.n_components)
        done = len(requests) - len(missing)
        self.progress.say(f"select: trying {', '.join(map(str, numbers))} components")
        with self.progress.stage("select", len(requests), "fits", done=done) as tick:
            fitted = self.workers.map(self._worker(), "fit", missing, keep_going=True) if missing else ()
            for request, result in fitted:
                self._write(request, result)
                done += 1
                tick(done, f"{request.n_components} components explain {result.explained:.4f}")
        return [self._compared(n_components) for n_components in numbers]

    def requests(self, n_components: int) -> list[FitRequest]:
        seeds = range(self.run.config.selection.seeds)
        return [FitRequest(n_components, seed, part) for seed in seeds for part in PARTS]

    def _worker(self) -> WorkerSpec:
        wanted = self.run.config.selection
        return fitting_worker(
            self.run,
            wanted.max_examples,
            judged=True,
            max_iterations=wanted.max_iterations,
            tolerance=wanted.tolerance,
            n_starts=wanted.n_starts,
        )

    def _write(self, request: FitRequest, result: FitResult) -> None:
        facts = asdict(result)
        self.store.write(request.name, facts.pop("components_KD"), facts)

    def _compared(self, n_components: int) -> FitComparison:
        fits: dict[str, list[StoredFit]] = {part: [] for part in PARTS}
        for request in self.requests(n_components):
            fits[request.part].append(self.store.read(request.name))
        judged = [fit.facts for fit in fits["all"]]
        if any(facts["explained_held_out"] is None for facts in judged):
            # without held-out examples, each half is evaluated on the other
            judged = [fit.facts for fit in fits["first"] + fits["second"]]
        if any(facts["explained_held_out"] is None for facts in judged):
            raise InvalidProblemError(
                "the Fishers of all examples that the fits are evaluated on are zero: add more examples, or raise "
                "factorization.held_out_fraction"
            )
        first, second = ([fit.components_KD for fit in fits[part]] for part in ("first", "second"))
        return compare_fits(
            seeds=[fit.components_KD for fit in fits["all"]],
            halves=list(zip(first, second, strict=True)),
            explained=[facts["explained"] for facts in judged],
            explained_held_out=[facts["explained_held_out"] for facts in judged],
        )


def _request(run: RunDirectory) -> dict[str, Any]:
    """Return the request, with a hash of the settings that a fit depends on in addition to its name."""
    config, wanted = run.config, run.config.selection
    fishers = record_of(run, FISHERS)
    fits = {
        "fishers": fishers.get("lineage", fishers["signature"]),
        "seed": config.seed,
        "subsample": config.factorization.subsample,
        "held_out_fraction": config.factorization.held_out_fraction,
        **{name: getattr(wanted, name) for name in ("max_examples", "max_iterations", "tolerance", "n_starts")},
    }
    return {
        "components": list(wanted.components),
        "seeds": wanted.seeds,
        "refine": wanted.refine,
        "fits": hashlib.sha256(json.dumps(fits, sort_keys=True).encode()).hexdigest()[:16],
    }


def _write_tables(
    run: RunDirectory, rows: Sequence[FitComparison], recommended: int, fits: _Fits, lineage: str | None
) -> None:
    described = [{**asdict(row), "recommended": row.n_components == recommended} for row in rows]
    write_table(run.table("selection"), "selection", rows_to_columns(described, "selection"), lineage)
    requests = [request for row in rows for request in fits.requests(row.n_components)]
    singly = [{**asdict(request), **fits.store.read(request.name).facts} for request in requests]
    write_table(run.table("selection_fits"), "selection_fits", rows_to_columns(singly, "selection_fits"), lineage)
