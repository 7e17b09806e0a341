"""The Parquet tables ``<run>/tables/<name>.parquet``: their schemas, and checked reading and writing.

Rows are stored in small row groups with statistics, so that a query for a few rows reads little data. The key-value
metadata of a file contain the name and the schema version of the table. A file without these metadata has version 1,
which differs from version 2 only in larger row groups. In version 2, the tables `verification` and `selectivity` lack
the columns of `_SINCE_VERSION_3`, and the controls of `verification` have the random baseline.

A float is null if it is not known (yet), and NaN or infinite if the computation gave this value. The table `examples`
may have further columns with the metadata of the task.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from npeff.errors import first_line
from npeff.storage.atomic import write_file_atomically
from npeff.storage.errors import StoreError, damaged_file, os_errors_explained
from npeff.storage.location import location

_TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "float32s": pa.list_(pa.float32()),
}


def _schema(columns: str) -> pa.Schema:
    """Parse a schema "name:type ...". A type that ends in ? is nullable."""
    pairs = [column.split(":") for column in columns.split()]
    return pa.schema([pa.field(name, _TYPES[kind.rstrip("?")], nullable=kind.endswith("?")) for name, kind in pairs])


SCHEMAS: dict[str, pa.Schema] = {
    "examples": _schema(
        "example:int id:str label:int? prediction:int? correct:bool? split:str valid:bool fisher_norm:float "
        "fisher_rank:int kept_trace:float? loss:float? logits:float32s? image:bytes? text:str?"
    ),
    "classes": _schema("class:int name:str"),
    "parameters": _schema("parameter:str shape:str? size:int? taken:bool reason:str?"),
    "components": _schema(
        "component:int n_active:int mass:float energy:float nearest_component:int? nearest_cosine:float? "
        "lift_cosine:float? cosine_own:float? stability:float?"
    ),
    "top_examples": _schema("component:int split:str rank:int example:int coefficient:float"),
    "coefficients": _schema("example:int component:int coefficient:float"),
    "history": _schema(
        "iteration:int loss:float objective:float explained:float mu:float accepted:bool n_dead:int seconds:float"
        " sent_bytes:int"
    ),
    "selection": _schema(
        "n_components:int recommended:bool explained_held_out:float n_come_back:float balance:float "
        "cosine_seeds:float? cosine_halves:float silhouette_mean:float? silhouette_min:float? "
        "explained:float explained_held_out_sd:float? n_fits:int"
    ),
    "selection_fits": _schema(
        "n_components:int seed:int part:str explained:float explained_held_out:float? n_iter:int stopped:str "
        "seconds:float"
    ),
    "layer_energy": _schema("component:int parameter:str energy:float"),
    "verification": _schema(
        "component:int examples:str sign:int informative:bool? target_kl:float? epsilon:float reached_target:bool "
        "n_top:int kl_top:float "
        "matched:bool? n_matched:int? n_by_trace:int? trace_ratio:float? kl_matched:float? kl_ratio_matched:float? "
        "kl_ratio_matched_low:float? kl_ratio_matched_high:float? above_controls:bool "
        "kl_ratio_trace:float? small_step_ratio:float? auc:float? changed_top:float? changed_matched:float? "
        "n_baseline:int kl_baseline:float? kl_ratio:float? kl_ratio_low:float? kl_ratio_high:float? "
        "fisher_norm_ratio:float? "
        "random_epsilon:float? random_kl_top:float? random_kl_baseline:float? random_kl_ratio:float? "
        "other_component:int? other_epsilon:float? other_kl_top:float? other_kl_baseline:float? other_kl_ratio:float? "
        "other_kl_ratio_checked:float? kl_correlation:float? "
        "accuracy_top_before:float? accuracy_top_after:float? "
        "accuracy_baseline_before:float? accuracy_baseline_after:float? examples_passed:int?"
    ),
    "ablation": _schema(
        "component:int examples:str displacement:float n_top:int n_baseline:int "
        "kl_top:float kl_baseline:float kl_ratio:float kl_ratio_low:float kl_ratio_high:float above_controls:bool "
        "fisher_norm_ratio:float random_kl_top:float random_kl_baseline:float random_kl_ratio:float "
        "other_component:int? other_kl_top:float? other_kl_baseline:float? other_kl_ratio:float? "
        "accuracy_top_before:float? accuracy_top_after:float? "
        "accuracy_baseline_before:float? accuracy_baseline_after:float?"
    ),
    "position_shares": _schema("component:int example:int position:int start:int? stop:int? token:str? share:float"),
    "repair": _schema("component:int n_top:int n_wrong:int odds_ratio:float p_value:float q_value:float"),
    "repair_steps": _schema(
        "edit:int component:int? sign:int? step:float n_target:int mended_target:int gained:int broken:int "
        "accuracy_tuning:float chosen:bool"
    ),
    "selectivity": _schema("moved:int component:int examples:str sign:int n_examples:int kl:float kl_checked:float?"),
}
"""Schemas by table name.

examples: one row per example. `split` is "fit" or "held_out"; `image` is a PNG; `fisher_norm` is ‖F_i‖_F; `fisher_rank`
    is the number of rows of the factor; `kept_trace` is the fraction of the trace of the labels' Fisher that these rows
    cover, null for sampled and empirical labels; `loss` is the mean of -log p(label), null without labels.
    `prediction`, `correct` and `logits` are null for sequences.
classes: the names of the model's classes.
parameters: the parameters of the model. `shape`, such as 384x384, and `size` are those of the `taken` parameters;
    `reason` is why a parameter is not taken.
components: `mass` Σ_i W_ij and `energy` Σ_i W_ij² over the fit examples; `nearest_*` by |cos| in the sketch, null for a
    single component; `lift_cosine` between the sketched direction and the component or, for whitened directions, the
    combination of components, and `cosine_own` between the direction and the component's own direction, both null
    before the lift; `stability`,
    the mean |cos| with the matching components of fits to two halves of the examples, null if not computed.
top_examples: `rank` from 0, per component and split.
coefficients: the non-zero W_ij, ordered by component, then in descending order.
history: one row per iteration of the solver. `mu` is the damping or, for diagonals, the extrapolation parameter;
    `objective` is the loss with the penalties; `sent_bytes` is the number of bytes that each worker sends to all other
    workers together in the iteration.
selection: one row per number of components tried. `explained_held_out` is measured on held-out examples, or for each
    half of the examples on the other half if there are no held-out examples; it is the mean over the fits, with its
    standard deviation. `cosine_seeds` and `cosine_halves` are the mean matched |cos| of fits to the same examples, and
    to two halves. `n_come_back` is the number of components with a match of at least 0.9, and `balance` is
    Σ (2 cos² − 1); each is the smaller of the means over pairs of seeds and over pairs of halves. The silhouettes are
    those of clusters of components.
selection_fits: one row per fit. `part` is the fitted part of the examples: "all", or the "first" or "second" half of
    the split of the seed.
layer_energy: fraction of the squared norm of a component's direction in each parameter; the fractions sum to 1.
verification: one row per (component, examples "fit" or "held_out", sign +1 or -1). `informative` is whether the sign
    lowers the confidence on the fitted top examples; `target_kl` is the KL divergence that the step should give the top
    examples, null for a step of fixed length. The matched baseline has `n_matched` distinct examples of the same
    predicted class and the nearest trace of the Fisher; `n_by_trace` top examples are matched by the trace alone;
    `trace_ratio` is the ratio of the mean traces; `matched` is whether the component counts in the headline.
    `kl_ratio_matched` is the KL ratio with this baseline, and `low` and `high` are the ends of a 95% interval;
    `above_controls` is whether it is above 1, `trace_ratio` and the ratios of the controls with 95% confidence. The
    controls (`npeff.verification.controls`) have the same top and baseline examples. `kl_ratio_trace` is the ratio with
    the baseline matched by the trace alone, `kl_ratio` that with `n_baseline` random examples. `small_step_ratio` is
    the ratio of the evidences ‖A ĝ‖². `auc` is that of the KL divergences; `changed` are the fractions of predictions
    whose class changes. `kl_correlation` is the rank correlation between coefficients and KL divergences over random
    examples. `other_kl_ratio_checked` is a measured value of a predicted one. `examples_passed` is the number of
    examples that were passed through the model for the row. A column is null if its value does not exist or was not
    measured: accuracies without labels, ratios of a step that does not reach its target.
selectivity: mean KL divergence on the first top examples of `component` for the verification step along the direction
    of `moved`; on held-out examples if there are any. `kl_checked` is a measured value of a predicted `kl`.
ablation: columns of `verification`, with random baseline examples also for the controls, for the step that removes the
    part of the parameters along a direction. The step has length `displacement`, and so have the steps of the controls.
    One row per (component, examples), if requested.
position_shares: the evidence ‖A_i ĝ_j‖² of a top example for a direction, split over the tokens of the example.
    `share` is a fraction of the evidence and may be negative; the rest to 1 belongs to layers without positions.
    `start` and `stop` are characters of the example's text, null for a token that is not in the text.
repair: number of wrong predictions among each component's top examples, with a one-sided hypergeometric test and its
    Benjamini-Hochberg q-value; smallest p-value first.
repair_steps: one row per step tried. `mended_target` is the number of wrong top examples that the step corrects;
    `gained` is the number of right predictions gained in all; `broken` is the number of predictions that were right
    before any edit and are wrong after the step; `accuracy_tuning` is the accuracy on the tuning examples; `edit` is
    the number of steps taken before. For a step along several components, `component` and `sign` are null and `step` is
    the total length.
"""

_MAY_HAVE_MORE_COLUMNS = ("examples",)

_SINCE_VERSION_3 = {
    "verification": (
        *("informative", "target_kl", "matched", "n_matched", "n_by_trace", "trace_ratio", "kl_matched"),
        *("kl_ratio_matched", "kl_ratio_matched_low", "kl_ratio_matched_high", "kl_ratio_trace", "small_step_ratio"),
        *("auc", "changed_top", "changed_matched", "other_kl_ratio_checked", "examples_passed"),
    ),
    "selectivity": ("kl_checked",),
    "components": ("cosine_own",),
}
"""Nullable columns that earlier versions of a table do not have."""

TABLES_VERSION = 3
_VERSION_KEY, _NAME_KEY, _LINEAGE_KEY = b"npeff.schema_version", b"npeff.table", b"npeff.lineage"

_GROUP_BYTES = {"examples": 2**18}
"""Approximate size of a row group in bytes; 1 MiB in other tables. Queries read single examples all over the table."""
_GROUP_ROWS = (256, 32_768)
_WITHOUT_STATISTICS = ("logits", "image", "text")
"""Columns without statistics. No query searches by their order, and the extreme values would enlarge the footer."""
_ENCODINGS: dict[str, dict[str, Any]] = {
    # less than half the size of the default encodings, and several times faster to read
    "coefficients": {
        "compression": "zstd",
        "use_dictionary": ["component"],
        "column_encoding": {"example": "DELTA_BINARY_PACKED", "coefficient": "BYTE_STREAM_SPLIT"},
    }
}


def write_table(path: str | Path, name: str, columns: Mapping[str, Any] | pa.Table, lineage: str | None = None) -> None:
    """Create or replace the Parquet file `path` with table `name`.

    Args:
        path: The file.
        name: Name of the table in `SCHEMAS`.
        columns: A sequence, numpy array or pyarrow array for each column of the schema; an (n, m) array for a list
            column. None is null.
        lineage: What the table was made from; see `npeff.runs.lineage`.

    Raises:
        StoreError: A column is missing or unknown, has another type or length, or is null but not nullable; or the file
            cannot be written. The previous content of `path` is unchanged.
    """
    write_table_in_parts(path, name, [columns], lineage)


def write_table_in_parts(
    path: str | Path, name: str, parts: Iterable[Mapping[str, Any] | pa.Table], lineage: str | None = None
) -> None:
    """Create or replace a Parquet file with a table that is given in parts, each as in `write_table`.

    All parts must have the same columns.
    """
    tables = (_checked(name, _columns(part)) for part in parts)
    first = next(tables, SCHEMAS[name].empty_table())
    metadata = {_NAME_KEY: name.encode(), _VERSION_KEY: str(TABLES_VERSION).encode()}
    if lineage is not None:
        metadata[_LINEAGE_KEY] = lineage.encode()
    options = {
        "write_statistics": [column for column in first.column_names if column not in _WITHOUT_STATISTICS],
        "write_page_checksum": True,
        **_ENCODINGS.get(name, {}),
    }

    def write(stream: BinaryIO) -> None:
        with pq.ParquetWriter(stream, first.schema.with_metadata(metadata), **options) as writer:
            for group in _in_groups(itertools.chain([first], tables), _GROUP_BYTES.get(name, 2**20)):
                writer.write_table(group)

    write_file_atomically(location(path), write)


def _columns(part: Mapping[str, Any] | pa.Table) -> Mapping[str, Any]:
    return {column: part[column] for column in part.column_names} if isinstance(part, pa.Table) else part


def _in_groups(tables: Iterable[pa.Table], group_bytes: int) -> Iterator[pa.Table]:
    """Split and concatenate tables into tables of about ``group_bytes`` bytes, in the same order."""
    waiting: list[pa.Table] = []
    n_waiting, size = 0, _GROUP_ROWS[0]
    for table in tables:
        if not len(table):
            continue
        size = int(np.clip(group_bytes * len(table) // max(table.nbytes, 1), *_GROUP_ROWS))
        waiting.append(table)
        n_waiting += len(table)
        if n_waiting >= size:
            whole = pa.concat_tables(waiting)
            full = n_waiting - n_waiting % size
            yield from (whole.slice(start, size) for start in range(0, full, size))
            waiting, n_waiting = [whole.slice(full)], n_waiting - full
    if n_waiting:
        yield pa.concat_tables(waiting)


def check_version(path: str | Path, schema: pa.Schema) -> None:
    """Raise StoreError if a later version of the program wrote the file with this schema."""
    version = _version(schema)
    if not version.isdigit() or int(version) > TABLES_VERSION:
        raise StoreError(
            f"{path} has schema version {version.decode(errors='replace')}, but this program reads versions up to "
            f"{TABLES_VERSION}",
            "install the version of npeff-pipeline that wrote it, or a later one",
            path=location(path),
        )


def _version(schema: pa.Schema) -> bytes:
    found: bytes = (schema.metadata or {}).get(_VERSION_KEY, b"1")
    return found


def lineage_in(schema: pa.Schema) -> str | None:
    """Return what a table was made from, according to the metadata of its file; None if it is unknown."""
    found = (schema.metadata or {}).get(_LINEAGE_KEY)
    return None if found is None else found.decode(errors="replace")


def table_lineage(path: Path) -> str | None:
    """Return the lineage in the metadata of the Parquet file `path`; None if it is unknown.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        with os_errors_explained("read", path), path.open("rb") as stream:
            return lineage_in(pq.read_schema(stream))
    except pa.ArrowException as error:
        raise damaged_file(path) from error


def read_table(path: str | Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read table `name`, or some of its columns, from the Parquet file `path`.

    Args:
        path: The file.
        name: Name of the table in `SCHEMAS`.
        columns: Names of the columns to read; all columns by default.

    Raises:
        StoreError: The file is missing or damaged, or does not have the columns of the table.
    """
    path = location(path)
    with os_errors_explained("read", path):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            remedy = f"run the stage that writes {name} first"
            raise StoreError(f"there is no table at {path}", remedy, path=path) from None
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read(columns if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise damaged_file(path) from error
    stored, schema = file.schema_arrow, SCHEMAS[name]
    check_version(path, stored)
    later = _SINCE_VERSION_3.get(name, ()) if _version(stored) < b"3" else ()
    expected = [(field.name, field.type) for field in schema if field.name not in later]
    found = [(field.name, stored.field(field.name).type) for field in schema if field.name in stored.names]
    if found != expected or (len(stored) != len(expected) and name not in _MAY_HAVE_MORE_COLUMNS):
        remedy = "delete it and run the same command again"
        raise StoreError(f"{path} does not have the columns of table {name}", remedy, path=path)
    for column in later:
        if columns is None or column in columns:
            table = table.append_column(schema.field(column), pa.nulls(len(table), schema.field(column).type))
    if columns is None and later:
        table = table.select(schema.names).cast(schema)  # columns of former versions are not nullable
    return table.replace_schema_metadata(None)


def _checked(name: str, columns: Mapping[str, Any]) -> pa.Table:
    schema = SCHEMAS[name]
    if missing := [column for column in schema.names if column not in columns]:
        raise StoreError(f"table {name} lacks the columns {missing}")
    more = [column for column in columns if column not in schema.names]
    if more and name not in _MAY_HAVE_MORE_COLUMNS:
        raise StoreError(f"table {name} has no columns {more}: it has {schema.names}")
    arrays: dict[str, pa.Array] = {}
    for field in schema:
        arrays[field.name] = _array(f"column {field.name} of table {name}", columns[field.name], field.type)
        if arrays[field.name].null_count and not field.nullable:
            raise StoreError(f"column {field.name} of table {name} must not be null")
    for column in more:
        arrays[column] = _array(f"column {column} of table {name}", columns[column], None)
    if len(lengths := {len(array) for array in arrays.values()}) != 1:
        raise StoreError(f"the columns of table {name} have different lengths: {sorted(lengths)}")
    fields = [*schema, *(pa.field(column, arrays[column].type) for column in more)]
    return pa.table(list(arrays.values()), schema=pa.schema(fields))


def _array(what: str, values: Any, kind: pa.DataType | None) -> pa.Array:
    try:
        if isinstance(values, pa.ChunkedArray):
            array = values.combine_chunks()
        elif isinstance(values, pa.Array):
            array = values
        else:
            array = pa.array(list(values) if isinstance(values, np.ndarray) and values.ndim == 2 else values)
        if kind is None:
            return array
        # infer the type, then cast: with the type as an argument, pyarrow would truncate 0.5 to the integer 0
        if not _same_kind(array.type, kind):
            raise StoreError(f"{what} cannot be stored as {kind}: it is {array.type}")
        return array.cast(kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{what} cannot be stored as {kind or 'an Arrow array'}: {first_line(error)}") from error


def _same_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _same_kind(found.value_type, wanted.value_type)
    both_numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (found, wanted))
    return both_numbers or found == wanted or pa.types.is_null(found)


def rows_to_columns(rows: Sequence[dict[str, Any]], table: str) -> dict[str, list[Any]]:
    """Convert the rows (dictionaries) of a table to columns. There may be no rows."""
    return {name: [row[name] for row in rows] for name in SCHEMAS[table].names}
