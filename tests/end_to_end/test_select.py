"""`npeff select` on planted Fishers: what is found, what a kill costs, what can be asked of it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npeff.cli.main import main
from npeff.execution.create import make_executor
from npeff.execution.executor import WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.factorization import InvalidProblemError
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.factorize.stage import factorize
from npeff.stages.select.stage import select
from npeff.stages.status import status
from npeff.store.tables import read_table
from planted import planted_fishers
from planted_run import planted_run

PLANTED = 6
PROBLEM = planted_fishers(n_examples=480, rank=3, dim=32, n_components=PLANTED, noise=0.2, n_active=3, seed=0)
SELECTION = {"components": [2, 4, 9, 12], "seeds": 2}


def prepared(path: Path, **sections: Any) -> RunDirectory:
    return planted_run(path, PROBLEM, **{"selection": SELECTION, **sections})


class Counting(SerialExecutor):
    """Counts the fits, and is killed, as by Ctrl-C, when there have been `limit` of them."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.fits, self.limit = 0, limit

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **more: Any) -> Iterator[tuple[Any, Any]]:
        for item, result in super().map(spec, method, items, **more):
            if self.fits == self.limit:
                raise KeyboardInterrupt
            self.fits += 1
            yield item, result


def table(run: RunDirectory) -> list[dict[str, Any]]:
    return read_table(run.table("selection"), "selection").to_pylist()


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = prepared(tmp_path_factory.mktemp("select") / "run")
    select(run)
    return run


def test_the_planted_number_is_found_and_said_to_be_clear(selected: RunDirectory) -> None:
    found = select(selected)
    assert abs(found["n_components"] - PLANTED) <= 1
    assert found["sharp"]
    rows = {row["n_components"]: row for row in table(selected)}
    assert {2, 4, 9, 12} < set(rows)
    assert [row["n_components"] for row in rows.values() if row["recommended"]] == [found["n_components"]]
    assert rows[PLANTED]["n_come_back"] == PLANTED
    assert rows[PLANTED]["silhouette_min"] > 0.9
    assert rows[12]["explained_held_out"] - rows[PLANTED]["explained_held_out"] < 0.05
    assert rows[PLANTED]["explained_held_out"] - rows[4]["explained_held_out"] > 0.1


@pytest.mark.slow
def test_a_killed_search_goes_on_and_finds_the_same(selected: RunDirectory, tmp_path: Path) -> None:
    run = prepared(tmp_path / "run")
    n_fits = len(table(selected)) * 6
    with pytest.raises(KeyboardInterrupt):
        select(run, executor=Counting(limit=10))
    (row,) = [row for row in status(run) if row.stage == "select"]
    assert (row.state, row.done) == ("partial", "10 fits")
    again = Counting()
    select(run, executor=again)
    assert again.fits == n_fits - 10
    assert table(run) == table(selected)
    idle = Counting()
    assert select(run, executor=idle) == run.record("select")
    assert idle.fits == 0
    run.table("selection").unlink()
    select(run, executor=idle)
    assert idle.fits == 0, "the table is made again from the fits that are stored"
    more = RunDirectory(run.path, run.config.with_selection(seeds=3, components="4,6", refine=False))
    select(more, executor=idle)
    assert idle.fits == 2 * 3, "only the fits of the third seed are new"
    assert [row["n_fits"] for row in table(more)] == [9, 9]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_actors_find_the_same(selected: RunDirectory, tmp_path: Path) -> None:
    run = prepared(tmp_path / "run")
    with make_executor(
        "ray", address="local", workers=2, cpus_per_worker=1, gpus_per_worker=0, timeout_s=120
    ) as executor:
        select(run, executor=executor)
    assert table(run) == table(selected)


def test_halves_judge_each_other_where_nothing_is_held_out(tmp_path: Path) -> None:
    few = {"components": [3, 6], "seeds": 1, "refine": False}
    run = prepared(tmp_path / "run", factorization={"n_components": 6, "held_out_fraction": 0.0}, selection=few)
    select(run)
    fits = read_table(run.table("selection_fits"), "selection_fits").to_pylist()
    judged = {(fit["n_components"], fit["part"]): fit["explained_held_out"] for fit in fits}
    assert judged[6, "all"] is None
    expected = (judged[6, "first"] + judged[6, "second"]) / 2
    assert table(run)[1]["explained_held_out"] == pytest.approx(expected)
    assert table(run)[1]["cosine_seeds"] is None


def test_the_result_can_be_asked_for_and_is_in_the_report(
    selected: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ComponentStore.open(selected.path)
    assert store.table("selection").num_rows == len(table(selected))
    best = store.sql("select n_components from selection where recommended").to_pylist()
    assert best == [{"n_components": select(selected)["n_components"]}]
    with pytest.raises(SystemExit) as ended:
        main(["select", str(selected.path)])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "n_come_back" in shown
    page = selected.report.read_text(encoding="utf-8")
    assert 'id="selection"' in page
    assert page.count('<polyline class="series') == 4


def test_components_of_a_fit_carry_their_stability(tmp_path: Path) -> None:
    lowest = []
    for n_components in (PLANTED, PLANTED + 3):
        run = prepared(tmp_path / str(n_components), factorization={"n_components": n_components})
        factorize(run)
        stability_K = read_table(run.table("components"), "components")["stability"].to_numpy()
        lowest.append(stability_K.min())
        assert np.median(stability_K) > 0.95
    assert lowest[0] > 0.95
    assert lowest[1] < 0.8, "there are no more components than these that halves of the examples agree on"


def test_stability_is_null_where_it_was_not_asked_for_or_cannot_be_had(tmp_path: Path) -> None:
    off = prepared(tmp_path / "off", factorization={"n_components": 3, "stability_examples": 0})
    few = prepared(tmp_path / "few", factorization={"n_components": 9, "stability_examples": 4})
    for run in (off, few):
        summary = factorize(run)
        components = read_table(run.table("components"), "components")
        assert components["stability"].null_count == len(components)
        assert summary["median_stability"] is None


def test_the_recommended_number_may_be_taken_up_until_something_is_factorized(tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", factorization={"n_components": 3})
    taken = run.config.model_copy(
        update={"factorization": run.config.factorization.model_copy(update={"n_components": 4})}
    )
    factorize(RunDirectory.create(taken))
    assert RunDirectory.open(run.path).config.factorization.n_components == 4
    with pytest.raises(RunDirectoryError, match=r"factorization\.n_components"):
        RunDirectory.create(run.config)


def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", selection={"components": [4, 600]})
    with pytest.raises(InvalidProblemError, match="n_components=600 exceeds the 480 factor rows of 160 examples"):
        select(run)
    with pytest.raises(ConfigError, match="is not a list of numbers of components"):
        run.config.with_selection(components="8:64:8:2")
    with pytest.raises(ConfigError, match="greater than 0"):
        run.config.with_selection(seeds=0)
    with pytest.raises(QueryError, match="npeff select"):
        ComponentStore.open(run.path).table("selection")
    empty = RunDirectory.create(RunConfig.model_validate({**run.config.model_dump(), "run_dir": str(tmp_path / "new")}))
    with pytest.raises(RunDirectoryError, match="npeff fishers"):
        select(empty)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("8,16", (8, 16)), ("8:24:8", (8, 16, 24)), ("3:5", (3, 4, 5)), ("4, 2:8:4,9", (2, 4, 6, 9)), ("8", (8,))],
)
def test_ranges_are_read_as_they_are_meant(text: str, numbers: tuple[int, ...], tmp_path: Path) -> None:
    document = {"run_dir": "x", "task": {"name": "digits"}, "factorization": {"n_components": 2}}
    config = RunConfig.model_validate({**document, "selection": {"components": text}})
    assert config.selection.components == numbers
    assert config.differences(RunConfig.model_validate(document)) == []


@pytest.mark.parametrize("text", ["", "a", "8:", "0", "-4", "8:4", "1:9:0", "8;16"])
def test_what_is_no_range_is_refused(text: str) -> None:
    document = {"run_dir": "x", "task": {"name": "digits"}, "factorization": {"n_components": 2}}
    with pytest.raises(ValueError, match="give 8,16,32 or 8:64:8"):
        RunConfig.model_validate({**document, "selection": {"components": text}})
