"""What a run is in: a disk that is full, a clock that is wrong, another driver, a node that is lost and comes back."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import npeff
import yaml
from end_to_end import damage
from end_to_end.commands import Command, printed
from end_to_end.run_contents import differences, has_come_to
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.registry import STAGES
from npeff.storage.errors import StoreError
from places import place

YEAR_S = 365 * 86_400.0

SMALL = {
    "task": {"name": "defective_tasks:SoundTask"},
    "fishers": {"sketch": {"kind": "identity"}, "shard_size": 8},
    "factorization": {"n_components": 3, "max_iterations": 20, "checkpoint_every": 5},
    "verification": {"top_examples": 4, "baseline_examples": 8},
    "executor": {"kind": "serial"},
}
"""A run of seconds, in this process."""

WRITTEN = {
    "fishers": ("fishers.zarr", "shards", "tables"),
    "factorize": ("factorization.zarr", "checkpoints"),
    "lift": ("directions.zarr", "partial/lift", "tables/layer_energy.parquet"),
    "verify": ("partial/verify", "tables/verification.parquet", "tables/selectivity.parquet"),
    "attribute": ("partial/attribute", "tables/position_shares.parquet"),
}


@dataclass
class Met:
    """What happened."""

    outcome: str
    seconds: float
    """That it cost."""
    lost: int = 0
    """Finished units that had to be computed again."""
    different: list[str] = field(default_factory=list)


def small_run(path: Path) -> RunDirectory:
    """A finished run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run_file = path.with_suffix(".yaml")
    run_file.write_text(yaml.safe_dump({**SMALL, "run_dir": str(path)}), encoding="utf-8")
    return npeff.run(RunConfig.from_yaml(run_file))


def without(reference: Path, stage: str, copy: Path) -> RunDirectory:
    """A copy in which a stage, and what follows it, was never begun."""
    shutil.copytree(reference, copy)
    names = list(WRITTEN)
    for name in names[names.index(stage) :]:
        for path in (copy / place(each) for each in (f"stages/{name}.json", *WRITTEN[name])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return RunDirectory.open(copy)


@contextmanager
def full_disk(file_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: writing fails part of the way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_full(reference: Path, stage: str, folder: Path) -> Met:
    """The disk is full when a stage begins, then it is not."""
    run = without(reference, stage, folder / "run")
    before, said = damage.contents(run.path), ""
    began = time.monotonic()
    try:
        with full_disk(512):
            {each.name: each for each in STAGES}[stage](run)
    except StoreError as error:
        said = str(error)
    seconds, kept = time.monotonic() - began, damage.contents(run.path)
    lost = sum(kept.get(name) != content for name, content in before.items())
    npeff.run(run)
    outcome = "exit 2, one line names the file and asks for space" if "File too large" in said else f"NOT SAID: {said}"
    return Met(outcome, seconds, lost, damage.different(run.path, reference))


def clock(reference: Path, stage: str, folder: Path, shift_s: float) -> Met:
    """All files are from another time, and the driver's clock goes by another one still."""
    run = without(reference, stage, folder / "run")
    then = time.time() + shift_s
    for path in run.path.rglob("*"):
        os.utime(path, (then, then))
    real, began = time.time, time.monotonic()
    with mock.patch("time.time", side_effect=lambda: real() - shift_s):
        npeff.run(run)
        found = npeff.check(run)
    different = damage.different(run.path, reference) + [each.what for each in found]
    return Met("no effect", time.monotonic() - began, 0, different)


def two_drivers(reference: Path, folder: Path) -> Met:
    """A second driver, and a check, while the first one is at work."""
    folder.mkdir(parents=True)
    run, run_file = folder / "run", reference.parent / "run.yaml"
    arguments: list[str | Path] = ["run", run_file, "--run-dir", run]
    with Command(*arguments, log=folder / "first.log") as first:
        first.wait_for(lambda: has_come_to(run, "fishers", 1), "a shard was recorded")
        began = time.monotonic()
        others = [
            Command(*arguments, log=folder / "second.log"),
            Command("check", "--recompute", run, log=folder / "check.log"),
        ]
        refused = []
        for other in others:
            with other:
                refused.append(other.exit_code() == 2 and "is in use by another command" in other.output)
        seconds = time.monotonic() - began
        code = first.exit_code()
    outcome = "the second: exit 2, one line names the first" if all(refused) else "THE SECOND WAS NOT REFUSED"
    return Met(outcome, seconds, code, differences(run, reference))


def node_lost(folder: Path) -> Met:
    """A node of a simulated cluster of two is lost while the solver is at work, and another one comes."""
    folder.mkdir(parents=True)
    found = printed("end_to_end.cluster_faults", folder)
    seconds = found["disturbed_s"] - found["undisturbed_s"]
    apart = found["largest_difference_of_losses"]
    different = [] if apart < 1e-6 else [f"losses by {apart:.1e}"]
    return Met("continues with one worker, then with two again", seconds, 0, different)


Meet = Callable[[], Met]
