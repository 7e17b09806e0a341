"""The Parquet tables and JSON records of a run directory, for reading only.

A table that a stage has not written yet is a normal state of a run: asking for it raises a `QueryError` that names the
command which writes it. A table that is there and cannot be read is damage, and the message says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.query.errors import QueryError
from pipeline.store import SCHEMAS, is_remote
from pipeline.store.objects import file_system, key_of

WRITTEN_BY = {
    "examples": "fishers",
    "classes": "fishers",
    "parameters": "fishers",
    "components": "factorize",
    "top_examples": "factorize",
    "coefficients": "factorize",
    "history": "factorize",
    "selection": "select",
    "selection_fits": "select",
    "layer_energy": "lift",
    "verification": "verify",
}
"""Table name to the `npeff` command of the stage that writes it."""

EXAMPLE_COLUMNS = tuple(SCHEMAS["examples"].names)
"""Columns of the examples table that every task has; all further ones are the task's own metadata."""

_PARQUET = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)


def missing(run_dir: Path, what: str, command: str) -> QueryError:
    """The error for something that a stage has not written yet."""
    return QueryError(f"{what} is not there yet: run `npeff {command} {run_dir}` first")


class RunTables:
    """Reads `<run>/tables/*.parquet` and the JSON records beside them."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._folder = run_dir / "tables"

    def names(self) -> list[str]:
        """Names of the tables that are there, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.parquet"))

    def has(self, name: str) -> bool:
        return (self._folder / f"{name}.parquet").is_file()

    def dataset(self, name: str) -> ds.Dataset:
        """The table as a lazy Arrow dataset: rows and columns that are not asked for are not read.

        Raises:
            QueryError: there is no such table, it is not written yet, or its file is damaged.
        """
        path = self._folder / f"{name}.parquet"
        if not path.is_file():
            if name in WRITTEN_BY:
                raise missing(self.run_dir, f"table '{name}'", WRITTEN_BY[name])
            raise QueryError(f"there is no table '{name}': this run has {', '.join(self.names()) or 'no tables yet'}")
        try:
            if is_remote(path):
                return ds.dataset(key_of(path), format=_PARQUET, filesystem=file_system(path))
            return ds.dataset(path, format=_PARQUET)
        except (pa.ArrowInvalid, OSError) as error:
            raise self._damaged(name) from error

    def read(self, name: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Read a table, or only some of its columns and the rows for which `where` holds, in the order written."""
        dataset = self.dataset(name)
        try:
            return dataset.to_table(columns=None if columns is None else list(columns), filter=where)
        except (pa.ArrowInvalid, OSError) as error:
            raise self._damaged(name) from error

    def columns(self, name: str) -> list[str]:
        return list(self.dataset(name).schema.names)

    def json(self, *parts: str) -> dict[str, Any]:
        """A JSON record of the run such as `provenance.json`; an absent one is an empty dictionary."""
        path = self.run_dir.joinpath(*parts)
        if not path.is_file():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise QueryError(f"{path} is not valid JSON ({error}): delete it and run its stage again") from error
        return record if isinstance(record, dict) else {}

    def stages(self) -> dict[str, dict[str, Any]]:
        """Every stage summary that is there, in the order in which the stages run."""
        order = {
            name: position
            for position, name in enumerate(("fishers", "select", "factorize", "lift", "verify", "report"))
        }
        names = sorted(
            (path.stem for path in (self.run_dir / "stages").glob("*.json")),
            key=lambda name: (order.get(name, len(order)), name),
        )
        return {name: self.json("stages", f"{name}.json") for name in names}

    def _damaged(self, name: str) -> QueryError:
        path = self._folder / f"{name}.parquet"
        command = WRITTEN_BY.get(name, "run")
        return QueryError(f"{path} is damaged: delete it and run `npeff {command} {self.run_dir}` again")
