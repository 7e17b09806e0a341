"""The Parquet tables ``<run>/tables/<name>.parquet``: their schemas, and writing and reading them checked.

Rows are in small groups, so that whoever needs a few of them reads little; the groups' statistics say which.
The key-value metadata of a file say which table it is and in which version. Files without them are of version 1, which
differs in nothing but larger groups.

A float is null where it is not known (yet), and NaN or infinite where it was computed and is. `examples` may have
further columns, the metadata of the task.
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
    """From "name:type ...", where a type ending in ? may be null."""
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
        "lift_cosine:float? stability:float?"
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
        "component:int examples:str sign:int epsilon:float n_top:int n_baseline:int "
        "kl_top:float kl_baseline:float kl_ratio:float kl_ratio_low:float kl_ratio_high:float above_controls:bool "
        "fisher_norm_ratio:float "
        "random_epsilon:float random_kl_top:float random_kl_baseline:float random_kl_ratio:float "
        "other_component:int? other_epsilon:float? other_kl_top:float? other_kl_baseline:float? other_kl_ratio:float? "
        "kl_correlation:float? "
        "accuracy_top_before:float? accuracy_top_after:float? "
        "accuracy_baseline_before:float? accuracy_baseline_after:float? reached_target:bool"
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
    "selectivity": _schema("moved:int component:int examples:str sign:int n_examples:int kl:float"),
}
"""By table name.

examples: one row per example; `split` "fit" or "held_out"; `image` a PNG; `fisher_norm` is ‖F_i‖_F; `fisher_rank` the
    rows of its factor; `kept_trace` the share of the labels' Fisher trace in them, null for sampled and empirical
    labels; `loss` the mean of -log p(label), null without labels; `prediction`, `correct` and `logits` are null for
    sequences.
classes: the names of the model's classes.
parameters: of the model; `shape` as 384x384, of those that are `taken`; `reason` why the others are not.
components: `mass` Σ_i W_ij and `energy` Σ_i W_ij² over the fit examples; `nearest_*` by |cos| in the sketch, null for a
    single component; `lift_cosine` of the sketched direction to the component, null before the lift; `stability` the
    mean |cos| with its match in fits of two halves of the examples, null where that was not computed.
top_examples: `rank` from 0, per component and split.
coefficients: the non-zero W_ij, by component, then descending.
history: one row per iteration of the solver; `mu` is the damping, or, of diagonals, the weight of the extrapolation;
    `objective` is the loss with the penalties, `sent_bytes` are those of each
    worker to all others together, in that iteration.
selection: one row per number of components tried; `explained_held_out` on held-out examples (or, where there are none,
    of each half on the other), its mean and standard deviation over fits; `cosine_seeds`, `cosine_halves` mean matched
    |cos| of fits of the same examples, and of two halves; `n_come_back` components with a match of at least 0.9, and
    `balance` Σ (2 cos² − 1), the lesser of the means over pairs of seeds and of halves; silhouettes over clusters.
selection_fits: one row per fit; `part` of the examples: "all", or the "first" or "second" half of the seed's split.
layer_energy: share of the squared norm of a component's direction in each parameter; sums to 1.
verification: one row per (component, examples "fit" or "held_out", sign +1 or -1), beside the controls of
    `npeff.verification.controls`; accuracies are null without labels. `kl_ratio_low` and `_high` are the ends of a
    95% interval, and `above_controls` says whether the ratio is above 1 and all controls with 95% confidence.
    `kl_correlation` is the rank correlation of coefficients and KLs over examples drawn at random.
selectivity: mean KL on the first top examples of `component` while the model is moved along the direction of `moved`,
    by the step that its own verification took; of held-out examples where there are any.
ablation: as `verification`, of the step that takes the parameters' own part along a direction, `displacement`, out of
    them; the controls' steps are as long. One row per (component, examples), where that was asked for.
position_shares: the evidence ‖A_i ĝ_j‖² that a top example gives for a direction, split over the example's tokens:
    share of it, which may be negative; what their sum lacks to 1 is of layers without positions. `start` and `stop` are
    characters of the example's text, null for a token that is not in it.
repair: wrong predictions among each component's top examples, with a one-sided hypergeometric test and its
    Benjamini-Hochberg q-value, the least likely by chance first.
repair_steps: one row per step tried: how many of its wrong top examples it mends, how many right predictions are
    `gained` in all, how many that were right before any edit are `broken` after it, and the accuracy on the tuning
    examples; `edit` counts the steps taken before it. `component` and `sign` are null of steps along several at once,
    and `step` is the length of them all.
"""

_MAY_HAVE_MORE_COLUMNS = ("examples",)

TABLES_VERSION = 2
_VERSION_KEY, _NAME_KEY = b"npeff.schema_version", b"npeff.table"

_GROUP_BYTES = {"examples": 2**18}
"""Of a row group, 1 MiB in other tables: single examples, scattered over the table, are what answers are made of."""
_GROUP_ROWS = (256, 32_768)
_WITHOUT_STATISTICS = ("logits", "image", "text")
"""Columns by which nobody looks for rows in order; the least and the largest text would only swell the footer."""
_ENCODINGS: dict[str, dict[str, Any]] = {
    # less than half the size of the default encodings, and several times as fast to read
    "coefficients": {
        "compression": "zstd",
        "use_dictionary": ["component"],
        "column_encoding": {"example": "DELTA_BINARY_PACKED", "coefficient": "BYTE_STREAM_SPLIT"},
    }
}


def write_table(path: str | Path, name: str, columns: Mapping[str, Any] | pa.Table) -> None:
    """Create or replace the Parquet file `path` with table `name`.

    `columns`: one sequence, numpy array or pyarrow array for each column of the schema; an (n, m) array for a list
    column. None is null.

    Raises:
        StoreError: a column is missing, unknown, of another type or length, or null where that has no meaning, or the
            file cannot be written. The former content of `path` is untouched.
    """
    write_table_in_parts(path, name, [columns])


def write_table_in_parts(path: str | Path, name: str, parts: Iterable[Mapping[str, Any] | pa.Table]) -> None:
    """The same, of a table that is given some rows at a time, each as in `write_table` and with the same columns."""
    tables = (_checked(name, _columns(part)) for part in parts)
    first = next(tables, SCHEMAS[name].empty_table())
    metadata = {_NAME_KEY: name.encode(), _VERSION_KEY: str(TABLES_VERSION).encode()}
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
    """The same rows, in tables of about so many bytes."""
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
    """Raise StoreError when a file of this schema was written by a later version of the program."""
    version = (schema.metadata or {}).get(_VERSION_KEY, b"1")
    if not version.isdigit() or int(version) > TABLES_VERSION:
        raise StoreError(
            f"{path} has schema version {version.decode(errors='replace')} and this program reads up to "
            f"{TABLES_VERSION}",
            "install the version of npeff-pipeline that wrote it, or a later one",
            path=location(path),
        )


def read_table(path: str | Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Table `name`, or some columns of it, from the Parquet file `path`.

    Raises:
        StoreError: the file is missing, damaged, or has not the columns of that table.
    """
    path = location(path)
    with os_errors_explained("read", path):
        exists = path.is_file()
    if not exists:
        raise StoreError(f"there is no table at {path}", f"run the stage that writes {name} first", path=path)
    with os_errors_explained("read", path):
        content = path.read_bytes()
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read(columns if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise damaged_file(path) from error
    stored, schema = file.schema_arrow, SCHEMAS[name]
    check_version(path, stored)
    found = pa.schema([stored.field(field.name) for field in schema if field.name in stored.names])
    if found != schema or (len(stored) != len(schema) and name not in _MAY_HAVE_MORE_COLUMNS):
        remedy = "delete it and run the same command again"
        raise StoreError(f"{path} has not the columns of table {name}", remedy, path=path)
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
        # first inferred, then cast: given the type at once, pyarrow would cut 0.5 down to the integer 0
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
    """Rows (dictionaries) of a table as columns, also where there are none."""
    return {name: [row[name] for row in rows] for name in SCHEMAS[table].names}
