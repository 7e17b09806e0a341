"""Tables of a task in Arrow files, which are written once, in parts, and read through memory maps.

A mapped table takes no memory of the process: the kernel reads the rows that are used, and all processes of a machine
share them. `Texts` and `Arrays` give single rows of a column by their numbers.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import tempfile
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.tasks.errors import TaskError

PART_ROWS = 16_384
"""Number of rows that are in memory at once, about."""
_PART_BYTES = 64 * 2**20
"""Size of the rows that are in memory at once, about."""
_FOLDER, _OPTIONS = "examples", "options.sha256"

Parts = Callable[[], Iterable[pa.Table]]
RowT = TypeVar("RowT")


class Prepared:
    """The Arrow files of a task.

    Args:
        folder: The folder of the files. If None, the tables are written to unnamed files, which end with the process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @classmethod
    def of(cls, cache: Path, options: object) -> Prepared:
        """Return the files that `preparing` has written to a task's folder, or unnamed ones if there are none.

        Files of other options are not used: a task can be loaded for other data than those of its run.
        """
        file = cache / _FOLDER / _OPTIONS
        is_own = file.exists() and file.read_text(encoding="utf-8") == _digest(options)
        return cls(file.parent if is_own else None)

    def table(self, name: str, parts: Parts, check: Callable[[pa.Table], object] = lambda _: None) -> pa.Table:
        """Return a mapped table, which is written if it does not exist.

        Args:
            name: Name of the file.
            parts: Function that yields the rows in one or more tables of one schema.
            check: Function that raises an error if the table is not valid. It is called once, after it is written.
        """
        if self._folder is None:
            with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
                return _written(Path(folder) / f"{name}.arrow", parts, check)  # the map keeps the file
        path = self._folder / f"{name}.arrow"
        return _mapped(path) if path.exists() else _written(path, parts, check)


@contextmanager
def preparing(cache: Path, options: object) -> Iterator[Prepared]:
    """Yield an empty folder for the files of a task, which replaces the former one unless their contents are equal.

    Args:
        cache: The folder of the task.
        options: The options of the task, which `repr` describes.
    """
    path, partial = cache / _FOLDER, cache / f"{_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield Prepared(partial)
        (partial / _OPTIONS).write_text(_digest(options), encoding="utf-8")
        if not _equal(path, partial):  # files that stay are not sent to an object store again
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(options: object) -> str:
    return hashlib.sha256(repr(options).encode()).hexdigest()


def _equal(one: Path, other: Path) -> bool:
    names = [file.name for file in other.iterdir()]
    if not one.is_dir() or sorted(names) != sorted(file.name for file in one.iterdir()):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def _written(path: Path, parts: Parts, check: Callable[[pa.Table], object]) -> pa.Table:
    partial = path.with_name(path.name + ".partial")
    try:
        with pa.OSFile(str(partial), "wb") as file:
            waiting = _in_large_parts(parts())
            first = next(waiting)
            with pa.ipc.new_file(file, first.schema) as writer:
                writer.write_table(first)
                for part in waiting:
                    writer.write_table(part)
        check(_mapped(partial))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TaskError(f"cannot write {path}: {reason}", "free space, or choose another folder", path=path) from None
    finally:
        partial.unlink(missing_ok=True)
    return _mapped(path)


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _in_large_parts(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate small parts, because every part of a file takes some memory when the file is read."""
    waiting: list[pa.Table] = []
    n_rows = n_bytes = 0
    for part in parts:
        waiting.append(part)
        n_rows, n_bytes = n_rows + len(part), n_bytes + part.nbytes
        if n_rows >= PART_ROWS or n_bytes >= _PART_BYTES:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, n_rows, n_bytes = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def slices(n_rows: int, size: int = PART_ROWS) -> Iterator[slice]:
    """Yield the slices of parts of a table; one empty slice if there are no rows."""
    for start in range(0, max(n_rows, 1), size):
        yield slice(start, min(start + size, n_rows))


class _Rows(Sequence[RowT]):
    """Rows that are made when they are used. A slice is a list."""

    @abstractmethod
    def _some(self, rows: slice) -> list[RowT]:
        """Return the rows from the start to the stop of a slice, both of which are in the table."""

    @overload
    def __getitem__(self, row: int) -> RowT: ...
    @overload
    def __getitem__(self, row: slice) -> list[RowT]: ...
    def __getitem__(self, row: int | slice) -> RowT | list[RowT]:
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            return self._some(slice(start, stop)) if step == 1 else [self[each] for each in range(start, stop, step)]
        place = row + len(self) if row < 0 else row
        if not 0 <= place < len(self):
            raise IndexError(f"row {row} is not one of {len(self)}")
        return self._some(slice(place, place + 1))[0]


class Texts(_Rows[str]):
    """A column as strings, with an empty string for null.

    Args:
        column: The column.
        problem: Message of the TaskError if the type of the column, or a value, cannot be converted to strings.
    """

    def __init__(self, column: pa.ChunkedArray, problem: str) -> None:
        self._column, self._problem = column, problem
        self._some(slice(0, 0))

    def __len__(self) -> int:
        return len(self._column)

    def _some(self, rows: slice) -> list[str]:
        try:
            found: list[str] = pc.fill_null(self._column[rows].cast(pa.string()), "").to_pylist()
            return found
        except pa.ArrowException:
            raise TaskError(self._problem) from None

    def __iter__(self) -> Iterator[str]:
        for part in slices(len(self)):
            yield from self[part]


class Joined(_Rows[str]):
    """The texts of several columns, joined row by row."""

    def __init__(self, columns: Sequence[Sequence[str]], separator: str) -> None:
        self._columns, self._separator = columns, separator

    def __len__(self) -> int:
        return len(self._columns[0])

    def _some(self, rows: slice) -> list[str]:
        return list(map(self._separator.join, zip(*(column[rows] for column in self._columns), strict=True)))


class Arrays(_Rows[NDArray[np.integer]]):
    """A column of lists of integers without nulls. A row is an array that shares the memory of the column."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = [0, *accumulate(map(len, chunks))]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]

    def __len__(self) -> int:
        return self._starts[-1]

    def _some(self, rows: slice) -> list[NDArray[np.integer]]:
        return [self._one(row) for row in range(rows.start, rows.stop)]

    def _one(self, row: int) -> NDArray[np.integer]:
        chunk = bisect_right(self._starts, row) - 1
        start, stop = self._offsets[chunk][row - self._starts[chunk] :][:2]
        values: NDArray[np.integer] = self._values[chunk][start:stop]
        return values

    def chunks(self) -> Iterator[tuple[int, NDArray[np.integer], NDArray[np.integer]]]:
        """Yield, for some rows at a time, the number of the first one, their offsets, and all their values."""
        for start, offsets, values in zip(self._starts, self._offsets, self._values, strict=False):
            yield start, offsets - offsets[0], values[offsets[0] : offsets[-1]]

    def joined(self) -> NDArray[np.integer]:
        """Return the values of all rows, one after another."""
        return np.concatenate([np.zeros(0, np.int32), *(values for _, _, values in self.chunks())])

    def lengths(self) -> NDArray[np.int32]:
        """Return the number of values of each row, (N,)."""
        return np.concatenate([np.zeros(0, np.int32), *(np.diff(offsets) for offsets in self._offsets)])
