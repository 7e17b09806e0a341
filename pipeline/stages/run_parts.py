"""Everything in a run directory that can be verified by itself, and what to delete to have it made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.interchange import IMPORTED_TASK
from pipeline.run_directory import RunDirectory, RunDirectoryError
from pipeline.stage import finished, outputs_of, record_as_sealed, unit_checksums, unit_files, vouched_for
from pipeline.store import (
    METADATA,
    CheckpointStore,
    DirectionStore,
    FisherStore,
    FitStore,
    ShardRecords,
    StoreError,
    file_checksum,
    is_committed,
    location,
    open_factorization,
    read_diagonal,
    read_json,
    read_table,
    remove_directory,
)

_ORDER = ("fishers", "factorize", "lift", "verify")
"""Stages that each go on from the one before."""
_BESIDE = ("attribute", "select", "repair")


@dataclass(frozen=True)
class Part:
    """Something that is verified by itself."""

    what: str
    where: Path
    verify: Callable[[], object]
    """Raises StoreError or RunDirectoryError where it is damaged."""
    deleted: tuple[Path, ...] = ()
    """What is deleted to have a stage make it again; it, and records of it."""
    mendable: bool = True
    remedy: str = ""
    """Where it cannot be made again."""
    says_all: bool = False
    """The error's line is shown whole; of others only what is wrong, as what to do is shown beside it."""


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        remove_directory(path)
    else:
        path.unlink(missing_ok=True)


def has_record(run: RunDirectory, stage: str) -> bool:
    """Whether a stage was complete, even where its record cannot be read."""
    return _record(run, stage).exists()


def complete_stages(run: RunDirectory) -> list[str]:
    """Stages that were complete, in their order, even where a record is missing that a later one rests on."""
    last = max((place for place, stage in enumerate(_ORDER) if has_record(run, stage)), default=-1)
    return [*_ORDER[: last + 1], *(stage for stage in _BESIDE if has_record(run, stage))]


def parts_of(run: RunDirectory) -> list[Part]:
    """All parts of a run, in the order in which the stages made them."""
    stages: dict[str, tuple[Callable[[RunDirectory], Iterator[Part]], ...]] = {
        "fishers": (_fisher_parts,),
        "factorize": (_checkpoint_parts, _factorization_parts),
        "lift": (_lift_parts,),
        "verify": (partial(_unit_parts, stage="verify", what="verification"),),
        "attribute": (partial(_unit_parts, stage="attribute", what="shares"),),
        "select": (_select_parts,),
        "repair": (_repair_parts,),
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
    record = run.record("fishers") if _is_intact(run, "fishers") else None
    mine = {run.config.signature("task", *more, "fishers", "seed") for more in ((), ("parameters",))}
    if record is not None and record["signature"].partition("-")[0] not in mine:
        raise RunDirectoryError("it is not the configuration that the Fishers were computed with")


def _verify_report(path: Path) -> None:
    if not path.read_bytes().rstrip().endswith(b"</html>"):
        raise StoreError(f"{path} is truncated")


def _stage_parts(run: RunDirectory, stage: str) -> Iterator[Part]:
    """The record of a stage; and whether what a complete one must have written is there, and readable."""
    record = _record(run, stage)
    if record.exists():
        yield Part(f"record of {stage}", record, partial(record_as_sealed, run, stage), (record,))
    elif stage in _expected(run):
        yield Part(f"record of {stage}", record, partial(_missing, record))
    for output in outputs_of(run, stage):
        if output.suffix == ".parquet" and (vouched_for(output, stage) or not has_record(run, "lift")):
            if output.exists() or record.exists():
                yield Part(f"table {output.stem}", output, partial(_verify_table, run, stage, output), (output,))
        elif not is_committed(output) and record.exists():
            yield Part(output.name, output, partial(_missing, output))
        elif output.suffix == ".safetensors" and output.exists():
            yield Part("diagonal Fisher", output, partial(read_diagonal, output), (output, record))


def _expected(run: RunDirectory) -> list[str]:
    """Stages that were complete; of an imported decomposition alone there were never any Fishers."""
    without_fishers = "fishers" in imported_stages(run) and not is_committed(run.fishers)
    return [stage for stage in complete_stages(run) if stage in _ORDER and not (stage == "fishers" and without_fishers)]


def _verify_table(run: RunDirectory, stage: str, path: Path) -> None:
    read_table(path, path.stem)
    record = run.record(stage) if _is_intact(run, stage) else None
    expected = (record or {}).get("tables", {}).get(path.stem)
    if expected is not None and file_checksum(path) != expected:
        raise StoreError(f"{path} does not match its checksum")


def _fisher_parts(run: RunDirectory) -> Iterator[Part]:
    record = _record(run, "fishers")
    for path in sorted(run.partial_results("diagonal").glob("*.safetensors")):
        yield Part(f"sums of diagonals {path.stem}", path, partial(read_diagonal, path), (path, record))
    if not is_committed(run.fishers):
        return
    try:
        store = FisherStore.open(run.fishers)
    except StoreError as error:
        yield from _metadata_parts(run.fishers, error, record)
        return
    records = ShardRecords(run.shard_records, _shard_signature(run, store))
    for shard in range(store.plan.n_shards):
        path = run.shard_records / f"{shard:05d}.json"
        if path.exists() or record.exists():
            yield Part(f"shard {shard}", path, partial(_verify_shard, store, records, shard), (path,))
    for shard, path in finished(run.shard_records).items():
        if shard >= store.plan.n_shards and path.suffix == ".json":
            yield Part(f"shard {shard}", path, partial(_missing, run.fishers), (path,))


def _verify_shard(store: FisherStore, records: ShardRecords, shard: int) -> None:
    record = records.read(shard)
    if (record.start, record.stop) != store.plan.bounds(shard):
        raise StoreError(f"the record of shard {shard} is of other examples")
    store.read_shard(shard, record.checksum)


def _shard_signature(run: RunDirectory, store: FisherStore) -> str:
    """Of the records: as the stage's own says, or, where that is missing or damaged, as it would be."""
    if _is_intact(run, "fishers") and (record := run.record("fishers")) is not None:
        return str(record["signature"])
    computed = run.config.signature("task", "parameters", "fishers", "seed")
    return f"{computed}-{store.attrs['model_fingerprint'][:16]}"


def _metadata_parts(group: Path, error: StoreError, record: Path) -> Iterator[Part]:
    """Of a store that cannot be opened: its damaged ``zarr.json``. What is stored in it is verified once it is back."""
    named = location(str(error).partition(" is damaged")[0])
    files = (named,) if named.name == METADATA and group in named.parents else ()

    def verify() -> None:
        raise error

    yield Part(f"metadata of {group.name}", named, verify, (*files, record), mendable=bool(files), remedy=str(error))


def _checkpoint_parts(run: RunDirectory) -> Iterator[Part]:
    if not (_is_intact(run, "fishers") and (fishers := run.record("fishers"))):
        return
    config_hash = run.config.factorization_signature() + fishers["signature"]
    store = CheckpointStore(run.checkpoints, config_hash=config_hash)
    for iteration, path in store.committed():
        yield Part(f"checkpoint {iteration}", path, partial(store.verify, path), (path,))


def _factorization_parts(run: RunDirectory) -> Iterator[Part]:
    if is_committed(run.factorization):
        yield Part("factorization", run.factorization, partial(_verify_factorization, run), (run.factorization,))


def _verify_factorization(run: RunDirectory) -> None:
    stored = open_factorization(run.factorization)
    stored.read_components()
    stored.read_coefficients()
    stored.read_columns()
    record = run.record("factorize") if _is_intact(run, "factorize") else None
    if record is not None and record.get("checksums", stored.attrs["checksums"]) != stored.attrs["checksums"]:
        raise StoreError(f"{run.factorization} is not the one that its stage wrote")


def _lift_parts(run: RunDirectory) -> Iterator[Part]:
    if not is_committed(run.directions):
        return
    record, results = _record(run, "lift"), run.partial_results("lift")
    try:
        store = DirectionStore.open(run.directions)
    except StoreError as error:
        yield from _metadata_parts(run.directions, error, record)
        return
    for component in finished_components(run, "lift"):
        path = results / f"{component:05d}.json"
        yield Part(f"direction {component}", path, partial(_verify_direction, store, path, component), (path, record))


def _verify_direction(store: DirectionStore, facts: Path, component: int) -> None:
    read_json(facts)
    store.read(component)


def _unit_parts(run: RunDirectory, stage: str, what: str) -> Iterator[Part]:
    for component in finished_components(run, stage):
        files = unit_files(run, stage, component)
        verify, deleted = partial(_verify_unit, run, stage, component), (*files.values(), _record(run, stage))
        yield Part(f"{what} of component {component}", deleted[0], verify, deleted)


def _verify_unit(run: RunDirectory, stage: str, component: int) -> None:
    for name, path in unit_files(run, stage, component).items():
        read_table(path, name)
    record = run.record(stage) if _is_intact(run, stage) else None
    for name, found in unit_checksums(run, stage, [component]).items():
        if record is not None and found != record.get("units", {}).get(name, found):
            raise StoreError(f"what {stage} left of component {component} does not match its checksum")


def finished_components(run: RunDirectory, stage: str) -> list[int]:
    """Components that a stage has finished, by what it left of them and by its record."""
    record = run.record(stage) if _is_intact(run, stage) else None
    return sorted({*finished(run.partial_results(stage)), *(record or {}).get("components", ())})


def _select_parts(run: RunDirectory) -> Iterator[Part]:
    record = _record(run, "select")
    fits = FitStore(run.partial_results("select"), signature="")
    for name in fits.names():
        files = tuple(fits.directory / f"{name}{suffix}" for suffix in (".json", ".npy"))
        yield Part(f"fit {name}", files[0], partial(fits.verify, name), (*files, record))


def _repair_parts(run: RunDirectory) -> Iterator[Part]:
    record = _record(run, "repair")
    for path in sorted(run.partial_results("repair").glob("*.json")):
        yield Part(f"repair attempt {path.stem}", path, partial(read_json, path), (path, record))
    if run.repaired.is_dir():
        yield Part("edited model", run.repaired, partial(_verify_edited_model, run), (run.repaired, record))


def _verify_edited_model(run: RunDirectory) -> None:
    path = run.repaired / "model.safetensors"
    try:
        json.loads((run.repaired / "repair.json").read_bytes())
        found = file_checksum(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{run.repaired} is damaged") from error
    record = run.record("repair") if _is_intact(run, "repair") else None
    if record is not None and found != record.get("model_checksum", found):
        raise StoreError(f"{path} does not match its checksum")


def transformed_from(run: RunDirectory) -> str | None:
    """The run whose components this one has, where they were not fitted; None where nothing says so."""
    record = run.record("factorize") if _is_intact(run, "factorize") else None
    if record is None:
        try:
            record = open_factorization(run.factorization).attrs
        except StoreError:
            return None
    return record.get("transformed_from")


def _missing(path: Path) -> None:
    raise StoreError(f"{path} is missing")


def _record(run: RunDirectory, stage: str) -> Path:
    return run.path / "stages" / f"{stage}.json"


def _is_intact(run: RunDirectory, stage: str) -> bool:
    try:
        return record_as_sealed(run, stage) is not None
    except RunDirectoryError:
        return False
