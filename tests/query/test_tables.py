from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from npeff.query.errors import QueryError
from npeff.query.sql import run_sql
from npeff.query.tables import RunTables
from npeff.storage.location import location
from npeff.storage.objects import put
from npeff.store.table_names import WRITTEN_BY
from npeff.store.tables import write_table
from object_store import ObjectStore
from places import place


@pytest.mark.parametrize(("name", "command"), sorted(WRITTEN_BY.items()))
def test_a_table_that_is_not_written_yet_names_the_command_that_writes_it(
    make_run: Callable, name: str, command: str
) -> None:
    path = make_run(n_components=4).path
    (path / place(f"tables/{name}.parquet")).unlink(missing_ok=True)
    with pytest.raises(QueryError, match=f"^table '{name}' does not exist yet: run `npeff {command} {path}` first$"):
        RunTables(path).read(name)


def test_an_unknown_table_is_answered_with_those_that_exist(run) -> None:
    with pytest.raises(QueryError, match=r"^there is no table 'nope': this run has classes, coefficients, "):
        RunTables(run.path).read("nope")


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more", b"x" * 4000])
def test_a_damaged_table_is_named_in_one_line_with_what_to_do(make_run: Callable, content: bytes) -> None:
    path = make_run(n_components=4).path
    damaged = path / place("tables/verification.parquet")
    damaged.write_bytes(content)
    with pytest.raises(QueryError, match=f"delete it and run `npeff verify {path}` again$") as caught:
        RunTables(path).read("verification")
    assert str(damaged) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_table_is_damaged_too(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    table = path / place("tables/coefficients.parquet")
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(QueryError, match="is damaged"):
        RunTables(path).read("coefficients")


def test_absent_records_are_empty_and_damaged_ones_are_named(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    tables = RunTables(path)
    assert tables.record("transform") == {}
    (path / "provenance.json").write_text("{")
    with pytest.raises(QueryError, match=r"provenance\.json is not valid JSON"):
        tables.json("provenance.json")


def test_stages_come_in_the_order_in_which_they_run(run) -> None:
    assert list(RunTables(run.path).stages()) == ["fishers", "factorize", "lift", "verify"]


def test_whole_tables_on_an_object_store_are_read_in_few_requests(s3: ObjectStore, tmp_path: Path) -> None:
    n = 150_000
    rows = {"component": np.arange(n) // 1000, "example": np.arange(n), "coefficient": np.linspace(0, 1, n)}
    file = tmp_path / place("tables/coefficients.parquet")
    write_table(file, "coefficients", rows)
    pq.write_table(RunTables(tmp_path).file("coefficients").read(), file, row_group_size=500)
    remote = location(f"s3://runs/run/{place('tables/coefficients.parquet')}")
    put(remote, file.read_bytes())
    here, there = RunTables(tmp_path), RunTables(location("s3://runs/run"))
    assert there.file("coefficients").num_row_groups == 300
    s3.requests.clear()
    query = "select component, sum(example) as s from coefficients where example % 7 = 3 group by 1 order by 1"
    assert run_sql(there, query) == run_sql(here, query)
    assert len([request for request in s3.requests if request.kind == "GET"]) <= 20
    s3.requests.clear()
    scanned = [pa.Table.from_batches(tables.scan("coefficients", ["example", "component"])) for tables in (there, here)]
    assert scanned[0].combine_chunks() == scanned[1].combine_chunks()
    assert len([request for request in s3.requests if request.kind == "GET"]) <= 20
