"""The Fishers of another run, which a run uses as they are (``fishers.from``)."""

from __future__ import annotations

from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.settings import refuse_other_fishers
from npeff.runs.stage import record_of
from npeff.stages.fishers import FISHERS
from npeff.stages.fishers.tables import held_out, with_split
from npeff.store.tables import read_table, write_table, write_table_in_parts

_OWN = ("stage", "completed_at", "checksum", "tables", "seconds", "worker_seconds", "made_from")
"""Fields of the other run's record that describe the work of that run."""


def use_other_fishers(run: RunDirectory) -> Summary:
    """Write the tables of a run that uses the Fishers of another run. Returns the summary for the stage's record.

    Nothing is computed. The split of the examples is that of this run.

    Raises:
        RunDirectoryError: The other run does not exist, has other settings, or its Fishers are not complete.
    """
    other = RunDirectory.open_any(run.fishers_home)
    refuse_other_fishers(run.config)
    record = record_of(other, FISHERS)
    examples, lineage = other.shared_table("examples"), record.get("lineage")
    n_examples, wanted = record["n_examples"], run.config.factorization.held_out_fraction
    parts = with_split(examples, held_out(n_examples, wanted, run.config.seed))
    write_table_in_parts(run.shared_table("examples"), "examples", parts, lineage)
    for name in ("classes", "parameters"):
        write_table(run.shared_table(name), name, read_table(other.shared_table(name), name), lineage)
    facts = {key: value for key, value in record.items() if key not in _OWN}
    return {**facts, "worker_seconds": 0.0, "from": run.config.fishers.from_}
