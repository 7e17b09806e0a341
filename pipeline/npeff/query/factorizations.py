"""Comparison of the factorizations of a run: what they explain, and how their components pass verification."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.statistics.ratio_intervals import median_interval
from npeff.statistics.verdict import Scores, Verdict, scoreboard, verdicts
from npeff.storage.location import location
from npeff.store.run_files import factorization_names, run_and_name


@dataclass(frozen=True)
class Factorization:
    """A factorization of a run and its verification."""

    store: ComponentStore

    @property
    def name(self) -> str:
        name: str = self.store.run.name
        return name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the factorization is, and the fractions that it explains; None where this is not known."""
        record = self.store.tables.record("factorize")
        kind = record.get("factorized", "fishers") if record else None
        explained = {name: record.get(name) for name in ("n_components", "explained", "explained_held_out")}
        return {"factorization": self.name, "kind": kind, **explained}

    @cached_property
    def _verdicts(self) -> list[Verdict]:
        tables = self.store.tables
        return verdicts(self.store.table("verification").to_pylist()) if tables.has("verification") else []

    @cached_property
    def scores(self) -> list[Scores]:
        """The summaries of the verification on held-out examples, or on the fitted ones if there are no others."""
        found = scoreboard(self._verdicts)
        return [scores for scores in found if scores.examples != "fit"] or found

    def counted(self, scores: Scores) -> list[Verdict]:
        """Return the rows of the verification over which a summary is computed: those with a ratio, also if the
        component does not count as matched."""
        return [
            row
            for row in self._verdicts
            if row.examples == scores.examples
            and row.kl_ratio is not None
            and (row.informative if scores.sign is None else row.sign == scores.sign)
        ]

    def interval(self, scores: Scores) -> tuple[float, float] | None:
        """Return the 95% interval of the median KL ratio over the components; None if no component counts."""
        ratios = [row.kl_ratio for row in self.counted(scores) if row.matched is not False and row.kl_ratio is not None]
        return median_interval(np.array(ratios)) if ratios else None


def factorizations_of(run_dir: str | Path) -> list[Factorization]:
    """Return the factorizations of a run, in the order of `npeff status`.

    Raises:
        QueryError: The directory is not a run directory, or has no factorization.
    """
    path, _ = run_and_name(location(run_dir))
    names = factorization_names(path)
    if not names:
        ComponentStore.open(path)  # raises if this is no run directory
        raise QueryError(f"{path} has no factorization", f"run `npeff factorize {path} --components K` first")
    return [Factorization(ComponentStore.open(path, name)) for name in names]


def compare_factorizations(run_dir: str | Path) -> pa.Table:
    """Compare all factorizations of a run: what they explain, and how their components pass verification.

    Args:
        run_dir: The run directory.

    Returns:
        One row for each factorization, in the order of `npeff status`, and for each summary of its verification on
        held-out examples (`npeff.statistics.verdict.scoreboard`). Columns: factorization, kind, n_components,
        explained, explained_held_out, then those of the summary, null where a factorization is not verified, and
        median_kl_ratio_low and median_kl_ratio_high, the ends of the 95% interval of the median over the components.
        Without held-out examples, the summary is of the fitted ones. Fractions explained by different kinds are not
        comparable.

    Raises:
        QueryError: The directory is not a run directory, or has no factorization.
    """
    rows = [row for factorization in factorizations_of(run_dir) for row in _rows(factorization)]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    table = pa.table(columns)
    nulls = [position for position, field in enumerate(table.schema) if pa.types.is_null(field.type)]
    for position in nulls:
        table = table.set_column(position, table.column_names[position], table.column(position).cast(pa.float64()))
    return table


def _rows(factorization: Factorization) -> list[dict[str, Any]]:
    rows = []
    for scores in factorization.scores:
        low, high = factorization.interval(scores) or (None, None)
        interval = {"median_kl_ratio_low": low, "median_kl_ratio_high": high}
        rows.append(factorization.facts | scores.to_json() | interval)
    return rows or [factorization.facts]
