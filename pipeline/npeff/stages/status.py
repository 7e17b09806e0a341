"""What a person wants to know of a run: how far each stage has come, and where to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npeff.runs.directory import RunDirectory, StageState
from npeff.runs.stage import finished, recorded
from npeff.storage.atomic import is_committed
from npeff.store.checkpoint import CheckpointStore
from npeff.store.fisher_store import FisherStore


@dataclass(frozen=True)
class StageStatus:
    stage: str
    state: StageState
    done: str
    details: str


def status(run: RunDirectory) -> list[StageStatus]:
    """How far every stage has come."""
    n_components = run.config.factorization.n_components
    n_shards = FisherStore.open(run.fishers).plan.n_shards if is_committed(run.fishers) else "?"
    shards = len(finished(run.shard_records))
    checkpoints = CheckpointStore(run.checkpoints, config_hash="").iterations()
    lifted, verified, attributed = (
        len(finished(run.partial_results(stage))) for stage in ("lift", "verify", "attribute")
    )
    stages = {
        "fishers": ((run.fishers,), f"{shards}/{n_shards} shards"),
        "factorize": ((run.checkpoints, run.factorization), f"{max(checkpoints, default=0)} steps"),
        "lift": ((run.directions,), f"{lifted}/{n_components} directions"),
        "verify": ((run.partial_results("verify"),), f"{verified}/{n_components} components"),
        "attribute": ((run.partial_results("attribute"),), f"{attributed}/{n_components} components"),
    }
    rows = []
    lifted_from = "sketch" if run.config.factorization.kind == "fishers" else "component"
    for stage, (outputs, done) in stages.items():
        record, state = recorded(run, stage), run.state(stage, outputs)
        if record is None and state is StageState.COMPLETE:
            state = StageState.PARTIAL
        rows.append(StageStatus(stage, state, done, _details(stage, record, lifted_from)))
    if run.partial_results("select").exists():
        rows.insert(1, _selection_status(run))
    written = run.report.exists()
    state = StageState.COMPLETE if written else StageState.MISSING
    return [*rows, StageStatus("report", state, "", str(run.report) if written else "")]


def _selection_status(run: RunDirectory) -> StageStatus:
    """Of the search for the number of components, which a run does without unless it is asked for."""
    record = recorded(run, "select")
    state = StageState.PARTIAL if record is None else StageState.COMPLETE
    details = f"recommends {record['n_components']} components" if record else ""
    return StageStatus("select", state, f"{len(list(run.partial_results('select').glob('*.json')))} fits", details)


def _details(stage: str, record: dict[str, Any] | None, lifted_from: str) -> str:
    if record is None:
        return ""
    match stage:
        case "fishers":
            return f"{record['n_examples']} examples, {record['n_invalid']} invalid, rank {record['rank']}"
        case "factorize":
            explained = f"explained {record['explained']:.4f}, " if "explained" in record else ""
            return explained + record["stopped"]
        case "lift":
            return f"median cosine to the {lifted_from} {record['median_cosine']:.4f}"
        case "verify":
            return "; ".join(score_line(score) for score in record["scores"] if score["examples"] == "held_out")
        case "attribute":
            return f"{record['n_rows']} shares of the components' top examples"
    return ""


def score_line(score: dict[str, Any]) -> str:
    """One line of a verification: a split and a sign."""
    examples, sign = score["examples"].replace("_", "-"), "+" if score["sign"] > 0 else "−"
    return (
        f"{examples} examples, {sign} direction: median KL ratio {score['median_kl_ratio']:.2f} "
        f"over {score['n']} components, "
        f"{score['share_above_1']:.0%} above 1, {score['share_above_controls']:.0%} above all controls"
        f" ({score['share_surely_above_controls']:.0%} with 95% confidence)"
    )


def outcome(run: RunDirectory, command: str) -> list[str]:
    """The few lines after a finished run: what was found, and what to look at next, by ``command`` (``npeff``)."""
    scores = (recorded(run, "verify") or {}).get("scores", [])
    return [
        *(score_line(score) for score in scores),
        f"report: {run.report}",
        f"ask it: {command} query {run.path} top --component 0",
    ]
