"""Scales of people, from their answers, and of a model beside them, as rows of one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import npeff
from npeff.errors import NpeffError

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from npeff.runs.directory import RunDirectory

OBSERVER = "observer"
_MODEL = "model"
"""The observer of the rows of the model."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Intervals:
    """Options of the bootstrap intervals."""

    confidence_level: float
    draws: int
    seed: int


def scales_of_people(
    answers: Mapping[str | None, Sequence[tuple[int, ...]]], source: Path, intervals: Intervals
) -> list[Row]:
    """Return one row for each observer and level.

    Raises:
        NpeffError: The scale of an observer cannot be estimated.
    """
    from npeff.perception.difference_scaling import DifferenceScaling

    rows = []
    for observer, given in answers.items():
        try:
            fitted = DifferenceScaling().fit(given)
            found = fitted.intervals(intervals.confidence_level, n_draws=intervals.draws, seed=intervals.seed)
        except ValueError as error:
            whose = "" if observer is None else f"observer {observer!r}: "
            raise NpeffError(f"{source}: {whose}{error}", path=source) from None
        for number, psi in enumerate(fitted.psi_.tolist()):
            rows.append(
                {
                    OBSERVER: observer,
                    "level": number,
                    "psi": psi,
                    "low": float(found.low_n[number]),
                    "high": float(found.high_n[number]),
                    "sigma": fitted.sigma_,
                    "sigma_low": found.sigma[0],
                    "sigma_high": found.sigma[1],
                    "n_trials": len(given),
                    "n_draws": intervals.draws - found.n_left_out,
                }
            )
    return rows


def check_levels(people: Sequence[Row], run: RunDirectory) -> None:
    """Check that the paths of a run lead over the levels of the answers.

    Raises:
        NpeffError: The paths are not those of one stimulus, or the observers have different numbers of levels.
    """
    wanted = run.config.scale_or_default
    n_pairs = wanted.pairs if isinstance(wanted.pairs, int) else len(wanted.pairs)
    if wanted.along is None and n_pairs > 1:
        raise NpeffError(
            f"the paths of {run.path} do not lead over the levels of the answers",
            "give --along with the stimulus parameter of the answers, or one pair in scale.pairs",
        )
    if len({len(scale) for scale in _scales(people).values()}) > 1:
        raise NpeffError("the observers have different numbers of levels", "put them into different files")


def _scales(people: Sequence[Row]) -> dict[str | None, list[float]]:
    scales: dict[str | None, list[float]] = {}
    for row in people:
        scales.setdefault(row[OBSERVER], []).append(row["psi"])
    return scales


def with_model(people: Sequence[Row], run: RunDirectory, intervals: Intervals) -> list[Row]:
    """Return the rows of people with those of the model of a run, whose paths lead over the same levels.

    The scale of the model is the mean over its paths, with a bootstrap interval over the paths. The column ``matching``
    is the area matching score of the model with the scale of each observer.

    Raises:
        NpeffError: No path has a scale, because no prediction changes.
    """
    from npeff.perception.matching import area_matching_score
    from npeff.perception.scales import mean_scale

    store = npeff.ComponentStore.open(run.path, run.name)
    plain = {row["path"] for row in store.table("paths").to_pylist() if row["component"] is None}
    paths: dict[int, tuple[list[float], list[float]]] = {}
    for row in store.table("scales").to_pylist():
        if row["space"] == _MODEL and row["path"] in plain and row["psi"] is not None:
            positions, values = paths.setdefault(row["path"], ([], []))
            positions.append(row["s"])
            values.append(row["psi"])
    if not paths:
        raise NpeffError(f"no path of {run.path} has a scale", "choose examples whose predictions change")
    scales = _scales(people)
    n_levels = len(next(iter(scales.values())))
    mean = mean_scale(
        list(paths.values()),
        n_levels,
        intervals.confidence_level,
        n_draws=intervals.draws,
        seed=intervals.seed,
    )
    levels = [level / (n_levels - 1) for level in range(n_levels)]
    matching = {observer: area_matching_score(levels, scale, mean.psi_n) for observer, scale in scales.items()}
    columns = (mean.psi_n.tolist(), mean.low_n.tolist(), mean.high_n.tolist())
    rows = [
        {OBSERVER: _MODEL, "level": level, "psi": psi, "low": low, "high": high}
        | {"n_paths": len(paths), "n_draws": intervals.draws}
        for level, (psi, low, high) in enumerate(zip(*columns, strict=True))
    ]
    return [*({**row, "matching": matching[row[OBSERVER]]} for row in people), *rows]


def as_table(rows: Sequence[Row]) -> pa.Table:
    """Return the rows as a table. A column that a row lacks is null there."""
    import pyarrow as pa

    kinds = {OBSERVER: pa.string(), **dict.fromkeys(("level", "n_trials", "n_draws", "n_paths"), pa.int64())}
    names = dict.fromkeys(name for row in rows for name in row)
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows], schema)
