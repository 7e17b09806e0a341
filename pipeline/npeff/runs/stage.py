"""A stage in progress: its lock, its outputs and its record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from npeff.errors import first_line
from npeff.execution.executor import ExecutorError, out_of_memory
from npeff.runs.definition import StageDefinition, Summary, finished, unit_file
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError, damaged_record
from npeff.runs.lineage import MadeFrom, lineage_of, made_from, misfit, refuse_misfit, unit_lineage
from npeff.runs.progress import ProgressDisplay
from npeff.storage.atomic import is_committed, remove_directory
from npeff.storage.checksums import file_checksum, json_checksum, read_json, write_json_atomically
from npeff.storage.location import is_remote
from npeff.store.lineage import group_lineage, refuse_foreign
from npeff.store.tables import table_lineage

_REQUEST = "request.json"


def recorded(run: RunDirectory, stage: StageDefinition) -> Summary | None:
    """Return the record of a complete stage; None if the stage is not complete.

    A stage is not complete if an output was deleted. Damaged files are recomputed in this way. It is also not complete
    if its results no longer fit the results that they were made from, or the settings.

    Raises:
        RunDirectoryError: The record is damaged; or the results do not fit, and are not recomputed because they take
            long and other results depend on them.
    """
    record = checked_record(run, stage.record)
    if record is None or not all(is_committed(path) for path in outputs_of(run, stage, record)):
        return None
    if not stage.stands(run, record):
        return None
    return None if _is_misfit(run, stage, record, _earlier(run, stage)) else record


def _is_misfit(run: RunDirectory, stage: StageDefinition, record: Summary | None, earlier: Summary | None) -> bool:
    """Return whether the results of a stage do not fit, and are to be computed again.

    Raises:
        RunDirectoryError: They do not fit, and are not computed again.
    """
    reason = None if record is None else misfit(run, stage, record, earlier)
    if reason is not None and not stage.recomputed:
        raise refuse_misfit(run, reason)
    return reason is not None


def _earlier(run: RunDirectory, stage: StageDefinition) -> Summary | None:
    """Return the record of the stage that a stage follows."""
    return None if stage.after is None else checked_record(run, stage.after.record)


def outputs_of(run: RunDirectory, stage: StageDefinition, record: Summary | None) -> list[Path]:
    """Return the files and folders of a complete stage with this record."""
    return [
        *(run.store(stage.name, store) for store in stage.stores if _is_written(run, stage, store)),
        *(table_file(run, stage, table) for table in tables_of(run, stage, record)),
    ]


def tables_of(run: RunDirectory, stage: StageDefinition, record: Summary | None = None) -> list[str]:
    """Return the names of the tables that a stage writes in this run, or of those that it wrote, with this record."""
    lacking = () if record is None else set(stage.added) - record.get("tables", {}).keys()
    return [table for table in stage.tables if table not in lacking and _is_written(run, stage, table)]


def table_file(run: RunDirectory, stage: StageDefinition, table: str) -> Path:
    """Return the file of a table that a stage writes."""
    return run.shared_table(table) if stage.of_the_run else run.table(table)


def _is_written(run: RunDirectory, stage: StageDefinition, output: str) -> bool:
    return output not in stage.optional or bool(attrgetter(stage.optional[output])(run.config))


def sealed_tables(run: RunDirectory, stage: StageDefinition) -> list[Path]:
    """Return the tables whose checksums the record of the stage contains: those that no later stage completes.

    The checksums inside Parquet files cover only the pages.
    """
    tables = [table for table in tables_of(run, stage) if table not in stage.completed_later]
    return [table_file(run, stage, table) for table in tables]


def unit_files(
    run: RunDirectory, stage: StageDefinition, component: int, record: Summary | None = None
) -> dict[str, Path]:
    """Return the result files of one component, for a stage that works by components: table name to file.

    With a record, those of the complete stage that wrote it.
    """
    results = run.partial_results(stage.name)
    tables = [table for table in tables_of(run, stage, record) if table not in stage.whole]
    return {table: unit_file(results, component, table, first=tables[0]) for table in tables}


def unit_checksums(
    run: RunDirectory, stage: StageDefinition, components: Iterable[int], record: Summary | None = None
) -> dict[str, str]:
    """Return the checksums of the result files of components (see `unit_files`), for the record of the stage."""
    files = {f"{component:05d}": unit_files(run, stage, component, record) for component in components}
    return {
        name: json_checksum({table: file_checksum(path) for table, path in each.items()})
        for name, each in files.items()
    }


def checked_record(run: RunDirectory, stage: str) -> Summary | None:
    """Return the record of a stage without checking its outputs; None if there is no record.

    Raises:
        RunDirectoryError: The record is damaged.
    """
    record = run.record(stage)
    if record is None:
        return None
    content = {key: value for key, value in record.items() if key not in ("stage", "completed_at", "checksum")}
    if record.get("checksum") not in (None, json_checksum(content)):
        raise damaged_record(run, stage, "it does not match its checksum")
    return record


@dataclass(frozen=True)
class Stage:
    """A stage in progress. ``done`` is its record if the stage is already complete."""

    run: RunDirectory
    definition: StageDefinition
    done: Summary | None
    began: float
    made_from: MadeFrom | None = None
    """What the results are made from; None if it is unknown."""

    @property
    def lineage(self) -> str | None:
        """The lineage of the results, for stages whose lineage does not include the results themselves."""
        return lineage_of(self.definition, self.made_from)

    def sources(self) -> Summary:
        """Return the fields of the record that tell what the results were made from."""
        return {} if self.made_from is None else {"made_from": self.made_from, "lineage": self.lineage}

    def discard_foreign_units(self, progress: ProgressDisplay) -> None:
        """Delete the finished components with a file that was made from other results or with other settings."""
        if self.lineage is None:
            return
        foreign = 0
        for component, path in finished(self.run.partial_results(self.definition.name)).items():
            files = unit_files(self.run, self.definition, component) if path.suffix == ".parquet" else {"": path}
            known = {unit_lineage(file) for file in files.values() if is_committed(file)} - {None}
            if known - {self.lineage}:
                path.unlink()
                foreign += 1
        if foreign:
            progress.say(
                f"{foreign} results of {self.definition.name} were made from other results or with other settings; "
                "computing them again"
            )

    def complete(self, summary: Summary, further_tables: Iterable[Path] = ()) -> Summary:
        """Record that the stage is complete, with the checksums of its tables and of ``further_tables``."""
        paths = (*sealed_tables(self.run, self.definition), *further_tables)
        tables = {path.stem: file_checksum(path) for path in paths}
        content = {**self.sources(), **summary, "tables": tables, "seconds": time.monotonic() - self.began}
        return self.run.complete(self.definition.record, {**content, "checksum": json_checksum(content)})


@contextmanager
def open_stage(run: RunDirectory, definition: StageDefinition) -> Iterator[Stage]:
    """Lock the run for a stage.

    Raises:
        RunDirectoryError: The run is in use, or the preceding stage is not complete.
        ExecutorError: The body ran out of memory.
    """
    with run.lock():
        if not definition.of_the_run and not run.is_defined():
            raise RunDirectoryError(
                f"{run.path} has no factorization", f"run `npeff factorize {run.path} --components K`"
            )
        done = recorded(run, definition)
        if done is None and definition.after is not None:
            record_of(run, definition.after)
        before = list(definition.ancestors())
        records = [checked_record(run, each.record) for each in before]
        for each, record, earlier in zip(before, records, [*records, None][1:], strict=True):
            _is_misfit(run, each, record, earlier)
            _refuse_foreign_results(run, each, record, earlier)
        sources = made_from(run, definition, records[0] if records else None)
        stage = Stage(run, definition, done, time.monotonic(), sources)
        try:
            yield stage
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise ExecutorError(
                f"stage {definition.name} ran out of memory ({first_line(error)})",
                "lower fishers.batch_size, fishers.sketch.dim (in a new run_dir) or lift.memory_limit_mb, or give the "
                "workers more memory",
            ) from error


def refuse_foreign_results(run: RunDirectory, stage: StageDefinition) -> None:
    """Check that the tables and stores of a complete stage are those of its record.

    On an object store, only the stores are checked, because the metadata of a table are not read without the table.

    Raises:
        StoreError: A table or store belongs to other results.
    """
    _refuse_foreign_results(run, stage, checked_record(run, stage.record), _earlier(run, stage))


def _refuse_foreign_results(
    run: RunDirectory, stage: StageDefinition, record: Summary | None, earlier: Summary | None
) -> None:
    if record is None or "lineage" not in record:
        return
    remedy = f"run `npeff check --recompute {run.argument}`"
    for path in outputs_of(run, stage, record):
        if path.suffix == ".parquet" and not is_remote(path) and path.is_file():
            owner = record if path.stem not in stage.completes else earlier
            refuse_foreign(path, table_lineage(path), owner, remedy)
        elif path.suffix == ".zarr" and not stage.of_the_run:  # a Fisher store has records of its shards instead
            refuse_foreign(path, group_lineage(path), record, remedy)


def record_of(run: RunDirectory, stage: StageDefinition) -> Summary:
    """Return the record of a complete stage.

    Raises:
        RunDirectoryError: The stage is not complete.
    """
    record = recorded(run, stage)
    if record is None:
        where = run.fishers_home if stage.name == "fishers" else run.path if stage.of_the_run else run.argument
        problem = f"stage {stage.name} of {where if stage.of_the_run else run.path} is not complete"
        raise RunDirectoryError(problem, f"run `npeff {stage.name} {where}` first")
    return record


def is_request(results: Path, request: str) -> bool:
    """Return whether the results in ``results`` belong to this request."""
    asked = results / _REQUEST
    return asked.exists() and bool(read_json(asked)["request"] == request)


def forget_other_requests(results: Path, request: str) -> bool:
    """Delete the results in ``results`` if they belong to another request, and return whether they were deleted."""
    if is_request(results, request):
        return False
    remove_directory(results)
    write_json_atomically(results / _REQUEST, {"request": request})
    return True
