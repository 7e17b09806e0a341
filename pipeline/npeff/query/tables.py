"""The Parquet tables and JSON records of a run directory, for reading only.

A table that a stage has not written yet is a normal state of a run: asking for it raises a `QueryError` that names the
command which writes it. A table that is there and cannot be read is damage, and the message says so.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq

from npeff.query.errors import QueryError
from npeff.storage.errors import StoreError
from npeff.storage.location import is_remote
from npeff.storage.objects import file_system, key_of
from npeff.store.table_names import WRITTEN_BY
from npeff.store.tables import SCHEMAS, check_version

if TYPE_CHECKING:  # it imports pandas, where that is installed, which most questions do not need
    import pyarrow.dataset as ds

EXAMPLE_COLUMNS = tuple(SCHEMAS["examples"].names)
"""Columns of the examples table that every task has; all further ones are the task's own metadata."""

NAMED_CLASSES = {"label_name": "label", "prediction_name": "prediction"}
"""Column with a class's name to the column with its number."""

_SCAN_GROUPS, _SCAN_ROWS = 64, 131_072
"""Groups of rows, of about 1 MiB or less, and rows that are held at a time while a whole table is walked over."""


def _parquet(remote: bool) -> ds.ParquetFileFormat:
    import pyarrow.dataset as ds

    options: dict[str, Any] = {"page_checksum_verification": True}
    if remote:  # what lies between two wanted columns is read along, which is cheaper than another request
        options |= {"pre_buffer": True, "cache_options": pa.CacheOptions(hole_size_limit=2**20)}
    return ds.ParquetFileFormat(default_fragment_scan_options=ds.ParquetFragmentScanOptions(**options))


def missing(run_dir: Path, what: str, command: str) -> QueryError:
    """The error for something that a stage has not written yet."""
    return QueryError(f"{what} is not there yet", f"run `npeff {command} {run_dir}` first")


def _located(path: Path) -> tuple[str, pa_fs.FileSystem]:
    """Where Arrow finds a file: a path, and the file system that it is on."""
    if is_remote(path):
        return key_of(path), pa_fs.PyFileSystem(pa_fs.FSSpecHandler(file_system(path)))
    return str(path), pa_fs.LocalFileSystem()


class RunTables:
    """Reads `<run>/tables/*.parquet` and the JSON records beside them.

    A file is opened when it is first asked for, and its footer is read once: what replaces it later is not seen.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._folder = run_dir / "tables"
        self._files: dict[str, pq.ParquetFile] = {}
        self._schemas: dict[str, pa.Schema] = {}
        self._datasets: dict[str, ds.Dataset] = {}
        self._bounds: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {}

    def names(self) -> list[str]:
        """Names of the tables that are there, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.parquet"))

    def has(self, name: str) -> bool:
        return name in self._files or (self._folder / f"{name}.parquet").is_file()

    def dataset(self, name: str) -> ds.Dataset:
        """The table as a lazy Arrow dataset: rows and columns that are not asked for are not read.

        Raises:
            QueryError: there is no such table, it is not written yet, or its file is damaged.
        """
        if name not in self._datasets:
            import pyarrow.dataset as ds

            schema, path = self.schema(name), self._folder / f"{name}.parquet"
            kind = _parquet(is_remote(path))
            where, filesystem = _located(path)
            fragment = kind.make_fragment(where, filesystem)
            fragments = self._parts(name, fragment) if is_remote(path) else [fragment]
            self._datasets[name] = ds.FileSystemDataset(fragments, schema, kind, filesystem)
        return self._datasets[name]

    def _parts(self, name: str, fragment: ds.ParquetFileFragment) -> list[ds.ParquetFileFragment]:
        """Of the file, as what is read along stays in memory until the part has been read."""
        n_groups = self.file(name).num_row_groups
        starts = range(0, max(n_groups, 1), _SCAN_GROUPS)
        return [
            fragment.subset(row_group_ids=list(range(start, min(start + _SCAN_GROUPS, n_groups)))) for start in starts
        ]

    def file(self, name: str) -> pq.ParquetFile:
        """The table's file, opened; for groups of rows one by one. Raises as `dataset` does."""
        if name not in self._files:
            path = self._folder / f"{name}.parquet"
            if not path.is_file():
                if name in WRITTEN_BY:
                    raise missing(self.run_dir, f"table '{name}'", WRITTEN_BY[name])
                raise QueryError(
                    f"there is no table '{name}': this run has {', '.join(self.names()) or 'no tables yet'}"
                )
            with self._damage_named(name):
                where, filesystem = _located(path)
                file = pq.ParquetFile(
                    filesystem.open_input_file(where), pre_buffer=True, page_checksum_verification=True
                )
            try:
                check_version(path, file.schema_arrow)
            except StoreError as error:
                raise QueryError.of(error) from error
            self._files[name] = file
        return self._files[name]

    def schema(self, name: str) -> pa.Schema:
        """Its columns and their types. Raises as `dataset` does."""
        if name not in self._schemas:
            self._schemas[name] = self.file(name).schema_arrow.remove_metadata()
        return self._schemas[name]

    def n_rows(self, name: str) -> int:
        return int(self.file(name).metadata.num_rows)

    def read(self, name: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Read a table, or only some of its columns and the rows for which `where` holds, in the order written."""
        dataset = self.dataset(name)
        with self._damage_named(name):
            return dataset.to_table(columns=None if columns is None else list(columns), filter=where)

    def scan(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of the whole table, in the order written, a bounded number of rows at a time."""
        file, columns = self.file(name), list(columns)
        with self._damage_named(name):
            if is_remote(self._folder):
                for fragment in self.dataset(name).get_fragments():
                    yield from fragment.to_batches(columns=columns)
                return
            for start in range(0, file.num_row_groups, _SCAN_GROUPS):
                groups = range(start, min(start + _SCAN_GROUPS, file.num_row_groups))
                yield from file.iter_batches(_SCAN_ROWS, row_groups=groups, columns=columns)

    def groups_with(self, name: str, column: str, values: Sequence[Any]) -> list[int]:
        """Which groups of rows can hold one of these values in a column of integers or text, by their statistics."""
        low, high = self.bounds(name, column)
        wanted = sorted(set(values))
        return [
            group
            for group, (least, most) in enumerate(zip(low, high, strict=True))
            if least is None or bisect_left(wanted, least) < bisect_right(wanted, most)
        ]

    def bounds(self, name: str, column: str) -> tuple[list[Any], list[Any]]:
        """The least and the largest value of a column in every group of rows; None where they are unknown."""
        key = (name, column)
        if key not in self._bounds:
            file, position = self.file(name), self.schema(name).get_field_index(column)
            found = [file.metadata.row_group(group).column(position).statistics for group in range(file.num_row_groups)]
            known = [each if each is not None and each.has_min_max else None for each in found]
            self._bounds[key] = [each and each.min for each in known], [each and each.max for each in known]
        return self._bounds[key]

    def read_groups(self, name: str, groups: Sequence[int], columns: Iterable[str]) -> pa.Table:
        """Some columns of these groups of rows."""
        file = self.file(name)
        with self._damage_named(name):
            return file.read_row_groups(list(groups), columns=list(columns)).replace_schema_metadata(None)

    def columns(self, name: str) -> list[str]:
        return list(self.schema(name).names)

    def json(self, *parts: str) -> dict[str, Any]:
        """A JSON record of the run such as `provenance.json`; an absent one is an empty dictionary."""
        path = self.run_dir.joinpath(*parts)
        if not path.is_file():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problem = f"{path} is not valid JSON ({error})"
            raise QueryError(problem, "delete it and run its stage again", path=path) from error
        return record if isinstance(record, dict) else {}

    def stages(self) -> dict[str, dict[str, Any]]:
        """Every stage summary that is there, in the order in which the stages run."""
        order = {name: position for position, name in enumerate(dict.fromkeys(WRITTEN_BY.values()))}
        names = sorted(
            (path.stem for path in (self.run_dir / "stages").glob("*.json")),
            key=lambda name: (order.get(name, len(order)), name),
        )
        return {name: self.json("stages", f"{name}.json") for name in names}

    @contextmanager
    def _damage_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, OSError) as error:
            path = self._folder / f"{name}.parquet"
            remedy = f"delete it and run `npeff {WRITTEN_BY.get(name, 'run')} {self.run_dir}` again"
            raise QueryError(f"{path} is damaged", remedy, path=path) from error
