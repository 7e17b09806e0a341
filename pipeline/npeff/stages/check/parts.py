"""Everything in a run directory that can be verified by itself, and what to delete to have it made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from npeff.runs.config_sections import IMPORTED_TASK
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.part import Part, has_intact_record, has_record, missing, record_path_of, unit_parts
from npeff.runs.stage import outputs_of, record_as_sealed, vouched_for
from npeff.stages.factorize.parts import checkpoint_parts, factorization_parts
from npeff.stages.fishers.parts import fisher_parts
from npeff.stages.lift.parts import lift_parts
from npeff.stages.repair.parts import repair_parts
from npeff.stages.select.parts import select_parts
from npeff.storage.atomic import is_committed
from npeff.storage.checksums import file_checksum, read_json
from npeff.storage.errors import StoreError
from npeff.store.diagonal_store import read_diagonal
from npeff.store.tables import read_table

_ORDER = ("fishers", "factorize", "lift", "verify")
"""Stages that each go on from the one before."""
_BESIDE = ("attribute", "select", "repair")


def complete_stages(run: RunDirectory) -> list[str]:
    """Stages that were complete, in their order, even where a record is missing that a later one rests on."""
    last = max((place for place, stage in enumerate(_ORDER) if has_record(run, stage)), default=-1)
    return [*_ORDER[: last + 1], *(stage for stage in _BESIDE if has_record(run, stage))]


def parts_of(run: RunDirectory) -> list[Part]:
    """All parts of a run, in the order in which the stages made them."""
    stages: dict[str, tuple[Callable[[RunDirectory], Iterator[Part]], ...]] = {
        "fishers": (fisher_parts,),
        "factorize": (checkpoint_parts, factorization_parts),
        "lift": (lift_parts,),
        "verify": (partial(unit_parts, stage="verify", what="verification"),),
        "attribute": (partial(unit_parts, stage="attribute", what="shares"),),
        "select": (select_parts,),
        "repair": (repair_parts,),
    }
    parts, imported = list(_of_the_run(run)), imported_stages(run)
    for stage, parts_within in stages.items():
        of_stage = [*_stage_parts(run, stage), *(part for within in parts_within for part in within(run))]
        parts += map(_not_mendable, of_stage) if stage in imported else of_stage
    return parts


def imported_stages(run: RunDirectory) -> tuple[str, ...]:
    """Those whose results are of a file, which no stage can make again."""
    if run.config.task.name != IMPORTED_TASK:
        return ()
    return ("fishers",) if run.checkpoints.exists() or not has_record(run, "factorize") else ("fishers", "factorize")


def _not_mendable(part: Part) -> Part:
    return replace(part, mendable=False, remedy="import the file again, into a new run_dir")


def _of_the_run(run: RunDirectory) -> Iterator[Part]:
    provenance = run.path / "provenance.json"
    yield Part("provenance", provenance, partial(read_json, provenance), (provenance,))
    yield Part(
        "configuration",
        run.path / "run.yaml",
        partial(_verify_configuration, run),
        mendable=False,
        remedy="restore it from a copy, such as the run file that the run was made from",
        says_all=True,
    )
    if run.report.exists():
        yield Part("report", run.report, partial(_verify_report, run.report), (run.report,))


def _verify_configuration(run: RunDirectory) -> None:
    """What the shards were computed with must be what ``run.yaml`` says; its other sections have no such trace."""
    record = run.record("fishers") if has_intact_record(run, "fishers") else None
    mine = {run.config.signature("task", *more, "fishers", "seed") for more in ((), ("parameters",))}
    if record is not None and record["signature"].partition("-")[0] not in mine:
        raise RunDirectoryError("it is not the configuration that the Fishers were computed with")


def _verify_report(path: Path) -> None:
    if not path.read_bytes().rstrip().endswith(b"</html>"):
        raise StoreError(f"{path} is truncated")


def _stage_parts(run: RunDirectory, stage: str) -> Iterator[Part]:
    """The record of a stage; and whether what a complete one must have written is there, and readable."""
    record = record_path_of(run, stage)
    if record.exists():
        yield Part(f"record of {stage}", record, partial(record_as_sealed, run, stage), (record,))
    elif stage in _expected(run):
        yield Part(f"record of {stage}", record, partial(missing, record))
    for output in outputs_of(run, stage):
        if output.suffix == ".parquet" and (vouched_for(output, stage) or not has_record(run, "lift")):
            if output.exists() or record.exists():
                yield Part(f"table {output.stem}", output, partial(_verify_table, run, stage, output), (output,))
        elif not is_committed(output) and record.exists():
            yield Part(output.name, output, partial(missing, output))
        elif output.suffix == ".safetensors" and output.exists():
            yield Part("diagonal Fisher", output, partial(read_diagonal, output), (output, record))


def _expected(run: RunDirectory) -> list[str]:
    """Stages that were complete; of an imported decomposition alone there were never any Fishers."""
    without_fishers = "fishers" in imported_stages(run) and not is_committed(run.fishers)
    return [stage for stage in complete_stages(run) if stage in _ORDER and not (stage == "fishers" and without_fishers)]


def _verify_table(run: RunDirectory, stage: str, path: Path) -> None:
    read_table(path, path.stem)
    record = run.record(stage) if has_intact_record(run, stage) else None
    expected = (record or {}).get("tables", {}).get(path.stem)
    if expected is not None and file_checksum(path) != expected:
        raise StoreError(f"{path} does not match its checksum")
