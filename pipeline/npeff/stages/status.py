"""The state of every stage of a run, and the result lines of a finished run."""

from __future__ import annotations

from dataclasses import dataclass

from npeff.runs.directory import RunDirectory, StageState
from npeff.runs.stage import recorded
from npeff.stages.registry import STAGES
from npeff.stages.verify import VERIFY, score_line


@dataclass(frozen=True)
class StageStatus:
    stage: str
    state: StageState
    done: str
    details: str


def status(run: RunDirectory) -> list[StageStatus]:
    """Return the state of every stage. Stages that ``npeff run`` does not include are listed once they have begun."""
    rows = []
    for stage in STAGES:
        record = recorded(run, stage)
        traces = stage.traces or (f"partial/{stage.name}",)
        state = run.state(stage.record, tuple(run.path / trace for trace in traces))
        if record is None and state is StageState.COMPLETE:
            state = StageState.PARTIAL if stage.leaves is None else StageState.MISSING
        if stage.in_every_run or state is not StageState.MISSING:
            units = stage.units(run)
            details = "" if record is None else stage.details(record)
            rows.append(StageStatus(stage.name, state, "" if units is None else str(units), details))
    written = run.report.exists()
    state = StageState.COMPLETE if written else StageState.MISSING
    return [*rows, StageStatus("report", state, "", str(run.report) if written else "")]


def outcome(run: RunDirectory, command: str) -> list[str]:
    """Return the lines printed after a finished run: the results, and a next command (``command`` is ``npeff``)."""
    scores = (recorded(run, VERIFY) or {}).get("scores", [])
    return [
        *(score_line(score) for score in scores),
        f"report: {run.report}",
        f"query it: {command} query {run.path} top --component 0",
    ]
