"""Examples as rows of a table, which is a file, a folder of files, or a Hugging Face data set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npeff.errors import as_one_line, did_you_mean
from npeff.tasks.errors import TaskError
from npeff.tasks.image_folders import IMAGE, image_table
from npeff.tasks.prepared import PART_ROWS, Prepared, Texts, slices
from npeff.tasks.table_files import (
    FORMATS,
    IN_PARTS,
    UNTYPED,
    plain,
    read_file,
    read_parts,
    typed,
    typed_labels,
)

_HUB = "hf:"


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Options that select the table and the rows of the examples."""

    data: str
    """A file (.parquet, .csv, .tsv, .jsonl, .arrow, .feather), a folder of such files, a folder of images by class, or
    ``hf:NAME`` or ``hf:OWNER/NAME[/CONFIG]`` for a data set of the Hugging Face hub."""
    split: str | None = None
    """Split of the data set; in a folder, the files ``SPLIT.*`` and ``SPLIT-*``, or the folder ``SPLIT``."""
    columns: Mapping[str, str] | None = None
    """Columns to rename before all other options are applied: name in the data -> new name."""
    filter: Mapping[str, Any] | None = None
    """Rows to use: column -> required value, or list of allowed values."""
    limit: int | None = None
    """Use only the first ``limit`` rows after filtering."""
    streaming: bool = False
    """Whether the rows of a data set of the hub are read from their source in order, up to ``limit``, instead of
    downloading the whole data set first."""
    id_column: str | None = None
    """Column with the unique ids of the examples. The default is the row number in the data, or the path of an image in
    a folder of images."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise TaskError(f"limit must not be negative, not {self.limit}")
        if self.streaming and not self.data.startswith(_HUB):
            raise TaskError("streaming is for data sets of the hub: remove it, files are always read in parts")
        for option in ("columns", "filter"):
            value = getattr(self, option)
            if value is not None and not isinstance(value, Mapping):
                raise TaskError(f"{option} must be a mapping of column names, not {value!r}")

    @property
    def folder(self) -> Path:
        """The folder to which paths in the table are relative."""
        if self.data.startswith(_HUB):
            return _folder_of_the_hub(self.data.removeprefix(_HUB))
        path = Path(self.data)
        return path if path.is_dir() else path.parent

    def read(self, needed: Collection[str], label_column: str | None = None, files: Prepared | None = None) -> pa.Table:
        """Read the selected rows, with the column ``id`` (string, unique) first, then the columns of the data.

        Args:
            needed: Names of required columns of texts. Formats without types, and JSON, give them as they are written.
            label_column: Name of the required column of labels, if there is one.
            files: Files of the task, from which the rows are mapped. The rows are in memory if None.

        Raises:
            TaskError: The data cannot be read, has no rows, or lacks a required column, or the ids are not unique.
        """
        written = [*needed, *([] if self.id_column is None else [self.id_column])]
        used = [*written, *([] if label_column is None else [label_column]), *(self.filter or {})]
        if files is not None:
            return files.table("rows", lambda: self._selected(written, used, label_column), self._check_ids)
        rows = pa.concat_tables(self._selected(written, used, label_column))
        self._check_ids(rows)
        return rows

    def _selected(
        self, written: Collection[str], used: Collection[str], label_column: str | None
    ) -> Iterator[pa.Table]:
        """Yield the rows that meet `filter`, with their ids, up to `limit`."""
        n_read = n_met = 0
        for part in self._parts(written, used, label_column):
            for column in used:
                self._check_column(column, part.column_names)
            others = {name: part[name] for name in part.column_names if name != "id"}
            rows = self._filtered(pa.table({"id": self._ids(part, n_read), **others}))
            n_read, n_met = n_read + len(part), n_met + len(rows)
            yield rows if self.limit is None else rows.slice(0, max(0, self.limit - n_met + len(rows)))
            if self.limit is not None and n_met >= max(self.limit, 1):
                return
        if not n_met:
            reason = "correct filter" if n_read else "give data with at least one row"
            raise TaskError(f"{self.data} has no row{' that meets filter' if n_read else ''}: {reason}")

    def _parts(self, written: Collection[str], used: Collection[str], label_column: str | None) -> Iterator[pa.Table]:
        """Yield the data in parts, with the new names of their columns and the same types in all parts."""
        parts: Iterable[pa.Table] = ()
        if self.data.startswith(_HUB):
            from_hub = self._from_hub()
            first, parts = self._renamed(next(from_hub)), from_hub
        elif self._whole() is not None or (files := self._files())[0].suffix not in IN_PARTS:
            first = self._load(written, used, label_column)
        else:
            empty = {file: self._renamed(next(read_parts(file))) for file in files}
            first, parts = _concatenated(self.data, empty, used), itertools.chain.from_iterable(map(read_parts, files))
        yield first
        for part in parts:
            yield _of_types(self.data, first.schema, self._renamed(part))

    def head(self, most_rows: int) -> pa.Table | None:
        """Return about the first rows of the data that meet `filter`, with all columns; None for data of the hub.

        Raises:
            TaskError: The data cannot be read, or lacks a column that an option names.
        """
        if self.data.startswith(_HUB):
            return None
        columns = self.named_columns()
        labels = columns.pop("label_column", [])
        others = [name for names in columns.values() for name in names]
        label = labels[0] if labels else None
        table = self._load(others, [*others, *labels], label, most_rows)
        for option, names in {"label_column": labels, **columns}.items():
            for name in names:
                self._check_column(name, table.column_names, option)
        return self._filtered(table)

    def named_columns(self) -> dict[str, list[str]]:
        """Return the columns that the options name, by option: those of ``filter``, and of all options ``…_column`` and
        ``…_columns``."""
        found = {"filter": list(self.filter or {})}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name.endswith(("_column", "_columns")) and value is not None:
                found[each.name] = [value] if isinstance(value, str) else list(value)
        return found

    def _check_column(self, column: str, names: Sequence[str], option: str | None = None) -> None:
        if column in names:
            return
        where, meant = "" if option is None else f"{option}: ", did_you_mean(column, names)
        raise TaskError(f"{where}{self.data} has no column {column!r}{meant}: it has {', '.join(names)}")

    def _load(
        self,
        written: Collection[str],
        used: Collection[str],
        label_column: str | None = None,
        most_rows: int | None = None,
    ) -> pa.Table:
        """Return the data with the new names of its columns, or about the first rows of it."""
        if (whole := self._whole()) is not None:
            return self._renamed(whole)
        files = self._files() if most_rows is None else self._files()[:1]
        former = {new: old for old, new in (self.columns or {}).items()}
        texts, needed = ({former.get(name, name) for name in some} for some in (written, used))
        tables = {file: self._renamed(read_file(file, texts, needed, most_rows)) for file in files}
        table = _concatenated(self.data, tables, used)
        if files[0].suffix not in UNTYPED:
            return table
        columns = {name: table[name] for name in table.column_names}
        for name in columns.keys() - set(written):
            columns[name] = (typed_labels if name == label_column else typed)(table[name])
        return pa.table(columns)

    def _whole(self) -> pa.Table | None:
        """Return the table of data that are not files of tables; None if they are, or a data set of the hub."""
        return self._images

    @cached_property
    def _images(self) -> pa.Table | None:
        """The table of a folder of images; None if the data are something else."""
        path = Path(self.data)
        if self.data.startswith(_HUB) or not path.is_dir() or any(file.suffix in FORMATS for file in path.iterdir()):
            return None
        return image_table(path, self.split)

    def _files(self) -> list[Path]:
        path = Path(self.data)
        if path.is_dir():
            return self._files_of(path)
        if self.split is not None:
            raise TaskError(
                f"split {self.split!r} of {self.data}: a file has no splits, so remove split, or give a folder"
            )
        return [path]

    def _files_of(self, folder: Path) -> list[Path]:
        if self.split is not None and (folder / self.split).is_dir():
            files = list((folder / self.split).iterdir())
        elif self.split is not None:
            files = [file for file in folder.iterdir() if file.name.startswith((f"{self.split}.", f"{self.split}-"))]
        else:
            files = list(folder.iterdir())
        files = sorted(file for file in files if file.suffix in FORMATS)
        kinds = sorted({file.suffix for file in files})
        if not files:
            split = "" if self.split is None else f" of split {self.split!r}"
            raise TaskError(f"{folder} has no file{split} ending in {', '.join(FORMATS)}, and no images")
        if len(kinds) > 1:
            raise TaskError(f"{folder} has files ending in {' and '.join(kinds)}: give one file, or give split")
        return files

    def _from_hub(self) -> Iterator[pa.Table]:
        """Yield the rows of a data set of the hub, which the library datasets keeps in Arrow files on the disk."""
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
            streaming = {"streaming": True} if self.streaming else {}
            found = datasets.load_dataset(owner_and_name, config or None, split=self.split, **streaming)
            if found.features is not None:
                yield plain(found.features.arrow_schema.empty_table())
            for part in found.with_format("arrow").iter(PART_ROWS):
                yield plain(part)
        except Exception as error:  # the library raises any exception of the network, its loaders and its parsers
            raise TaskError(f"cannot read {self.data}: {as_one_line(error)}") from None

    def _renamed(self, table: pa.Table) -> pa.Table:
        for column in self.columns or {}:
            if column not in table.column_names:
                raise TaskError(
                    f"columns: {self.data} has no column {column!r} to rename: it has {', '.join(table.column_names)}"
                )
        names = [(self.columns or {}).get(name, name) for name in table.column_names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            in_data = table.column_names.count(twice[0]) > 1
            remedy = "rename or remove one of them in the data" if in_data else "give them different names in columns"
            raise TaskError(f"{self.data} has more than one column {twice[0]!r}: {remedy}")
        return table.rename_columns(names)

    def _ids(self, table: pa.Table, first: int) -> pa.ChunkedArray | pa.Array:
        """Return the ids of rows of the data, of which the first has the number ``first``."""
        try:
            if self.id_column is None:
                image = (self.columns or {}).get(IMAGE, IMAGE)
                ids = table[image] if self._images is not None else pa.array(np.arange(first, first + len(table)))
            else:
                ids = table[self.id_column]
            ids = ids.cast(pa.string())
        except pa.ArrowException as error:
            raise TaskError(
                f"{self.data}: column {self.id_column!r} cannot be used as ids: {as_one_line(error)}"
            ) from None
        return ids

    def _check_ids(self, rows: pa.Table) -> None:
        if self.id_column is None and self._images is None:
            return  # the numbers of the rows
        ids = rows["id"]
        if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
            kind = "null" if ids.null_count else "empty"
            raise TaskError(f"{self.data}: an id is {kind}: set id_column to a column with an id in every row")
        if (repeated := _repeated(ids)) is not None:
            raise TaskError(
                f"{self.data}: id {repeated!r} occurs more than once: set id_column to a column of unique ids"
            )

    def _filtered(self, rows: pa.Table) -> pa.Table:
        for column, allowed in (self.filter or {}).items():
            values = list(allowed) if isinstance(allowed, list | tuple) else [allowed]
            if _is_text(rows[column].type):  # ids that are integers are read as texts
                values = [str(value) if type(value) is int else value for value in values]
            try:
                value_set = pa.array(values, rows[column].type)
                rows = rows.filter(pc.is_in(rows[column], value_set))
            except (pa.ArrowException, TypeError, ValueError):
                raise TaskError(
                    f"filter: column {column!r} of {self.data} has type {type_of(rows, column)}, which cannot be "
                    f" {', '.join(map(repr, values))}"
                ) from None
        return rows


def texts(rows: pa.Table, column: str, data: str) -> Texts:
    """Return a column as strings, with an empty string for null."""
    problem = f"{data}: column {column!r} has type {type_of(rows, column)}, not text: choose a text column"
    return Texts(rows[column], problem)


def type_of(rows: pa.Table, column: str) -> str:
    """Return the name of the type of a column for a message. The name of a nested type can be long."""
    name = str(rows[column].type)
    return name if len(name) <= 60 else f"{name[:59]}…"


def example_table(
    rows: pa.Table,
    labels: Sequence[int | None] | pa.Array,
    shown: Mapping[str, Sequence[Any] | pa.Array],
    used: Collection[str],
) -> pa.Table:
    """Return the table of a task's examples.

    Args:
        rows: Rows of `TableOptions.read`, one per example.
        labels: Class number of each example; None if unknown.
        shown: Columns to add, such as ``text`` or ``image``.
        used: Columns of `rows` to leave out, because ``label`` and `shown` contain their values.

    Columns that are called ``image``, or ``text`` if they are not texts, are left out, because tables of examples show
    columns of these names.
    """
    left_out = {"id", "label", "image", *shown, *used}
    others = {
        field.name: rows[field.name]
        for field in rows.schema
        if field.name not in left_out and _is_scalar(field.type) and (field.name != "text" or _is_text(field.type))
    }
    return pa.table({"id": rows["id"], "label": _integers(labels), **shown, **others})


def example_parts(
    rows: pa.Table,
    labels: pa.Array,
    shown: Callable[[slice], Mapping[str, Sequence[Any] | pa.Array]],
    used: Collection[str],
) -> Iterator[pa.Table]:
    """Yield the table of a task's examples in parts.

    Args:
        rows: Rows of `TableOptions.read`, one per example.
        labels: Class number of each example, int64; null if unknown.
        shown: Function that returns the columns to add for some examples.
        used: Columns of `rows` to leave out, as in `example_table`.
    """
    for part in slices(len(rows)):
        yield example_table(rows[part], labels[part], shown(part), used)


def _integers(labels: Sequence[int | None] | pa.Array) -> pa.Array:
    return labels if isinstance(labels, pa.Array | pa.ChunkedArray) else pa.array(labels, pa.int64())


def _is_scalar(kind: pa.DataType) -> bool:
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return not (is_bytes or pa.types.is_nested(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _concatenated(data: str, tables: Mapping[Path, pa.Table], used: Collection[str]) -> pa.Table:
    """Return the rows of all files. A file of JSON lines may lack columns, whose values are then null."""
    for column in used:
        lacking = [file for file, table in tables.items() if column not in table.column_names]
        if 0 < len(lacking) < len(tables) and lacking[0].suffix != ".jsonl":
            raise TaskError(f"the files of {data} have different columns: {lacking[0].name} has no column {column!r}")
    try:
        return pa.concat_tables(tables.values(), promote_options="permissive")
    except pa.ArrowException as error:
        raise TaskError(f"the files of {data} have different columns: {as_one_line(error)}") from None


def _of_types(data: str, schema: pa.Schema, part: pa.Table) -> pa.Table:
    """Return a part of the data with the columns and types of all parts."""
    try:
        found = pa.concat_tables([schema.empty_table(), part], promote_options="permissive")
    except pa.ArrowException as error:
        raise TaskError(f"{data}: its rows have different columns: {as_one_line(error)}") from None
    if found.schema != schema:
        raise TaskError(f"{data}: its rows have columns of different types: write it with the same types in all rows")
    return found


def _repeated(ids: pa.ChunkedArray) -> str | None:
    """Return the first id that occurs more than once. A table of all ids would take ten times the memory of hashes."""
    hashes = (hash(value) for part in slices(len(ids)) for value in ids[part].to_pylist())
    hashes_N = np.fromiter(hashes, np.int64, len(ids))
    ordered_N = np.sort(hashes_N)
    twice = ordered_N[1:][ordered_N[1:] == ordered_N[:-1]]
    some = ids.filter(pa.array(np.isin(hashes_N, twice)))
    repeated = (entry["values"].as_py() for entry in some.value_counts() if entry["counts"].as_py() > 1)
    return next(repeated, None)


def _folder_of_the_hub(name: str) -> Path:
    """Return a local data set, or the folder in which the library datasets keeps what it has downloaded."""
    if Path(name).is_dir():
        return Path(name)
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)
