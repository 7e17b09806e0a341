"""Examples as rows of a table, which is a file, a folder of files, or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from npeff.errors import as_one_line, did_you_mean
from npeff.tasks.errors import TaskError
from npeff.tasks.image_folders import IMAGE, image_table
from npeff.tasks.table_files import FORMATS, UNTYPED, plain, read_file, typed, typed_labels

_HUB = "hf:"
LabelValues = Literal["numbers", "names"]


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
    id_column: str | None = None
    """Column with the unique ids of the examples. The default is the row number in the data, or the path of an image in
    a folder of images."""

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
        if self.data.startswith(_HUB):
            return _folder_of_the_hub(self.data.removeprefix(_HUB))
        path = Path(self.data)
        return path if path.is_dir() else path.parent

    def read(self, needed: Collection[str], label_column: str | None = None) -> pa.Table:
        """Read the selected rows, with the column ``id`` (string, unique) first, then the columns of the data.

        Args:
            needed: Names of required columns of texts. Formats without types, and JSON, give them as they are written.
            label_column: Name of the required column of labels, if there is one.

        Raises:
            TaskError: The data cannot be read, has no rows, or lacks a required column, or the ids are not unique.
        """
        written = [*needed, *([] if self.id_column is None else [self.id_column])]
        used = [*written, *([] if label_column is None else [label_column]), *(self.filter or {})]
        table = self._load(written, used, label_column)
        for column in used:
            self._check_column(column, table.column_names)
        others = {name: table[name] for name in table.column_names if name != "id"}
        rows = self._filtered(pa.table({"id": self._ids(table), **others}))
        if not len(rows):
            reason = "correct filter" if len(table) else "give data with at least one row"
            raise TaskError(f"{self.data} has no row{' that meets filter' if len(table) else ''}: {reason}")
        rows = rows if self.limit is None else rows.slice(0, self.limit)
        _check_ids(self.data, rows["id"])
        return rows

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
        """Return the table of data that are not files of tables; None if they are."""
        return self._from_hub() if self.data.startswith(_HUB) else self._images

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
            return plain(found.with_format("arrow")[:])
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

    def _ids(self, table: pa.Table) -> pa.ChunkedArray | pa.Array:
        try:
            if self.id_column is None:
                image = (self.columns or {}).get(IMAGE, IMAGE)
                ids = table[image] if self._images is not None else pa.array(range(len(table)))
            else:
                ids = table[self.id_column]
            ids = ids.cast(pa.string())
        except pa.ArrowException as error:
            raise TaskError(
                f"{self.data}: column {self.id_column!r} cannot be used as ids: {as_one_line(error)}"
            ) from None
        return ids

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


def texts(rows: pa.Table, column: str, data: str) -> list[str]:
    """Return a column as strings, with an empty string for null."""
    try:
        result: list[str] = pc.fill_null(rows[column].cast(pa.string()), "").to_pylist()
        return result
    except pa.ArrowException:
        raise TaskError(
            f"{data}: column {column!r} has type {type_of(rows, column)}, not text: choose a text column"
        ) from None


def type_of(rows: pa.Table, column: str) -> str:
    """Return the name of the type of a column for a message. The name of a nested type can be long."""
    name = str(rows[column].type)
    return name if len(name) <= 60 else f"{name[:59]}…"


@dataclass(frozen=True, kw_only=True)
class LabelOptions(TableOptions):
    """Options of tasks with labels."""

    label_names: Sequence[str] | None = None
    """Names of the classes in the order of the logits. The default is the model's ``id2label``. Labels are matched
    case-insensitively."""
    label_values: LabelValues | None = None
    """Whether integer labels are class numbers or names of classes. Needed only if they can be both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_values not in (None, *get_args(LabelValues)):
            raise TaskError(f"label_values must be numbers or names, not {self.label_values!r}")

    def labels(self, rows: pa.Table, column: str | None, names: Sequence[str]) -> list[int | None]:
        """Return the class number of each row; None if it is unknown, or if there is no column of labels."""
        if column is None:
            return [None] * len(rows)
        return class_numbers(rows[column].to_pylist(), names, self.data, self.label_values)


def distinct_names(names: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of the classes as strings. Raises TaskError if two classes have the same name."""
    found = tuple(map(str, names))
    twice = [name for place, name in enumerate(found) if name in found[:place]]
    if twice:
        raise TaskError(f"two classes have the name {twice[0]!r}: give different names in label_names")
    return found


def class_numbers(
    labels: Sequence[Any], names: Sequence[str], data: str, values: LabelValues | None = None
) -> list[int | None]:
    """Convert labels to class numbers.

    Args:
        labels: Class numbers, or class names in any case; None if unknown.
        names: Names of the classes.
        data: Name of the data, for error messages.
        values: Whether integers are class numbers or names. By default, they are class numbers, and an integer that is
            also the name of another class is refused.

    Raises:
        TaskError: A label is not a class, or can be two classes.
    """
    known: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        known.setdefault(str(name).lower(), []).append(number)
    meanings: dict[str, int | None] = {repr(None): None}
    for label in labels:
        if repr(label) not in meanings:
            meanings[repr(label)] = _class_number(label, names, known, data, values)
    return [meanings[repr(label)] for label in labels]


def _class_number(
    label: Any, names: Sequence[str], known: Mapping[str, Sequence[int]], data: str, values: LabelValues | None
) -> int:
    named = known.get(str(label).lower(), ())
    is_number = isinstance(label, int) and not isinstance(label, bool)
    if is_number and values != "names":
        if values is None and 0 <= label < len(names) and named and list(named) != [label]:
            raise TaskError(
                f"{data}: label {label} is the number of the class {names[label]!r} and the name of class {named[0]}",
                "set label_values to numbers or names",
            )
        if not 0 <= label < len(names):
            remedy = "set label_values: names" if named else "correct it, or filter the rows"
            raise TaskError(f"{data}: label {label} is not one of the model's {len(names)} classes: {remedy}")
        return int(label)
    if not named:
        hint = "give class numbers as integers" if isinstance(label, float) else "give label_names"
        raise TaskError(f"{data}: label {label!r} is not one of {_some(known)}: {hint}")
    if len(named) > 1:
        both = " and ".join(repr(names[number]) for number in named[:2])
        raise TaskError(
            f"{data}: label {label!r} can be the classes {both}, because the case of labels is ignored",
            "give class numbers, or label_names that differ in more than case",
        )
    return named[0]


def _some(names: Collection[str]) -> str:
    """Return the first 20 names, separated by commas."""
    return ", ".join([*list(names)[:20], *(["…"] if len(names) > 20 else [])])


def example_table(
    rows: pa.Table, labels: Sequence[int | None], shown: Mapping[str, Sequence[Any] | pa.Array], used: Collection[str]
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
    return pa.table({"id": rows["id"], "label": pa.array(labels, pa.int64()), **shown, **others})


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


def _check_ids(data: str, ids: pa.ChunkedArray) -> None:
    if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
        kind = "null" if ids.null_count else "empty"
        raise TaskError(f"{data}: an id is {kind}: set id_column to a column with an id in every row")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = ids.value_counts()
        repeated = next(entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1)
        raise TaskError(f"{data}: id {repeated!r} occurs more than once: set id_column to a column of unique ids")


def _folder_of_the_hub(name: str) -> Path:
    """Return a local data set, or the folder in which the library datasets keeps what it has downloaded."""
    if Path(name).is_dir():
        return Path(name)
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)
