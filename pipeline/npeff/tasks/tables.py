"""Examples as rows of a table, which is a file, a folder of files, or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.feather
import pyarrow.json
import pyarrow.parquet

from npeff.errors import as_one_line
from npeff.tasks.base import TaskError

_HUB = "hf:"
_FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".arrow", ".feather")
"""Extensions of the files to read in a folder. A single file may also be a tab-separated .txt file."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Options that select the table and the rows of the examples."""

    data: str
    """A file (.parquet, .csv, .tsv, .jsonl, .arrow, .feather), a folder of such files, or ``hf:NAME`` or
    ``hf:OWNER/NAME[/CONFIG]`` for a data set of the Hugging Face hub."""
    split: str | None = None
    """Split of the data set; in a folder, the files ``SPLIT.*`` and ``SPLIT-*``, or the folder ``SPLIT``."""
    columns: Mapping[str, str] | None = None
    """Columns to rename before all other options are applied: name in the data -> new name."""
    filter: Mapping[str, Any] | None = None
    """Rows to use: column -> required value, or list of allowed values."""
    limit: int | None = None
    """Use only the first ``limit`` rows after filtering."""
    id_column: str | None = None
    """Column with the unique ids of the examples. The default is the row number in the data."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise TaskError(f"limit must not be negative, not {self.limit}")
        for option in ("columns", "filter"):
            value = getattr(self, option)
            if value is not None and not isinstance(value, Mapping):
                raise TaskError(f"{option} must be a mapping of column names, not {value!r}")

    @property
    def folder(self) -> Path:
        """The folder to which paths in the table are relative."""
        path = Path(self.data)
        return path if path.is_dir() else path.parent

    def read(self, needed: Collection[str]) -> pa.Table:
        """Read the selected rows, with the column ``id`` (string, unique) first, then the columns of the data.

        Args:
            needed: Names of required columns.

        Raises:
            TaskError: The data cannot be read, a required column is missing, or the ids are not unique.
        """
        table = self._renamed(self._load())
        wanted = [*needed, *(self.filter or {}), *([] if self.id_column is None else [self.id_column])]
        for column in wanted:
            if column not in table.column_names:
                raise TaskError(f"{self.data} has no column {column!r}: it has {', '.join(table.column_names)}")
        others = {name: table[name] for name in table.column_names if name != "id"}
        rows = self._filtered(pa.table({"id": self._ids(table), **others}))
        rows = rows if self.limit is None else rows.slice(0, self.limit)
        _check_unique(self.data, rows["id"])
        return rows

    def _load(self) -> pa.Table:
        table = self._from_hub() if self.data.startswith(_HUB) else self._from_files()
        for place, field in enumerate(table.schema):  # replace categories by their values
            if pa.types.is_dictionary(field.type):
                table = table.set_column(place, field.name, table[place].cast(field.type.value_type))
        return table

    def _from_files(self) -> pa.Table:
        path = Path(self.data)
        if path.is_dir():
            return _concatenated(self.data, self._files_of(path))
        if self.split is not None:
            raise TaskError(
                f"split {self.split!r} of {self.data}: a file has no splits, so remove split, or give a folder"
            )
        return _read(path)

    def _files_of(self, folder: Path) -> list[Path]:
        if self.split is not None and (folder / self.split).is_dir():
            files = list((folder / self.split).iterdir())
        elif self.split is not None:
            files = [file for file in folder.iterdir() if file.name.startswith((f"{self.split}.", f"{self.split}-"))]
        else:
            files = list(folder.iterdir())
        files = sorted(file for file in files if file.suffix in _FORMATS)
        kinds = sorted({file.suffix for file in files})
        if not files:
            split = "" if self.split is None else f" of split {self.split!r}"
            raise TaskError(f"{folder} has no file{split} ending in {', '.join(_FORMATS)}")
        if len(kinds) > 1:
            raise TaskError(f"{folder} has files ending in {' and '.join(kinds)}: give one file, or give split")
        return files

    def _from_hub(self) -> pa.Table:
        try:
            import datasets
        except ImportError:
            raise TaskError(f"{self.data} needs the package datasets: pip install 'npeff-pipeline[hf]'") from None
        name = self.data.removeprefix(_HUB)
        parts = name.split("/")
        owner_and_name, config = (name, None) if Path(name).is_dir() else ("/".join(parts[:2]), "/".join(parts[2:]))
        if self.split is None:
            raise TaskError(f"{self.data} needs a split, such as split: validation")
        try:
            found = datasets.load_dataset(owner_and_name, config or None, split=self.split)
        except Exception as error:  # the library raises any exception of the network, its loaders and its parsers
            raise TaskError(f"cannot read {self.data}: {as_one_line(error)}") from None
        return found.with_format("arrow")[:]

    def _renamed(self, table: pa.Table) -> pa.Table:
        for column in self.columns or {}:
            if column not in table.column_names:
                raise TaskError(
                    f"columns: {self.data} has no column {column!r} to rename: it has {', '.join(table.column_names)}"
                )
        names = [(self.columns or {}).get(name, name) for name in table.column_names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise TaskError(f"{self.data} has more than one column {twice[0]!r}: give them different names in columns")
        return table.rename_columns(names)

    def _ids(self, table: pa.Table) -> pa.ChunkedArray | pa.Array:
        try:
            ids = pa.array(range(len(table))) if self.id_column is None else table[self.id_column]
            ids = ids.cast(pa.string())
        except pa.ArrowException as error:
            raise TaskError(
                f"{self.data}: column {self.id_column!r} cannot be used as ids: {as_one_line(error)}"
            ) from None
        return ids

    def _filtered(self, rows: pa.Table) -> pa.Table:
        for column, allowed in (self.filter or {}).items():
            values = list(allowed) if isinstance(allowed, list | tuple) else [allowed]
            try:
                value_set = pa.array(values, rows[column].type)
                rows = rows.filter(pc.is_in(rows[column], value_set))
            except (pa.ArrowException, TypeError, ValueError):
                raise TaskError(
                    f"filter: column {column!r} of {self.data} has type {rows.schema.field(column).type}, which cannot "
                    f"be {', '.join(map(repr, values))}"
                ) from None
        return rows


def texts(rows: pa.Table, column: str, data: str) -> list[str]:
    """Return a column as strings, with an empty string for null."""
    try:
        result: list[str] = pc.fill_null(rows[column].cast(pa.string()), "").to_pylist()
        return result
    except pa.ArrowException:
        raise TaskError(
            f"{data}: column {column!r} has type {rows[column].type}, not text: choose a text column"
        ) from None


def class_numbers(labels: Sequence[Any], names: Sequence[str], data: str) -> list[int | None]:
    """Convert labels (class numbers, or class names in any case) to class numbers; None for null."""
    known = {str(name).lower(): number for number, name in enumerate(names)}
    numbers: list[int | None] = []
    for label in labels:
        if label is None or (isinstance(label, int) and not isinstance(label, bool)):
            number = label
        elif str(label).lower() in known:
            number = known[str(label).lower()]
        else:
            raise TaskError(f"{data}: label {label!r} is not one of {', '.join(known)}: give label_names")
        if number is not None and not 0 <= number < len(names):
            raise TaskError(
                f"{data}: label {number} is not one of the model's {len(names)} classes: correct it, or filter the rows"
            )
        numbers.append(number)
    return numbers


def example_table(
    rows: pa.Table, labels: Sequence[int | None], shown: Mapping[str, Sequence[Any] | pa.Array], used: Collection[str]
) -> pa.Table:
    """Return the table of a task's examples.

    Args:
        rows: Rows of `TableOptions.read`, one per example.
        labels: Class number of each example; None if unknown.
        shown: Columns to add, such as ``text`` or ``image``.
        used: Columns of `rows` to leave out, because ``label`` and `shown` contain their values.
    """
    left_out = {"id", "label", *shown, *used}
    others = {
        field.name: rows[field.name]
        for field in rows.schema
        if field.name not in left_out and not pa.types.is_nested(field.type) and not pa.types.is_binary(field.type)
    }
    return pa.table({"id": rows["id"], "label": pa.array(labels, pa.int64()), **shown, **others})


def _read(path: Path) -> pa.Table:
    try:
        match path.suffix:
            case ".parquet":
                return pyarrow.parquet.read_table(path, partitioning=None)
            case ".csv":
                return pyarrow.csv.read_csv(path)
            case ".tsv" | ".txt":
                tabs = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
                return pyarrow.csv.read_csv(path, parse_options=tabs)
            case ".jsonl":
                return pyarrow.json.read_json(path)
            case ".arrow" | ".feather":
                return _read_arrow(path)
    except (OSError, pa.ArrowException) as error:
        raise TaskError(f"cannot read {path}: {as_one_line(error)}") from None
    raise TaskError(f"cannot read {path}: use a file ending in {', '.join(_FORMATS)}")


def _read_arrow(path: Path) -> pa.Table:
    """Read a feather file, or a stream of record batches, which the library datasets writes."""
    with path.open("rb") as file:
        is_stream = file.read(4) == b"\xff\xff\xff\xff"
    if not is_stream:
        return pyarrow.feather.read_table(path)
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all()


def _concatenated(data: str, files: Sequence[Path]) -> pa.Table:
    tables = [_read(file) for file in files]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise TaskError(f"the files of {data} have different columns: {as_one_line(error)}") from None


def _check_unique(data: str, ids: pa.ChunkedArray) -> None:
    if ids.null_count:
        raise TaskError(f"{data}: an id is null: set id_column to a column with an id in every row")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = ids.value_counts()
        repeated = next(entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1)
        raise TaskError(f"{data}: id {repeated!r} occurs more than once: set id_column to a column of unique ids")
