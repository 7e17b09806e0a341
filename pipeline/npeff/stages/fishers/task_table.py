"""The table of the task's examples in a file of the run, which a worker writes and the driver reads in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from npeff.storage.atomic import local_copy, write_file_atomically

_PART_ROWS = 16_384


@dataclass(frozen=True)
class TaskTable:
    """An Arrow file of parts with the same number of rows. Only one part is in memory."""

    path: Path
    part_rows: int

    @classmethod
    def of(cls, results: Path, shard_size: int) -> TaskTable:
        """Return the table in a folder of partial results. Its parts are whole shards."""
        return cls(results / "examples.arrow", max(1, _PART_ROWS // shard_size) * shard_size)

    def write(self, table: pa.Table) -> None:
        """Write the table. Raises StoreError if it cannot be written."""
        table = table.unify_dictionaries()  # a file has one dictionary for each column

        def write(stream: BinaryIO) -> None:
            with pa.ipc.new_file(stream, table.schema) as writer:
                for start in range(0, len(table), self.part_rows):
                    writer.write_table(table.slice(start, self.part_rows).combine_chunks())

        write_file_atomically(self.path, write)

    def parts(self, column: str | None = None) -> Iterator[pa.Table]:
        """Yield the parts, with all columns or only one."""
        with self._open(column) as reader:
            for part in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(part)])

    def column(self, name: str) -> pa.Table:
        """Return a table of one column; if there is no such column, an empty table of all columns."""
        with self._open() as reader:
            schema = reader.schema
        return pa.concat_tables(self.parts(name)) if name in schema.names else schema.empty_table()

    def ids(self, examples: Sequence[int]) -> list[str]:
        """Return the ids of some examples."""
        wanted = sorted(set(examples))
        found: dict[int, str] = {}
        for number, part in enumerate(self.parts("id")):
            start = number * self.part_rows
            found |= {each: part["id"][each - start].as_py() for each in wanted if start <= each < start + len(part)}
        return [found[each] for each in examples]

    @contextmanager
    def _open(self, column: str | None = None) -> Iterator[pa.RecordBatchFileReader]:
        with local_copy(self.path) as path, pa.OSFile(str(path)) as file:
            whole = pa.ipc.open_file(file)
            fields = None if column is None else [whole.schema.get_field_index(column)]
            yield pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
