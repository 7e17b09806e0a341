"""The parts of a run directory that `check` verifies, with the files to delete before each part is recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from npeff.runs.config_sections import IMPORTED_TASK
from npeff.runs.definition import StageDefinition
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.lineage import REMEDY_OF_MISFIT, misfit
from npeff.runs.part import Part, intact_record, missing, verify_table
from npeff.runs.stage import checked_record, outputs_of, table_file, tables_of
from npeff.stages.factorize import FACTORIZE
from npeff.stages.fishers import FISHERS
from npeff.stages.registry import STAGES
from npeff.storage.atomic import is_committed
from npeff.storage.checksums import file_checksum, read_json
from npeff.storage.errors import StoreError
from npeff.store.annotations import verify_annotations
from npeff.store.array_files import read_arrays


def complete_stages(run: RunDirectory) -> list[StageDefinition]:
    """Return the stages that were complete, in order, with those of the run.

    A stage whose record is missing counts as complete if a later stage that needs it has a record.
    """
    recorded = [stage for stage in STAGES if stage.leaves is None and run.record_file(stage.name).exists()]
    complete = {*recorded, *(earlier for stage in recorded for earlier in stage.ancestors())}
    return [stage for stage in STAGES if stage in complete]


def parts_of(run: RunDirectory, *, of_the_run: bool = True) -> list[Part]:
    """Return all parts of a factorization, in the order of the stages, after those of the run if ``of_the_run``."""
    parts, imported, checksums = list(_files_of(run, of_the_run)), imported_stages(run), _table_checksums(run)
    for stage in STAGES:
        if stage.leaves is not None or (stage.of_the_run and not of_the_run):
            continue
        within = [] if stage.parts is None else stage.resolve(stage.parts)(run)
        of_stage = [*_stage_parts(run, stage, checksums), *within]
        parts += map(_not_recomputable, of_stage) if stage in imported else of_stage
    return parts


def imported_stages(run: RunDirectory) -> tuple[StageDefinition, ...]:
    """Return the stages whose results come from an imported file, which no stage can recompute."""
    if run.config.task.name != IMPORTED_TASK:
        return ()
    factorized = run.record_file("factorize").exists() and not run.checkpoints.exists()
    return (FISHERS, FACTORIZE) if factorized else (FISHERS,)


def _not_recomputable(part: Part) -> Part:
    return replace(part, recomputable=False, remedy="import the file again, into a new run_dir")


def _files_of(run: RunDirectory, of_the_run: bool) -> Iterator[Part]:
    """Yield the provenance, the configuration, the report and the annotations."""
    if of_the_run:
        provenance = run.path / "provenance.json"
        yield Part("provenance", provenance, partial(read_json, provenance), (provenance,))
        yield Part(
            "configuration",
            run.path / "run.yaml",
            partial(_verify_configuration, run),
            recomputable=False,
            remedy="restore it from a copy, such as the run file that the run was made from",
        )
    if run.report.exists():
        yield Part("report", run.report, partial(_verify_report, run.report), (run.report,))
    if run.annotations.exists():
        yield Part(
            "annotations",
            run.annotations,
            partial(verify_annotations, run.annotations),
            recomputable=False,
            remedy="restore it from a copy or delete it",
        )
    if (scores := run.table("label_scores")).exists():
        yield Part(
            "table label_scores",
            scores,
            partial(verify_table, scores, None),
            recomputable=False,
            remedy=f"delete it and run `npeff label {run.argument} --score MODEL` again",
        )


def _verify_configuration(run: RunDirectory) -> None:
    """Check that ``run.yaml`` is the configuration of the shards. Its other sections cannot be verified."""
    record = intact_record(run, "fishers")
    mine = {run.config.signature("task", *more, "fishers", "seed") for more in ((), ("parameters",))}
    if record is not None and record["signature"].partition("-")[0] not in mine:
        raise RunDirectoryError("it is not the configuration that the Fishers were computed with")


def _verify_report(path: Path) -> None:
    if not path.read_bytes().rstrip().endswith(b"</html>"):
        raise StoreError(f"{path} is truncated", path=path)


def _table_checksums(run: RunDirectory) -> dict[str, str]:
    """Return the checksums of tables in the intact records of all stages: for each table that of the last stage.

    If a decomposition was imported without its Fishers, this is not the stage that usually writes the table.
    """
    records = [intact_record(run, stage.name) or {} for stage in STAGES if stage.leaves is None]
    return {table: checksum for record in records for table, checksum in record.get("tables", {}).items()}


def _stage_parts(run: RunDirectory, stage: StageDefinition, checksums: Mapping[str, str]) -> Iterator[Part]:
    """Yield the record of a stage and the outputs that a complete stage must have written."""
    record, content = run.record_file(stage.name), intact_record(run, stage.name)
    if record.exists():
        yield Part(f"record of {stage.name}", record, partial(checked_record, run, stage.name), (record,))
        yield Part(
            f"results of {stage.name}",
            record,
            partial(_verify_fit, run, stage),
            (record,),
            recomputable=stage.recomputed,
            remedy=REMEDY_OF_MISFIT,
        )
    elif stage in _expected(run):
        yield Part(f"record of {stage.name}", record, partial(missing, record))
    for table in tables_of(run, stage, content):
        path, later = table_file(run, stage, table), stage.completed_later.get(table)
        verified_later = later is not None and run.record_file(later).exists()
        verified_earlier = table in stage.completes and not record.exists()
        if not verified_later and not verified_earlier and (path.exists() or record.exists()):
            yield Part(f"table {table}", path, partial(verify_table, path, checksums.get(table)), (path,))
    for path in outputs_of(run, stage, content):
        if path.suffix == ".parquet" or (stage is FISHERS and run.fishers_home != run.path):
            continue
        if not is_committed(path) and record.exists():
            yield Part(path.name, path, partial(missing, path))
        elif path.suffix == ".safetensors" and path.exists():
            expected = (content or {}).get(path.stem)
            yield Part(path.name, path, partial(_verify_arrays, path, expected), (path, record))


def _verify_arrays(path: Path, expected: str | None) -> None:
    """Read a file of arrays, and compare it with its checksum in the record of the stage if there is one."""
    read_arrays(path)
    if expected not in (None, file_checksum(path)):
        raise StoreError(f"{path} does not match its checksum", path=path)


def _verify_fit(run: RunDirectory, stage: StageDefinition) -> None:
    """Check that the results of a stage fit those that they were made from, and the settings."""
    record = intact_record(run, stage.name)
    earlier = None if stage.after is None else intact_record(run, stage.after.name)
    if record is not None and (reason := misfit(run, stage, record, earlier)) is not None:
        raise StoreError(reason, path=run.record_file(stage.name))


def _expected(run: RunDirectory) -> list[StageDefinition]:
    """Return the stages that were complete. A decomposition imported without Fishers never had the stage fishers."""
    without_fishers = FISHERS in imported_stages(run) and not is_committed(run.fishers)
    return [stage for stage in complete_stages(run) if not (stage is FISHERS and without_fishers)]
