"""What the results of a stage were made from.

The record of a stage contains a hash, the *lineage* of its results: of the lineage of the results that the stage reads,
of the settings that matter to it, and, for the Fishers and the factorization, of the checksums of the results
themselves. Tables, stores and partial results contain the lineage of their stage. Results that belong to another run,
to another factorization or to other settings therefore differ from their record in this hash.

Runs of earlier versions have no lineages. An unknown lineage fits everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npeff.runs.definition import StageDefinition, Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.storage.atomic import is_committed
from npeff.storage.checksums import json_checksum, read_json
from npeff.store.tables import table_lineage
from npeff.variables import for_hash

REMEDY_OF_MISFIT = (
    "restore the former settings and Fishers from a copy, or make another factorization with `npeff factorize RUN "
    "--name NAME`, or delete this one with `npeff rm RUN --factorization NAME`"
)

MadeFrom = dict[str, str]
"""Lineage of each result that a stage reads, by the name of its stage, and the hash of the settings."""


def made_from(run: RunDirectory, stage: StageDefinition, record: Summary | None) -> MadeFrom | None:
    """Return what the results of a stage are made from now; None if the lineage of its inputs is unknown.

    Args:
        run: The run.
        stage: The stage.
        record: The record of the stage that it follows; None if it follows none.
    """
    inputs: MadeFrom = {}
    if stage.after is None and run.fishers_home != run.path:
        return None  # the lineage of the Fishers of another run is in the record of that run
    if stage.after is not None:
        if record is None or "lineage" not in record:
            return None
        inputs[stage.after.name] = record["lineage"]
    return inputs | {"settings": json_checksum({"settings": for_hash(stage.settings(run.config))})}


def lineage_of(stage: StageDefinition, sources: Mapping[str, str] | None, content: Any = None) -> str | None:
    """Return the lineage of results that are made from ``sources``; None if the sources are unknown.

    Args:
        stage: The stage.
        sources: See `made_from`.
        content: Checksums of the results, for stages whose results are part of the lineage.
    """
    if sources is None:
        return None
    return json_checksum({"stage": stage.record, "made_from": dict(sources), "content": content})


def misfit(run: RunDirectory, stage: StageDefinition, record: Summary, earlier: Summary | None) -> str | None:
    """Return why complete results no longer fit what the run directory contains; None if they fit or it is unknown.

    Args:
        run: The run.
        stage: The stage.
        record: The record of the stage.
        earlier: The record of the stage that it follows.
    """
    if stage.after is None and run.fishers_home != run.path:
        return _misfit_of_other_fishers(run, record)
    was, now = record.get("made_from"), made_from(run, stage, earlier)
    if was is None or now is None:
        return None
    reasons = [
        "they were made with other settings" if name == "settings" else f"they were made from other results of {name}"
        for name in sorted(now.keys() & was.keys(), reverse=True)
        if now[name] != was[name]
    ]
    return f"the results of {stage.name} do not fit: {', and '.join(reasons)}" if reasons else None


def _misfit_of_other_fishers(run: RunDirectory, record: Summary) -> str | None:
    """Return why the Fishers of the other run (``fishers.from``) are not those that this run has used."""
    if not is_committed(run.fishers_home / "run.yaml"):
        return None  # the stage that reads the Fishers reports it
    there = (RunDirectory.open_any(run.fishers_home).record("fishers") or {}).get("lineage")
    if there is None or record.get("lineage") in (None, there):
        return None
    return f"the Fishers of {run.fishers_home} have been computed again since this run used them"


def unit_lineage(path: Path) -> str | None:
    """Return the lineage of a partial result; None if it is unknown."""
    if path.suffix == ".parquet":
        return table_lineage(path)
    found: str | None = read_json(path).get("lineage")
    return found


def refuse_misfit(run: RunDirectory, reason: str) -> RunDirectoryError:
    """Return the error for results that are not recomputed because other results would be lost."""
    return RunDirectoryError(f"{run.argument}: {reason}", REMEDY_OF_MISFIT, path=run.home)
