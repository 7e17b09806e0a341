"""The state of every stage of a run, and the result lines of a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from npeff.errors import without_values
from npeff.runs.directory import RunDirectory, StageState
from npeff.runs.stage import recorded
from npeff.stages.registry import STAGES
from npeff.stages.verify import VERIFY, headline

_FITS = ("factorize", "transform")
_STAGES_OF_FACTORIZATION = tuple(stage.name for stage in STAGES if not stage.of_the_run)


@dataclass(frozen=True)
class StageStatus:
    stage: str
    state: StageState
    done: str
    details: str


def status(run: RunDirectory) -> list[StageStatus]:
    """Return the state of every stage. Stages that ``npeff run`` does not include are listed once they have begun."""
    rows, is_defined = [], run.is_defined()
    for stage in STAGES:
        record = recorded(run, stage)
        traces = stage.traces or (f"partial/{stage.name}",)
        state = run.state(stage.record, tuple(run.store(stage.name, trace) for trace in traces))
        if record is None and state is StageState.COMPLETE:
            state = StageState.PARTIAL if stage.leaves is None else StageState.MISSING
        if stage.in_run(run.config) or state is not StageState.MISSING:
            units = stage.units(run) if stage.of_the_run or is_defined else None
            details = "" if record is None else stage.details(record)
            rows.append(StageStatus(stage.name, state, "" if units is None else str(units), details))
    written = run.report.exists()
    state = StageState.COMPLETE if written else StageState.MISSING
    return [*rows, StageStatus("report", state, "", str(run.report) if written else "")]


def status_html(run: RunDirectory) -> str:
    """Return the state of every stage as a table of HTML, for notebooks."""
    cells = "".join(
        "<tr>"
        + "".join(f'<td style="text-align: left">{escape(without_values(text))}</td>' for text in texts)
        + "</tr>"
        for texts in ((row.stage, row.state.value, row.done, row.details) for row in status(run))
    )
    title = escape(without_values(f"run {run.argument}"))
    heads = "".join(f'<th style="text-align: left">{name}</th>' for name in ("stage", "state", "done", "result"))
    return (
        f'<div style="font-size: 13px"><code>{title}</code>'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>"
    )


@dataclass(frozen=True)
class FactorizationStatus:
    name: str
    n_components: int
    state: StageState
    """The state of the stage `factorize`, or of `transform`."""
    complete: tuple[str, ...]
    """The complete stages of the factorization, and ``report``."""
    n_bytes: int

    @property
    def size(self) -> str:
        """The size of all files of the factorization, as text."""
        return f"{self.n_bytes / 2**20:.1f} MiB"


def factorizations(run: RunDirectory) -> list[FactorizationStatus]:
    """Return the state of every factorization of a run."""
    found = []
    for name in run.factorizations():
        each = run if name == run.name else run.with_factorization(name)
        rows = [row for row in status(each) if row.stage == "report" or row.stage in _STAGES_OF_FACTORIZATION]
        complete = tuple(row.stage for row in rows if row.state is StageState.COMPLETE)
        state = max((row.state for row in rows if row.stage in _FITS), key=list(StageState).index)
        found.append(FactorizationStatus(name, each.config.factorization.n_components, state, complete, each.n_bytes()))
    return found


def outcome(run: RunDirectory, command: str) -> list[str]:
    """Return the lines printed after a finished run: a next command (``command`` is ``npeff``), and the results."""
    verified = recorded(run, VERIFY) or {}
    return [
        f"report: {run.report}",
        f"query it: {command} query {run.argument} top --component 0",
        *headline(verified.get("scores", []), verified.get("joint_ablation")),
    ]
