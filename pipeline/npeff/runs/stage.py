"""What all stages share: when one is complete, how it holds the run, and what the run file means to its workers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npeff.execution.executor import ExecutorError, out_of_memory
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.storage.atomic import is_committed, remove_directory
from npeff.storage.checksums import file_checksum, json_checksum, read_json, write_json_atomically

Summary = dict[str, Any]

_OUTPUTS = {
    "fishers": ("fishers.zarr", *(f"tables/{name}.parquet" for name in ("examples", "classes", "parameters"))),
    "factorize": (
        "factorization.zarr",
        *(f"tables/{name}.parquet" for name in ("components", "top_examples", "coefficients", "history")),
    ),
    "select": ("tables/selection.parquet", "tables/selection_fits.parquet"),
    "attribute": ("tables/position_shares.parquet",),
    "lift": ("directions.zarr", "tables/layer_energy.parquet", "tables/components.parquet"),
    "repair": ("tables/repair.parquet", "tables/repair_steps.parquet"),
    "verify": ("tables/verification.parquet", "tables/selectivity.parquet"),
}


def finished(folder: Path) -> dict[int, Path]:
    """Units (shards, components) whose result or record a worker has left in ``folder``, with its file."""
    return {int(path.stem): path for path in sorted(folder.glob("*.*")) if path.stem.isdecimal()}


def recorded(run: RunDirectory, stage: str) -> Summary | None:
    """What a complete stage said of itself; None before that, and after something that it wrote has been deleted: this
    is how damaged files are made again."""
    record = record_as_sealed(run, stage)
    if record is None or not all(is_committed(path) for path in outputs_of(run, stage)):
        return None
    if stage == "factorize" and _may_go_on(run.config, record):
        return None
    if stage == "fishers" and len(finished(run.shard_records)) < record["n_shards"]:
        return None
    return record


def outputs_of(run: RunDirectory, stage: str) -> list[Path]:
    """What is there of a complete stage."""
    outputs = [run.path / name for name in _OUTPUTS[stage]]
    if stage == "fishers" and run.config.fishers.diagonal.mean:
        outputs.append(run.diagonal_fisher)
    if stage == "verify" and run.config.verification.ablation:
        outputs.append(run.table("ablation"))
    return outputs


def vouched_for(output: Path, stage: str) -> bool:
    """Whether the record of a stage holds the checksum of this output's file: a table that no later stage writes again.
    Parquet's own checksums are of its pages only."""
    return output.suffix == ".parquet" and (output.stem != "components" or stage == "lift")


def unit_files(run: RunDirectory, stage: str, component: int) -> dict[str, Path]:
    """What `verify` or `attribute` leaves of one component, by the table that it is a part of."""
    results, name = run.partial_results(stage), f"{component:05d}.parquet"
    if stage == "attribute":
        return {"position_shares": results / name}
    files = {"verification": results / name, "selectivity": results / "selectivity" / name}
    return files | ({"ablation": results / "ablation" / name} if run.config.verification.ablation else {})


def unit_checksums(run: RunDirectory, stage: str, components: Iterable[int]) -> dict[str, str]:
    """Of those files, by component, for the stage's record: Parquet's own checksums are of its pages only."""
    files = {f"{component:05d}": unit_files(run, stage, component) for component in components}
    return {
        name: json_checksum({table: file_checksum(path) for table, path in each.items()})
        for name, each in files.items()
    }


def record_as_sealed(run: RunDirectory, stage: str) -> Summary | None:
    """The record of a complete stage, whatever has become of what it wrote; None before that.

    Raises:
        RunDirectoryError: it is damaged.
    """
    record = run.record(stage)
    if record is None:
        return None
    said = {key: value for key, value in record.items() if key not in ("stage", "completed_at", "checksum")}
    if record.get("checksum") not in (None, json_checksum(said)):
        path = run.path / "stages" / f"{stage}.json"
        raise RunDirectoryError(
            f"{path} is damaged (it does not match its checksum): delete it and run `npeff {stage} {run.path}` again"
        )
    return record


def _may_go_on(config: RunConfig, factorized: Summary) -> bool:
    """Whether the factorization ended at a limit that has been raised since."""
    return factorized["stopped"] == "max_iterations" and factorized["n_iter"] < config.factorization.max_iterations


@dataclass(frozen=True)
class Stage:
    """A stage in progress, and what it recorded when it was complete before."""

    run: RunDirectory
    name: str
    done: Summary | None
    began: float

    def complete(self, summary: Summary) -> Summary:
        outputs = outputs_of(self.run, self.name)
        tables = {path.stem: file_checksum(path) for path in outputs if vouched_for(path, self.name)}
        said = {**summary, "tables": tables, "seconds": time.monotonic() - self.began}
        return self.run.complete(self.name, {**said, "checksum": json_checksum(said)})


@contextmanager
def open_stage(run: RunDirectory, name: str, after: str | None = None) -> Iterator[Stage]:
    """Hold the run for a stage.

    Raises:
        RunDirectoryError: the run is in use, or the stage before is not complete.
    """
    with run.lock():
        stage = Stage(run, name, recorded(run, name), time.monotonic())
        if stage.done is None and after is not None:
            record_of(run, after)
        try:
            yield stage
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise ExecutorError(
                f"stage {name} ran out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}): lower "
                "fishers.batch_size, fishers.sketch.dim (in a new run_dir) or lift.memory_limit_mb, or give the "
                "workers more memory"
            ) from error


def record_of(run: RunDirectory, stage: str) -> Summary:
    record = recorded(run, stage)
    if record is None:
        raise RunDirectoryError(f"stage {stage} of {run.path} is not complete: run `npeff {stage} {run.path}` first")
    return record


def forget_other_requests(results: Path, request: str) -> bool:
    """Take away the results of units, in ``results``, that were made for another request; whether that was so."""
    asked = results / "request.json"
    if asked.exists() and read_json(asked)["request"] == request:
        return False
    remove_directory(results)
    write_json_atomically(asked, {"request": request})
    return True
