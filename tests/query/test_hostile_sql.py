"""Hostile and odd SQL: a table or one line, in bounded time; never a file, a setting or a traceback."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pyarrow as pa
import pytest
from in_process import command, refused
from npeff.query import sql
from npeff.query.errors import QueryError
from npeff.query.sql import run_sql
from npeff.query.tables import RunTables

SECRET = "a-line-of-a-file"

TABLES = """
SELECT 1
SELECT NULL
SELECT 1 AS a, 2 AS a, 3 AS "A"
FROM examples LIMIT 0
TABLE classes
VALUES (1, 'a'), (NULL, 'b')
SELECT DATE '290000-01-01', DATE '0044-03-15 (BC)', 'infinity'::date, '-infinity'::date
SELECT 'infinity'::timestamp, '-infinity'::timestamptz, TIMESTAMP '290000-01-01 00:00:00'
SELECT TIMESTAMP_NS '2020-01-01 00:00:00.000000001', TIMESTAMP_S '9999-12-31 23:59:59', TIMESTAMP_MS '10000-01-01'
SELECT TIMESTAMPTZ '2020-01-01 00:00:00+03', TIMETZ '10:00:00+01', TIME '24:00:00'
SELECT INTERVAL '1' YEAR, INTERVAL '178956970' YEAR
SELECT [DATE '290000-01-01', NULL], {'a': DATE '290000-01-01'}, MAP {'a': DATE '290000-01-01'}
SELECT * FROM test_all_types()
SELECT * FROM test_vector_types(NULL::INTEGER)
SELECT 170141183460469231731687303715884105727, 340282366920938463463374607431768211455::UHUGEINT
SELECT 1e400, '-inf'::double, 'nan'::float, -0.0, 1e-320
SELECT 12345678901234567890123456789.123456789::DECIMAL(38, 9)
SELECT '\\x00\\xff'::BLOB, '101'::BIT, uuid(), 'a'::ENUM('a', 'b')
SELECT union_value(a := 1), row(1, 2), {'a': {'b': [{'c': 1}]}}
SELECT [[[]]], [NULL], {'a': NULL}, MAP {}
SELECT chr(0), chr(27), chr(8238), chr(1114111), repeat('é', 1000)
SELECT unnest(range(1000))
SELECT list(range) FROM range(10000)
SELECT sum(range) FROM range(10000000)
SELECT (SELECT count(*) FROM examples e WHERE e.example < x.example) FROM examples x
SELECT * FROM query('SELECT 1')
SELECT * FROM query_table('examples') LIMIT 1
SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))
SELECT * FROM duckdb_settings()
SELECT * FROM duckdb_functions() LIMIT 3
SELECT * FROM information_schema.tables
SELECT current_setting('threads'), version(), current_user, current_database()
SHOW ALL TABLES
DESCRIBE examples
SUMMARIZE components
WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 1000) SELECT max(n) FROM t
SELECT example, row_number() OVER (ORDER BY fisher_norm) FROM examples QUALIFY row_number() OVER () < 3
SELECT COLUMNS('.*') FROM components
SELECT regexp_replace(repeat('a', 10000), '(a*)*b', 'x')
SELECT * FROM components TABLESAMPLE 50%
SELECT * FROM components ORDER BY ALL
SELECT ' ; DROP VIEW examples' -- comment ; SELECT 2
SELECT /* a */ 1
SELECT $$a'b$$
FROM examples SELECT count(*)
"""

REFUSALS = """

;
;;
SELECT
SELECT 1; SELECT 2
SELEC 1
SELECT 'a
SELECT (1
SELECT * FROM
SELECT no_such_column FROM examples
SELECT no_such_function(1)
SELECT * FROM no_such_table
SELECT ?
SELECT $name
SELECT error('no\\nway')
SELECT 1 / 'a'
SELECT 'a'::INTEGER
SELECT DATE '99999999-01-01'
SELECT 9223372036854775807 + 1
SELECT [1, 2][1]::DATE
SELECT repeat('a', 100000000000)
SELECT * FROM '{file}'
FROM '{file}'
SELECT * FROM "{file}"
SELECT * FROM read_text('{file}')
SELECT * FROM read_blob('{file}')
SELECT * FROM read_csv('{file}')
SELECT * FROM read_csv_auto('{file}', header = false)
SELECT * FROM sniff_csv('{file}')
SELECT * FROM read_json('{file}')
SELECT * FROM read_ndjson_objects('{file}')
SELECT * FROM read_parquet('{file}')
SELECT * FROM parquet_scan('{file}')
SELECT * FROM parquet_metadata('{file}')
SELECT * FROM parquet_schema('{file}')
SELECT * FROM parquet_file_metadata('{file}')
SELECT * FROM read_duckdb('{file}')
SELECT * FROM glob('{folder}/*')
SELECT * FROM query('SELECT * FROM read_text(''{file}'')')
SELECT * FROM query_table('{file}')
SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''{file}'')'))
SELECT * FROM sqlite_scan('{file}', 't')
SELECT * FROM 'https://example.org/x.csv'
SELECT * FROM 's3://bucket/x.parquet'
SELECT getenv('HOME')
SELECT * FROM arrow_scan(1, 2, 3)
SELECT * FROM pandas_scan(1)
SELECT * FROM python_map_function(1)
SELECT * FROM secret_of_the_caller
SELECT * FROM enable_logging(storage = 'file', storage_path = '{folder}/log')
SELECT * FROM duckdb_secrets()
SELECT * FROM which_secret('s3://x', 's3')
SELECT nextval('s')
COPY examples TO '{folder}/new.csv'
COPY (SELECT 1) TO '{folder}/new.parquet' (FORMAT parquet)
EXPORT DATABASE '{folder}/new'
IMPORT DATABASE '{folder}'
ATTACH '{folder}/new.db' AS other
ATTACH ':memory:' AS other
DETACH memory
USE memory
INSTALL httpfs
LOAD httpfs
LOAD '{file}'
SET threads = 1
RESET ALL
PRAGMA database_list
PRAGMA enable_profiling
CALL pragma_version()
CREATE SECRET (TYPE s3)
CREATE TABLE t AS SELECT 1
CREATE MACRO f() AS TABLE SELECT * FROM read_text('{file}')
INSERT INTO classes VALUES (1, 'a')
UPDATE classes SET name = 'a'
DELETE FROM classes
TRUNCATE classes
DROP VIEW examples
ALTER VIEW examples RENAME TO e
VACUUM
CHECKPOINT
BEGIN TRANSACTION
PREPARE p AS SELECT 1
EXECUTE p
EXPLAIN ANALYZE SELECT 1
PIVOT classes ON name USING count(*)
"""


REFUSED = [
    *REFUSALS.splitlines(),
    "SELECT '\ud800'",
    "SELECT 1" + " + 1" * 4_000,
    "SELECT 1" + " + 1" * 40_000,
    "SELECT " + "(" * 5_000,
    "SELECT " + "(" * 5_000 + "1" + ")" * 5_000,
    "SELECT " + "[(" * 2_000,
    "SELECT " + "f(" * 5_000,
    "SELECT " + "- " * 5_000,
    "SELECT " + "-/**/+" * 2_000,
]


@pytest.fixture(scope="module")
def tables(run) -> RunTables:
    return RunTables(run.path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.csv").write_text(f"{SECRET}\n{SECRET}\n")
    return tmp_path


def test_a_hundred_statements_are_tried() -> None:
    assert len(TABLES.strip().splitlines()) + len(REFUSALS.splitlines()) > 125


@pytest.mark.parametrize("query", TABLES.strip().splitlines())
def test_an_odd_question_gives_a_table_that_python_can_show(tables: RunTables, query: str) -> None:
    begun = time.monotonic()
    answer = run_sql(tables, query, timeout_s=60.0)
    assert answer.to_pylist() is not None
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("query", REFUSED, ids=range(len(REFUSED)))
def test_a_question_for_more_than_the_tables_is_refused_in_one_line(
    tables: RunTables, folder: Path, query: str
) -> None:
    secret_of_the_caller = pa.table({SECRET: [SECRET]})
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(QueryError) as caught:
        run_sql(
            tables, query.replace("{file}", str(folder / "data.csv")).replace("{folder}", str(folder)), timeout_s=60.0
        )
    assert len(str(caught.value).splitlines()) == 1
    assert SECRET not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert len(secret_of_the_caller) == 1


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM range(100000000000) a, range(100) b",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
        "SELECT a.range % 7 AS r FROM range(100000000000) a WHERE a.range < 0",
        "SELECT max(md5(a.example::VARCHAR || b.range)) FROM examples a, range(100000000000) b",
    ],
)
def test_an_endless_question_is_stopped(tables: RunTables, query: str) -> None:
    begun = time.monotonic()
    with pytest.raises(QueryError, match=r"^the query took more than 0\.3 s: ask for less"):
        run_sql(tables, query, timeout_s=0.3)
    assert time.monotonic() - begun < 30


def test_a_result_that_is_too_large_is_refused(tables: RunTables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_MOST_BYTES", 2**20)
    with pytest.raises(QueryError, match=r"the result is larger than .*: add LIMIT to the query"):
        run_sql(tables, "SELECT * FROM range(100000000000)")


def test_dates_that_python_has_no_type_for_are_texts_and_others_are_dates(tables: RunTables) -> None:
    query = "SELECT DATE '290000-01-02' AS far, DATE '2024-05-06' AS near, [DATE '290000-01-02'] AS list"
    assert run_sql(tables, query).to_pylist() == [
        {"far": "290000-01-02", "near": datetime.date(2024, 5, 6), "list": "[290000-01-02]"}
    ]


def test_a_condition_is_held_to_the_same_limits(run, folder: Path) -> None:
    from npeff.query.filters import matching

    tables = RunTables(run.path)
    file = folder / "data.csv"
    for condition in (
        f"exists (SELECT 1 FROM read_text('{file}'))",
        f"label IN (SELECT 1 FROM '{file}')",
        "label = '\ud800'",
        "label = 1; SELECT 2",
        "label = " + "(" * 3_000,
        "",
    ):
        with pytest.raises(QueryError) as caught:
            matching(tables, condition)
        assert len(str(caught.value).splitlines()) == 1
        assert SECRET not in str(caught.value)


FORMATS = ("table", "json", "csv", "parquet")


@pytest.mark.parametrize("kind", FORMATS)
def test_odd_values_are_printed_in_every_format_or_refused_in_one_line(
    run, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for query in (
        "SELECT * FROM test_all_types()",
        "SELECT chr(27) || '[31m' AS a, chr(0) AS b, chr(8238) AS c",
    ):
        code = command("query", run.path, "sql", query, "--format", kind, "--output", tmp_path / "answer")
        lines = capfd.readouterr().err.splitlines()
        assert code in (0, 2), lines
        assert len(lines) <= 1 + (kind == "csv")
        assert code == 0 or lines[-1].startswith("npeff: error: ")


def test_the_command_has_a_timeout(run, capfd: pytest.CaptureFixture[str]) -> None:
    endless = "SELECT count(*) FROM range(100000000000) a, range(100) b"
    assert "took more than 0.2 s" in refused(capfd, "query", run.path, "sql", endless, "--timeout", "0.2")
    for wrong in ("0", "-1", "inf", "nan", "1e9", "x"):
        assert "--timeout" in refused(capfd, "query", run.path, "sql", "SELECT 1", f"--timeout={wrong}")


@pytest.mark.parametrize("number", ["9" * 30, "9" * 5000], ids=range(2))
def test_numbers_of_any_size_on_the_command_line_are_used_or_refused_in_one_line(
    run, number: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ("top", "-c", "1", "-n", number),
        ("example", "-e", number),
        ("similar", "-c", "1", "-n", number),
        ("enriched", "--where", "label = 1", "--top", number, "-n", number),
        ("energy", "-c", number),
    ):
        code = command("query", run.path, *words)
        lines = capfd.readouterr().err.splitlines()
        assert (code in (0, 2), len(lines)) == (True, 0 if code == 0 else 1), (words[0], lines)
