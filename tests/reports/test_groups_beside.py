"""The table of the groups of two runs: means over the examples of both, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npeff.query.errors import QueryError
from npeff.query.tables import RunTables
from npeff.reports.groups_beside import groups_beside
from npeff.reports.report import write_report
from npeff.statistics.paired_bootstrap import paired_difference
from npeff.store.schemas import SCHEMAS
from npeff.store.tables import rows_to_columns, write_table
from places import place

SETTINGS = {"label": "prediction", "covariance": "full", "scope": "all", "spread": 0.15, "split": "covariance"}


def written(run: Path, ids: list[str], shares: dict[str, float | None], **settings: Any) -> Path:
    """A run with two groups. `shares`: the share of the image, by id; the information is ten times the share."""
    other = dict.fromkeys(SCHEMAS["examples"].names) | {
        "split": "fit",
        "valid": True,
        "fisher_norm": 1.0,
        "fisher_rank": 1,
    }
    examples = [other | {"example": number, "id": each} for number, each in enumerate(ids)]
    groups = [
        {
            "example": ids.index(each),
            "group": group,
            "share": value,
            "information": 0.0 if value is None else 10 * value,
        }
        for each, share in shares.items()
        for group, value in (("image", share), ("colour", None if share is None else 1 - share))
    ]
    for name, rows in (("examples", examples), ("input_groups", groups)):
        file = run / place(f"tables/{name}.parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_table(file, name, rows_to_columns(rows, name))
    record = run / place("stages/inputs.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(SETTINGS | settings))
    return run


def test_means_are_over_the_examples_that_both_runs_explain(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [f"digit-{number}" for number in range(30)]
    before = {each: float(rng.random()) for each in ids[:20]}
    after = {each: float(rng.random()) for each in ids[5:]} | {ids[7]: None}
    other = written(tmp_path / "before", ids, before)
    run = written(tmp_path / "after", ids[::-1], after)  # with other numbers
    found = groups_beside(RunTables(run), str(other))
    both = [each for each in ids[5:20] if each != ids[7]]
    assert found.n_examples == len(both) == 14
    assert {group.name for group in found.groups} == {"image", "colour"}
    assert found.groups[0].share[1] >= found.groups[1].share[1]
    first, second = np.array([[of[each] for each in both] for of in (before, after)], float)
    image = next(group for group in found.groups if group.name == "image")
    assert image.share == pytest.approx((first.mean(), second.mean()))
    assert image.information == pytest.approx((10 * first.mean(), 10 * second.mean()))
    order = np.argsort(both)
    expected = paired_difference(second[order], first[order])
    assert image.difference == expected
    assert expected.mean == pytest.approx(image.share[1] - image.share[0])


def test_runs_that_are_not_comparable_are_refused_in_one_line(tmp_path: Path) -> None:
    shares: dict[str, float | None] = {"a": 0.5, "b": 0.25}
    run = RunTables(written(tmp_path / "run", ["a", "b", "c"], shares))
    empty = tmp_path / "empty"
    (empty / "tables").mkdir(parents=True)
    wider = written(tmp_path / "wider", ["a", "b"], shares, spread=0.3)
    others = written(tmp_path / "others", ["x", "c"], {"x": 0.5, "c": 0.5})
    twice = written(tmp_path / "twice", ["a", "b", "a"], shares)
    rows = [{"example": number, "group": "image", "share": 0.5, "information": 1.0} for number in range(3)]
    write_table(twice / place("tables/input_groups.parquet"), "input_groups", rows_to_columns(rows, "input_groups"))
    for path, problem in (
        (twice, r"report.beside: several examples of .*twice have the same id: give the examples different ids"),
        (tmp_path / "nowhere", "does not exist"),
        (empty, r"report.beside: .*empty has no groups of inputs: run `npeff inputs .*empty` first"),
        (wider, r"report.beside: inputs.spread is 0.15 in .*run and 0.3 in .*wider: give both runs the same settings"),
        (others, r"no example with a group .* both in .*run and in .*others: use runs of the same task"),
    ):
        with pytest.raises(QueryError, match=problem) as found:
            groups_beside(run, str(path))
        assert "\n" not in str(found.value)


def test_the_report_has_the_table_if_another_run_is_named(informed_run: Any, make_run: Any) -> None:
    page = write_report(informed_run.path).read_text("utf-8")
    assert "Groups of inputs of two runs" not in page
    page = write_report(informed_run.path, beside=str(informed_run.path)).read_text("utf-8")
    table = page[page.index("Groups of inputs of two runs") :].partition("</table>")[0]
    assert str(informed_run.path) in table
    assert "(0.0% to 0.0%)" in table  # the same run
    without = make_run(n_components=3, inputs=False)
    assert "Groups of inputs of two runs" not in write_report(without.path, beside=str(without.path)).read_text("utf-8")
