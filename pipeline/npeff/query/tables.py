"""Read-only access to the Parquet tables and JSON records of a run directory.

If a stage has not written a table yet, reading the table raises a `QueryError` with the command that writes it. If a
table exists but cannot be read, the error is that the table is damaged.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq

from npeff.query.errors import QueryError
from npeff.storage.commands import DEFAULT
from npeff.storage.errors import StoreError
from npeff.storage.location import is_remote, location
from npeff.storage.objects import ObjectFile, size
from npeff.store.annotations import Annotations, read_annotations
from npeff.store.lineage import refuse_foreign, refuse_unfit
from npeff.store.run_files import FilesOfRun
from npeff.store.schemas import SCHEMAS
from npeff.store.table_names import WRITTEN_BY
from npeff.store.tables import check_version, lineage_in
from npeff.variables import resolved

if TYPE_CHECKING:  # pyarrow.dataset imports pandas if installed, which most queries do not need
    import pyarrow.dataset as ds

EXAMPLE_COLUMNS = tuple(SCHEMAS["examples"].names)
"""Columns of the examples table for every task. All other columns are metadata of the task."""

NAMED_CLASSES = {"label_name": "label", "prediction_name": "prediction"}
"""Column with the name of a class to the column with its number."""

_SCAN_GROUPS, _SCAN_ROWS = 64, 131_072
"""Largest numbers of row groups (about 1 MiB or less each) and of rows in memory during a scan of a whole table."""


def _parquet(remote: bool) -> ds.ParquetFileFormat:
    import pyarrow.dataset as ds

    options: dict[str, Any] = {"page_checksum_verification": True}
    if remote:  # reading the gap between two columns is cheaper than another request
        options |= {"pre_buffer": True, "cache_options": pa.CacheOptions(hole_size_limit=2**20)}
    return ds.ParquetFileFormat(default_fragment_scan_options=ds.ParquetFragmentScanOptions(**options))


@dataclass(frozen=True)
class StoredRun(FilesOfRun):
    """The files of a stored run, with one of its factorizations."""

    path: Path
    factorization_name: str

    @property
    def name(self) -> str:
        return self.factorization_name

    @cached_property
    def fishers_home(self) -> Path:
        """The run directory with the Fishers, according to the record of the stage ``fishers``."""
        other = read_record(self.record_file("fishers")).get("from")
        return self.path if other is None else location(resolved(other, "fishers.from"))


def missing(run: FilesOfRun, what: str, command: str) -> QueryError:
    """Return the error for an output that a stage has not written yet."""
    return QueryError(f"{what} does not exist yet", f"run `npeff {command} {run.argument}` first")


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a JSON record; an empty dictionary if the file is missing."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return {}
    except ValueError as error:
        problem = f"{path} is not valid JSON ({error})"
        raise QueryError(problem, "delete it and run the stage that writes it again", path=path) from error
    return record if isinstance(record, dict) else {}


def _located(path: Path) -> tuple[str, pa_fs.FileSystem]:
    """Return the path and the Arrow file system of a file."""
    return str(path), pa_fs.PyFileSystem(_Buckets()) if is_remote(path) else pa_fs.LocalFileSystem()


class _Buckets(pa_fs.FileSystemHandler):  # type: ignore[misc]  # it has no types
    """The objects of all buckets for Arrow, read-only, by their URIs."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Buckets)

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return "bucket"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: Sequence[str]) -> list[pa_fs.FileInfo]:
        found = {path: size(location(path)) for path in paths}
        kinds = {path: pa_fs.FileType.NotFound if n is None else pa_fs.FileType.File for path, n in found.items()}
        return [pa_fs.FileInfo(path, kinds[path], size=found[path]) for path in paths]

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(ObjectFile(location(path)), mode="r")

    open_input_stream = open_input_file

    def _refused(self, *_: Any) -> Any:
        raise NotImplementedError("tables are only read")

    get_file_info_selector = create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _refused
    delete_file = move = copy_file = open_output_stream = open_append_stream = _refused


class RunTables:
    """Reader of the tables and JSON records of a run and of one of its factorizations.

    A file is opened on first use and its footer is read once, so a later replacement of the file is not read.
    """

    def __init__(self, run: StoredRun | Path) -> None:
        self.run = run if isinstance(run, StoredRun) else StoredRun(run, DEFAULT)
        self.run_dir = self.run.path
        self._paths: dict[str, Path] = {}
        self._files: dict[str, pq.ParquetFile] = {}
        self._listed: set[str] = set()
        """Tables that were found by a list of the folder."""
        self._records: dict[str, dict[str, Any]] = {}
        self._schemas: dict[str, pa.Schema] = {}
        self._datasets: dict[str, ds.Dataset] = {}
        self._bounds: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {}

    def names(self) -> list[str]:
        """Return the sorted names of the existing tables."""
        return sorted({path.stem for path in self._all("tables", "*.parquet")})

    def _path(self, name: str) -> Path:
        if name not in self._paths:
            self._paths[name] = self.run.table(name)
        return self._paths[name]

    def _all(self, folder: str, pattern: str) -> Iterator[Path]:
        """Yield the files in a folder of the run and of the factorization."""
        yield from (self.run.path / folder).glob(pattern)
        if self.run.home != self.run.path:
            yield from (self.run.home / folder).glob(pattern)

    def has(self, name: str) -> bool:
        if name in self._files or name in self._listed:
            return True
        if is_remote(self.run_dir) and not self._listed:  # one request instead of one for each table
            self._listed = set(self.names())
            if name in self._listed:
                return True
        return self._path(name).is_file()

    def dataset(self, name: str) -> ds.Dataset:
        """Return the table as a lazy Arrow dataset, which reads only the requested rows and columns.

        Raises:
            QueryError: The table is unknown, is not written yet or is damaged.
        """
        if name not in self._datasets:
            import pyarrow.dataset as ds

            schema, path = self.schema(name), self._path(name)
            kind = _parquet(is_remote(path))
            where, filesystem = _located(path)
            fragment = kind.make_fragment(where, filesystem)
            fragments = self._parts(name, fragment) if is_remote(path) else [fragment]
            self._datasets[name] = ds.FileSystemDataset(fragments, schema, kind, filesystem)
        return self._datasets[name]

    def _parts(self, name: str, fragment: ds.ParquetFileFragment) -> list[ds.ParquetFileFragment]:
        """Split a fragment by row groups. Arrow keeps the pre-buffered data in memory until a part is read."""
        n_groups = self.file(name).num_row_groups
        starts = range(0, max(n_groups, 1), _SCAN_GROUPS)
        return [
            fragment.subset(row_group_ids=list(range(start, min(start + _SCAN_GROUPS, n_groups)))) for start in starts
        ]

    def file(self, name: str) -> pq.ParquetFile:
        """Return the open file of the table, to read single row groups. Raises the errors of `dataset`."""
        if name not in self._files:
            path = self._path(name)
            if not self.has(name):
                if name in WRITTEN_BY:
                    raise missing(self.run, f"table '{name}'", WRITTEN_BY[name])
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
                self.refuse_other_results(WRITTEN_BY.get(name), path, lineage_in(file.schema_arrow))
            except StoreError as error:
                raise QueryError.of(error) from error
            self._files[name] = file
        return self._files[name]

    def refuse_other_results(self, stage: str | None, what: Path, lineage: str | None) -> None:
        """Check that a file is that of the stage's record, and that the stage's results fit those they were made from.

        Args:
            stage: The stage that wrote the file; None if no stage writes it.
            what: The file or store.
            lineage: The lineage in the file; None if unknown.

        Raises:
            StoreError: The file belongs to other results, or the results do not fit.
        """
        remedy = f"run `npeff check --recompute {self.run.argument}`"
        refuse_foreign(what, lineage, {} if stage is None else self.record(stage), remedy)
        if stage is not None:
            self._refuse_unfit(stage, remedy)

    def _refuse_unfit(self, stage: str, remedy: str) -> None:
        """Check that the results of a stage, and those that it depends on, were made from the present results."""
        for earlier, expected in self.record(stage).get("made_from", {}).items():
            if earlier in WRITTEN_BY.values():
                refuse_unfit(stage, expected, earlier, self.record(earlier).get("lineage"), remedy)
                self._refuse_unfit(earlier, remedy)

    def schema(self, name: str) -> pa.Schema:
        """Return the columns of the table and their types. Raises the errors of `dataset`."""
        if name not in self._schemas:
            self._schemas[name] = self.file(name).schema_arrow.remove_metadata()
        return self._schemas[name]

    def n_rows(self, name: str) -> int:
        return int(self.file(name).metadata.num_rows)

    def read(self, name: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Read a table, or some of its columns and the rows for which `where` is true, in stored order."""
        dataset = self.dataset(name)
        with self._damage_named(name):
            return dataset.to_table(columns=None if columns is None else list(columns), filter=where)

    def scan(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of all rows in stored order, in batches of bounded size."""
        file, columns = self.file(name), list(columns)
        with self._damage_named(name):
            if is_remote(self.run_dir):
                for fragment in self.dataset(name).get_fragments():
                    yield from fragment.to_batches(columns=columns)
                return
            for start in range(0, file.num_row_groups, _SCAN_GROUPS):
                groups = range(start, min(start + _SCAN_GROUPS, file.num_row_groups))
                yield from file.iter_batches(_SCAN_ROWS, row_groups=groups, columns=columns)

    def groups_with(self, name: str, column: str, values: Sequence[Any]) -> list[int]:
        """Return the row groups whose statistics allow one of the values in a column of integers or text."""
        low, high = self.bounds(name, column)
        wanted = sorted(set(values))
        return [
            group
            for group, (least, most) in enumerate(zip(low, high, strict=True))
            if least is None or bisect_left(wanted, least) < bisect_right(wanted, most)
        ]

    def bounds(self, name: str, column: str) -> tuple[list[Any], list[Any]]:
        """Return the smallest and the largest value of a column in every row group; None if unknown."""
        key = (name, column)
        if key not in self._bounds:
            file, position = self.file(name), self.schema(name).get_field_index(column)
            found = [file.metadata.row_group(group).column(position).statistics for group in range(file.num_row_groups)]
            known = [each if each is not None and each.has_min_max else None for each in found]
            self._bounds[key] = [each and each.min for each in known], [each and each.max for each in known]
        return self._bounds[key]

    def read_groups(self, name: str, groups: Sequence[int], columns: Iterable[str]) -> pa.Table:
        """Read some columns of the given row groups."""
        file = self.file(name)
        with self._damage_named(name):
            return file.read_row_groups(list(groups), columns=list(columns)).replace_schema_metadata(None)

    def columns(self, name: str) -> list[str]:
        return list(self.schema(name).names)

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON record of the run, such as `provenance.json`; an empty dictionary if the file is missing."""
        return read_record(self.run_dir / name)

    def record(self, stage: str) -> dict[str, Any]:
        """Return the record of a stage; an empty dictionary if the stage is not complete."""
        if stage not in self._records:
            self._records[stage] = read_record(self.run.record_file(stage))
        return self._records[stage]

    @cached_property
    def annotations(self) -> Annotations:
        """The names and notes of the components."""
        try:
            return read_annotations(self.run)
        except StoreError as error:
            raise QueryError.of(error) from None

    def stages(self) -> dict[str, dict[str, Any]]:
        """Return the existing stage records, in the order of the stages."""
        order = {name: position for position, name in enumerate(dict.fromkeys(WRITTEN_BY.values()))}
        names = sorted(
            {path.stem for path in self._all("stages", "*.json")},
            key=lambda name: (order.get(name, len(order)), name),
        )
        return {name: self.record(name) for name in names}

    @contextmanager
    def _damage_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, OSError) as error:
            path = self._path(name)
            remedy = f"delete it and run `npeff {WRITTEN_BY.get(name, 'run')} {self.run.argument}` again"
            raise QueryError(f"{path} is damaged", remedy, path=path) from error
