"""A small run on two Ray workers; how far one has come; and what differs between two of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import yaml
from npeff.storage.checksums import read_json
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords
from npeff.store.tables import read_table
from places import place

CONFIG = {
    "run_dir": "unused: every command names its own",
    "seed": 0,
    "task": {"name": "digits", "options": {"limit": 300, "epochs": 3}},
    "fishers": {"sketch": {"kind": "tensorsketch", "dim": 512}, "shard_size": 32},
    "factorization": {
        "n_components": 6,
        "checkpoint_every": 2,
        "max_iterations": 24,
        "tolerance": 1e-15,  # never reached: there are 24 steps to be killed in
        "n_starts": 1,
    },
    "verification": {"top_examples": 8, "baseline_examples": 16},
    "executor": {"kind": "ray", "address": "local", "workers": 2},
}
N_SHARDS, N_COMPONENTS, LAST_STEP = 10, 6, 24
STAGES = ("fishers", "factorize", "lift", "verify")
OUTPUTS = {
    "fishers": ("fishers.zarr", "shards", "tables/examples.parquet", "tables/classes.parquet"),
    "factorize": ("factorization.zarr", "checkpoints", "tables/history.parquet"),
    "lift": ("directions.zarr", "partial/lift", "tables/layer_energy.parquet"),
    "verify": ("tables/verification.parquet", "partial/verify"),
}
AFTER_ALL = ("stages/attribute.json", "tables/position_shares.parquet", "partial/attribute", "report")

STEPS_TOLERANCE = 1e-6
"""Components, coefficients and losses, relative to their largest entry."""
DIRECTIONS_TOLERANCE = 1e-5
"""Unit directions, absolute: sums in float32, whose last bits depend on which components are lifted together, and these
may be others after a kill or a repair."""
VERIFICATION_TOLERANCE = 1e-3
"""Columns of the verification table, relative: a bisection on float32 logits, along those directions."""


def write_run_file(path: Path, **executor: object) -> Path:
    document = {**CONFIG, "executor": {**CONFIG["executor"], **executor}}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def units_done(run: Path, stage: str) -> dict[str, int]:
    """Finished units of a stage (shards, checkpoints, directions, verified components): modification time by name."""
    folder = {
        "fishers": run / "shards",
        "factorize": run / place("checkpoints"),
        "lift": run / place("partial/lift"),
        "verify": run / place("partial/verify"),
    }[stage]
    found = {}
    for path in folder.glob("*"):
        if path.name.split(".")[0].isdecimal() and path.suffix != ".partial":
            try:
                found[path.name] = path.stat().st_mtime_ns
            except FileNotFoundError:  # a checkpoint that was pruned meanwhile
                continue
    return found


def newest_checkpoint(run: Path) -> int:
    return max((int(name) for name in units_done(run, "factorize") if name.isdecimal()), default=0)


def has_come_to(run: Path, stage: str, units: int) -> bool:
    """Whether `stage` is at work and has finished this many units (steps of the solver, in checkpoints)."""
    before = STAGES[: STAGES.index(stage)]
    if any(not (run / place(f"stages/{name}.json")).exists() for name in before):
        return False
    if stage == "fishers" and not (run / "fishers.zarr" / "zarr.json").exists():
        return False
    return (newest_checkpoint(run) if stage == "factorize" else len(units_done(run, stage))) >= units


def before_stage(reference: Path, stage: str, copy: Path) -> Path:
    """A copy of a finished run in which `stage`, and what comes after it, was never begun."""
    shutil.copytree(reference, copy)
    begun = [f"stages/{name}.json" for name in STAGES[STAGES.index(stage) :]]
    begun += [output for name in STAGES[STAGES.index(stage) :] for output in OUTPUTS[name]]
    for output in (*begun, *AFTER_ALL):
        path = copy / place(output)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return copy


def differences(run: Path, reference: Path, stages: Iterable[str] = STAGES) -> list[str]:
    """What differs beyond the tolerances between two runs' files, a line each; empty when the runs are equal."""
    compare = {
        "fishers": _differing_fishers,
        "factorize": _differing_factorization,
        "lift": _differing_directions,
        "verify": _differing_verification,
    }
    return [f"{stage}: {line}" for stage in stages for line in compare[stage](run, reference)]


def _differing_fishers(run: Path, reference: Path) -> list[str]:
    lines = []
    stores, records = [], []
    for path in (run, reference):
        stores.append(FisherStore.open(path / "fishers.zarr"))
        records.append(ShardRecords(path / "shards", read_json(path / "stages/fishers.json")["signature"]).complete())
    if records[0].keys() != records[1].keys():
        return [f"shards {sorted(records[0])}, not {sorted(records[1])}"]
    for shard in records[1]:
        if records[0][shard].checksum != records[1][shard].checksum:
            lines.append(f"checksum of shard {shard}")
        mine, theirs = (store.read_shard(shard, of[shard].checksum) for store, of in zip(stores, records, strict=True))
        lines += [f"{name} of shard {shard}" for name in theirs if mine[name].tobytes() != theirs[name].tobytes()]
    lines += _differing_tables(run, reference, ("examples", "classes"), 0.0)
    return lines


def _differing_factorization(run: Path, reference: Path) -> list[str]:
    mine, theirs = (open_factorization(path / place("factorization.zarr")) for path in (run, reference))
    lines = _differing("components", mine.read_components(), theirs.read_components(), STEPS_TOLERANCE)
    lines += _differing("coefficients", mine.read_coefficients(), theirs.read_coefficients(), STEPS_TOLERANCE)
    tables = ("history", "coefficients", "top_examples")
    return lines + _differing_tables(run, reference, tables, STEPS_TOLERANCE, leave_out=("seconds",))


def _differing_directions(run: Path, reference: Path) -> list[str]:
    mine, theirs = (DirectionStore.open(path / place("directions.zarr")) for path in (run, reference))
    lines = []
    for component in range(theirs.n_components):
        a, b = mine.read(component), theirs.read(component)
        for name in b:
            error = float(np.abs(a[name] - b[name]).max())
            if not error <= DIRECTIONS_TOLERANCE:
                lines.append(f"direction {component}, {name}, by {error:.1e}")
    return lines + _differing_tables(run, reference, ("layer_energy", "components"), DIRECTIONS_TOLERANCE)


def _differing_verification(run: Path, reference: Path) -> list[str]:
    return _differing_tables(run, reference, ("verification",), VERIFICATION_TOLERANCE)


def _differing_tables(
    run: Path, reference: Path, names: Iterable[str], tolerance: float, leave_out: tuple[str, ...] = ()
) -> list[str]:
    lines = []
    for name in names:
        mine, theirs = (read_table(path / place(f"tables/{name}.parquet"), name) for path in (run, reference))
        if len(mine) != len(theirs) or mine.schema != theirs.schema:
            lines.append(f"table {name} has {len(mine)} rows, not {len(theirs)}, or other columns")
            continue
        for column in (column for column in theirs.column_names if column not in leave_out):
            a, b = mine[column].to_pylist(), theirs[column].to_pylist()
            if any(isinstance(value, float) for value in b):
                a, b = (np.array([np.nan if value is None else value for value in values]) for values in (a, b))
                lines += _differing(f"{name}.{column}", a, b, tolerance)
            elif a != b:
                lines.append(f"{name}.{column}")
    return lines


def _differing(what: str, mine: np.ndarray, theirs: np.ndarray, tolerance: float) -> list[str]:
    if mine.shape != theirs.shape or not np.array_equal(np.isnan(mine), np.isnan(theirs)):
        return [f"{what} has other places"]
    error = float(np.nanmax(np.abs(mine - theirs), initial=0.0) / (np.nanmax(np.abs(theirs), initial=0.0) or 1.0))
    return [] if error <= tolerance else [f"{what} by {error:.1e}"]
