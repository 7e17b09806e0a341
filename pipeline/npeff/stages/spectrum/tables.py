"""The tables of the stage `spectrum`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.fisher.spectrum import cumulative_shares, spectrum_statistics
from npeff.runs.directory import RunDirectory
from npeff.stages.spectrum.group_sums import Totals
from npeff.stages.spectrum.plan import ALL, N_GROUPS, SETS, SpectrumPlan
from npeff.statistics.jackknife import jackknife_interval
from npeff.store.tables import rows_to_columns, write_table

Statistics = dict[str, float | None]


@dataclass(frozen=True)
class Found:
    """The results of the workers."""

    sums: Mapping[tuple[int, ...], NDArray[np.float64]]
    """Eigenvalues of Σ F_i over sets of groups, descending and divided by the scale; none if they are not computed."""
    totals: Sequence[Totals]
    """Numbers of each group."""
    plan: SpectrumPlan
    n_parameters: int
    labels: str
    """Kind of the labels."""

    def eigenvalues(self) -> NDArray[np.float64]:
        """Return the eigenvalues of the mean Fisher of all examples."""
        return self.sums.get(ALL, np.empty(0)) * (self.plan.scale / max(self.plan.n_examples, 1))

    def statistics(self, groups: tuple[int, ...]) -> tuple[int, Statistics]:
        """Return the number of examples of some groups, and their statistics."""
        sums_D = self.sums.get(groups)
        totals = reduce(Totals.__add__, (self.totals[group] for group in groups))
        n_examples = totals.n_examples
        factor = self.plan.scale / max(n_examples, 1)
        eigenvalues_D = np.empty(0) if sums_D is None else sums_D * factor
        found = spectrum_statistics(eigenvalues_D, n_examples, self.n_parameters)
        if sums_D is None:
            found = dict.fromkeys(found)
        if n_examples:
            found["trace"] = totals.trace * factor
            found["mean_eigenvalue"] = totals.trace * factor / self.n_parameters
            found["mean_squared_norm"] = totals.squares * factor * self.plan.scale
        else:
            found["mean_squared_norm"] = None
        found["cap"] = float(min(totals.n_rows, self.plan.dim, self.n_parameters))
        return n_examples, found


def statistics_rows(found: Found, traces: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the rows of the table `spectrum_statistics`.

    Args:
        found: The results of the workers.
        traces: Trace of the mean Fisher over each parameter; none if it is not known.
    """
    n_all, of_all = found.statistics(ALL)
    of_sets = [found.statistics(groups) for groups in SETS]
    sizes = [totals.n_examples for totals in found.totals]
    rows = [
        _row(found, name, None, n_all, value, _interval(name, value, of_sets[:N_GROUPS], sizes))
        for name, value in of_all.items()
    ]
    for n_examples, of_set in of_sets[N_GROUPS:]:
        if n_examples and n_examples < n_all:
            rows += [_row(found, name, None, n_examples, value) for name, value in of_set.items()]
    of_groups: dict[str, float] = {}
    for parameter, trace in traces.items():
        layer = parameter.rpartition(".")[0] or parameter
        of_groups[layer] = of_groups.get(layer, 0.0) + trace
    return rows + [_row(found, "trace", layer, n_all, trace) for layer, trace in of_groups.items()]


def write_tables(run: RunDirectory, found: Found, rows: Sequence[dict[str, Any]], lineage: str | None) -> None:
    """Write the tables of the stage."""
    eigenvalues_D = found.eigenvalues()
    columns = {
        "index": np.arange(len(eigenvalues_D)),
        "eigenvalue": eigenvalues_D,
        "cumulative": [_known(share) for share in cumulative_shares(eigenvalues_D).tolist()],
    }
    write_table(run.shared_table("spectrum"), "spectrum", columns, lineage)
    columns_of_rows = rows_to_columns(rows, "spectrum_statistics")
    write_table(run.shared_table("spectrum_statistics"), "spectrum_statistics", columns_of_rows, lineage)


def _interval(
    name: str, value: float | None, without: Sequence[tuple[int, Statistics]], sizes: Sequence[int]
) -> tuple[float, float] | None:
    """Return the interval of a statistic; None if it is not known without some group."""
    values = [of_set[name] for (_, of_set), size in zip(without, sizes, strict=True) if size]
    known = [each for each in values if each is not None]
    if name == "cap" or value is None or len(known) < len(values):
        return None
    return jackknife_interval(value, known, [size for size in sizes if size])


def _row(
    found: Found,
    name: str,
    group: str | None,
    n_examples: int,
    value: float | None,
    interval: tuple[float, float] | None = None,
) -> dict[str, Any]:
    low, high = (None, None) if interval is None else interval
    return {
        "name": name,
        "parameter_group": group,
        "labels": found.labels,
        "n_examples": n_examples,
        "value": value,
        "low": None if low is None else max(low, 0.0),
        "high": high,
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
