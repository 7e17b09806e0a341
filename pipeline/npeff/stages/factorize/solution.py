"""Output files of a factorization."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.lineage import MadeFrom, lineage_of
from npeff.stages.factorize import FACTORIZE
from npeff.stages.factorize.tables import write_component_tables
from npeff.stages.registry import stages_after
from npeff.storage.atomic import remove_directory
from npeff.storage.checksums import file_checksum
from npeff.storage.errors import StoreError
from npeff.store.coefficient_rows import Coefficients
from npeff.store.component_store import factorization_checksums, open_factorization, write_factorization
from npeff.store.tables import rows_to_columns, write_table


def write_solution(
    run: RunDirectory,
    components_KD: NDArray[np.float64],
    coefficients_NK: Coefficients,
    history: list[dict[str, Any]],
    summary: Summary,
    stability_K: np.ndarray | None = None,
    columns_D: np.ndarray | None = None,
    *,
    sources: MadeFrom | None = None,
    evidence_NK: Coefficients | None = None,
) -> Summary:
    """Write components, coefficients, evidence and their tables. Returns fields for the stage's record.

    ``sources`` is what the factorization was made from, see `npeff.runs.lineage`. Evidence is computed from the
    components and the Fishers, and is no part of the lineage.

    Results of later stages for former components are deleted. They are kept if the components are the same, which is
    the case when a damaged factorization is recomputed.
    """
    checksums = factorization_checksums(components_KD, coefficients_NK, columns_D)
    former = _former_checksums(run)
    if former is not None and former.items() >= checksums.items():
        run.reopen("lift")  # it adds a column to the table of components; the directions are kept
    else:
        for stage in (FACTORIZE, *stages_after(FACTORIZE)):
            run.reopen(stage.name)
            remove_directory(run.partial_results(stage.name))
        for stage in stages_after(FACTORIZE):
            for table in stage.tables:
                run.table(table).unlink(missing_ok=True)  # else the report would show it with the new components
        run.table("label_scores").unlink(missing_ok=True)
        for folder in (run.directions, run.repaired):
            remove_directory(folder)
    lineage = lineage_of(FACTORIZE, sources, checksums)
    attrs = summary if lineage is None else summary | {"lineage": lineage}
    stored = write_factorization(run.factorization, components_KD, coefficients_NK, attrs, columns_D, evidence_NK)
    write_component_tables(run, components_KD, coefficients_NK, stability_K, lineage)
    write_table(run.table("history"), "history", rows_to_columns(history, "history"), lineage)
    known = {} if lineage is None else {"made_from": sources, "lineage": lineage}
    return {"checksums": stored} | known


def own_examples(run: RunDirectory) -> Summary:
    """Return the checksum of the table of examples of a factorization that has its own, for the stage's record."""
    has_own = run.home != run.path and run.own_examples.is_file()
    return {"own_examples": file_checksum(run.own_examples)} if has_own else {}


def _former_checksums(run: RunDirectory) -> dict[str, str] | None:
    """Return the checksums of the components that later stages used, or None if unknown."""
    try:
        checksums: dict[str, str] = open_factorization(run.factorization).attrs["checksums"]
        return checksums
    except StoreError:  # missing or damaged
        record = run.record("factorize")
        return None if record is None else record.get("checksums")
