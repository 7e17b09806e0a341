"""Means and paired differences of what inputs.py measured, with intervals, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from npeff.statistics.paired_bootstrap import Interval, mean_interval, paired_difference

from inputs_stage.methods import JUDGED, METHODS, RIVALS
from inputs_stage.problems import Problem
from inputs_stage.trials import COLUMNS


def summary(problem: Problem, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Print the tables of a problem, and return their numbers.

    The examples of all models are pooled. Values on the same example, under several models, are one observation.
    """
    ids_N = np.concatenate([record["ids"] for record in records])
    rows = {}
    for name in records[0]["values"]:
        means = {column: mean_interval(_pooled(records, name, column), ids_N) for column in COLUMNS}
        rows[name] = {
            "means": {column: asdict(interval) for column, interval in means.items()},
            "spreads": {column: [record["spreads"][name][column] for record in records] for column in COLUMNS},
            "cpu_ms": float(np.mean([record["cpu_ms"][name] for record in records])),
        }
    pairs = {
        f"{ours} minus {rival}": {column: _difference(records, ours, rival, column, ids_N) for column in COLUMNS}
        for ours in JUDGED
        for rival in RIVALS
        if rival in rows
    }
    found = {
        "accuracy": [record["accuracy"] for record in records],
        "n_examples": [len(record["ids"]) for record in records],
        "n_distinct": len(set(ids_N.tolist())),
        "cpu_seconds": sum(record["cpu_seconds"] for record in records),
        "methods": rows,
        "pairs": pairs,
    }
    _show(problem, found)
    return found


def _pooled(records: Sequence[dict[str, Any]], name: str, column: str) -> np.ndarray:
    return np.concatenate([np.array(record["values"][name][column], np.float64) for record in records])


def _difference(
    records: Sequence[dict[str, Any]], ours: str, rival: str, column: str, ids_N: np.ndarray
) -> dict[str, Any]:
    """Return the advantage of ours, over all models and for each: positive where ours is better."""
    sign = COLUMNS[column][2]

    def advantage(chosen: Sequence[dict[str, Any]], groups: np.ndarray) -> Interval:
        first, second = (sign * _pooled(chosen, name, column) for name in (ours, rival))
        return paired_difference(first, second, groups)

    each = [advantage([record], np.array(record["ids"])) for record in records]
    return asdict(advantage(records, ids_N)) | {"by_model": [asdict(interval) for interval in each]}


def _show(problem: Problem, found: dict[str, Any]) -> None:
    accuracy = ", ".join(f"{value:.3f}" for value in found["accuracy"])
    print(f"\n{problem.name}: {found['n_examples']} examples ({found['n_distinct']} different), accuracy {accuracy},")
    print(f"{found['cpu_seconds']:.0f} s of CPU time\n")
    print("| method | " + " | ".join(COLUMNS) + " | CPU ms per example |\n" + "|---" * (len(COLUMNS) + 2) + "|")
    for name, row in found["methods"].items():
        cells = [f"{row['means'][column]['mean']:.3f}" for column in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} | {row['cpu_ms']:.2f} |")
    widths = [
        max((row["means"][column]["high"] - row["means"][column]["low"]) / 2 for row in found["methods"].values())
        for column in COLUMNS
    ]
    print(f"| widest interval, ± | {' | '.join(f'{width:.3f}' for width in widths)} | |")
    print("\nChosen spreads, by model:")
    for name, row in found["methods"].items():
        if METHODS[name].noise is not None:
            print(f"  {name}: " + "; ".join(_spreads(row["spreads"][column]) for column in COLUMNS))
    print("\nAdvantage of ours (positive: ours is better) with 95% intervals, and the models for which it is above 0\n")
    print("| ours minus | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, columns in found["pairs"].items():
        print(f"| {name} | " + " | ".join(_cell(columns[column]) for column in COLUMNS) + " |")


def _spreads(spreads: Sequence[float]) -> str:
    return f"{spreads[0]:g}" if len(set(spreads)) == 1 else ", ".join(f"{spread:g}" for spread in spreads)


def _cell(row: dict[str, Any]) -> str:
    above = sum(each["low"] > 0 for each in row["by_model"])
    return f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}) {above}/{len(row['by_model'])}"
