from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from npeff.query.errors import QueryError
from npeff.query.sql import run_sql
from npeff.query.tables import RunTables


@pytest.fixture
def tables(run) -> RunTables:
    return RunTables(run.path)


def test_every_table_is_a_view_that_joins_with_the_others(tables: RunTables, run) -> None:
    answer = run_sql(
        tables,
        "SELECT component, sum(coefficient) AS mass, count(*) AS n FROM coefficients JOIN examples USING (example) "
        "WHERE split = 'held_out' GROUP BY component ORDER BY component",
    )
    weights = np.nan_to_num(run.coefficients[run.split == "held_out"]).astype(np.float64)
    used = np.flatnonzero(weights.sum(axis=0))
    assert answer["component"].to_pylist() == used.tolist()
    np.testing.assert_allclose(answer["mass"], weights.sum(axis=0)[used], rtol=1e-12)
    assert answer["n"].to_pylist() == (weights > 0).sum(axis=0)[used].tolist()


def test_sums_of_integers_are_integers(tables: RunTables) -> None:
    answer = run_sql(tables, "SELECT sum(component) AS s, sum(component) / 2.0 AS half FROM components")
    assert answer.schema.field("s").type == pa.int64()
    assert answer.to_pylist() == [{"s": 66, "half": 33.0}]


def test_tables_and_their_columns_can_be_listed(tables: RunTables) -> None:
    assert run_sql(tables, "SHOW TABLES")["name"].to_pylist() == tables.names()
    assert "kl_ratio" in run_sql(tables, "DESCRIBE verification")["column_name"].to_pylist()


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM '{outside}'",
        "SELECT * FROM read_text('{outside}')",
        "SELECT * FROM read_csv('{outside}')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM 'https://example.org/x.parquet'",
        "SELECT * FROM variable_of_the_caller",
        "COPY examples TO '{outside}'",
        "ATTACH '{outside}' AS other",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "DROP VIEW examples",
        "CREATE TABLE t AS SELECT 1",
        "SELECT 1; SELECT 2",
        "SELEC 1",
        "SELECT nope FROM examples",
        "SELECT error('no')",
        "",
    ],
)
def test_a_query_can_do_nothing_but_select_from_the_tables(tables: RunTables, tmp_path: Path, query: str) -> None:
    variable_of_the_caller = pa.table({"secret": [1]})
    outside = tmp_path / "outside.csv"
    outside.write_text("secret\n1\n")
    with pytest.raises(QueryError) as caught:
        run_sql(tables, query.format(outside=outside))
    assert "\n" not in str(caught.value)
    assert outside.read_text() == "secret\n1\n"
    assert len(variable_of_the_caller) == 1
