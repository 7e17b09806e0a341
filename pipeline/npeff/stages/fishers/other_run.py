"""The Fishers of another run, which a run uses as they are (``fishers.from``)."""

from __future__ import annotations

import pyarrow as pa

from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.settings import refuse_other_fishers
from npeff.runs.stage import record_of
from npeff.stages.fishers import FISHERS
from npeff.stages.fishers.tables import split_column
from npeff.store.tables import read_table, write_table

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
    for name in ("examples", "classes", "parameters"):
        table = read_table(other.shared_table(name), name)
        if name == "examples":
            split = split_column(len(table), run.config.factorization.held_out_fraction, run.config.seed)
            table = table.set_column(table.column_names.index("split"), "split", pa.array(split))
        write_table(run.shared_table(name), name, table, record.get("lineage"))
    facts = {key: value for key, value in record.items() if key not in _OWN}
    return {**facts, "worker_seconds": 0.0, "from": run.config.fishers.from_}
