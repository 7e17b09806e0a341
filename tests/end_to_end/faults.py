"""Kills a run at chosen instants, gives the same command again, and compares what comes of it with an undisturbed run.

    python tests/end_to_end/faults.py [--only driver:lift] [--folder DIR]

runs the whole matrix (who is killed × stage × when) and prints a table. `test_faults.py` uses the same parts.

Every command is started as the leader of a session of its own. Whatever it starts (a private Ray, its actors) stays in
that session even after the parent died, so the session's members are the command's processes, orphans included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from pipeline.store import DirectionStore, FisherStore, ShardRecords, open_factorization, read_json, read_table

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

STEPS_TOLERANCE = 1e-6
"""Components, coefficients and losses, relative to their largest entry."""
DIRECTIONS_TOLERANCE = 1e-5
"""Unit directions, absolute: other blocks of components are lifted together after a kill, in float32."""
VERIFICATION_TOLERANCE = 1e-3
"""Columns of the verification table, relative: a bisection on float32 logits, along those directions."""


SLOW_TO_END = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Helpers of a Ray whose server was killed: they try for a minute to tell it, and then end. They never touch a run."""


# Processes


@dataclass(frozen=True)
class Process:
    pid: int
    title: str
    """Its command line; Ray gives actors one that says what they do: ``ray::_Worker.call``."""

    @property
    def is_actor(self) -> bool:
        return self.title.startswith("ray::_Worker")

    @property
    def is_computing(self) -> bool:
        return self.title.startswith("ray::_Worker.call")

    @property
    def is_ray(self) -> bool:
        """The private Ray: its two servers, its helpers and all worker processes."""
        return "gcs_server" in self.title or "raylet" in self.title or "ray" in self.title.split(" ")[0]


def session_members(session: int) -> list[Process]:
    """All living processes of a session (zombies are dead)."""
    members = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # the second field, the name in parentheses, may hold anything
            state, _, _, of_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of_session) == session and state not in "ZX":
            members.append(Process(int(folder.name), title))
    return members


def send(processes: Iterable[Process], signal_number: int = signal.SIGKILL) -> None:
    for process in processes:
        try:
            os.kill(process.pid, signal_number)
        except ProcessLookupError:
            continue


class Command:
    """``npeff ARGUMENTS`` in a session of its own, its output in a file."""

    def __init__(self, *arguments: str | Path, log: Path) -> None:
        self._log = log
        self.began = time.monotonic()
        with log.open("wb") as stream:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def processes(self) -> list[Process]:
        return session_members(self.driver.pid)

    def actors(self) -> list[Process]:
        """Actors that are computing something; those that idle come after them."""
        return sorted((process for process in self.processes if process.is_actor), key=lambda p: not p.is_computing)

    def wait_for(self, condition: Callable[[], bool], what: str, deadline_s: float = 300.0) -> None:
        """Raises AssertionError when the command ends, or the deadline passes, before the condition holds."""
        until = time.monotonic() + deadline_s
        while not condition():
            ended = self.driver.poll()
            assert ended is None, f"the command ended ({ended}) before {what}:\n{self.output}"
            assert time.monotonic() < until, f"not within {deadline_s:.0f} s: {what}\n{self.output}"
            time.sleep(0.002)

    def exit_code(self, deadline_s: float = 300.0) -> int:
        return self.driver.wait(timeout=deadline_s)

    def seconds_until_nothing_is_left(self, deadline_s: float = 60.0, but: tuple[str, ...] = ()) -> float:
        """How long the command's processes, `but` for those with these titles, outlive the driver.

        Raises:
            AssertionError: some are there after the deadline; they are ended.
        """
        began = time.monotonic()
        while left := [process for process in self.processes if process.title not in but]:
            if time.monotonic() - began > deadline_s:
                send(left)
                raise AssertionError(f"left behind after {deadline_s:.0f} s: {[process.title for process in left]}")
            time.sleep(0.01)
        return time.monotonic() - began

    def close(self) -> None:
        """End whatever is left, as after a failed assertion."""
        if self.driver.poll() is None:
            self.driver.kill()
        send(self.processes)
        self.driver.wait()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# What a run directory holds


def units_done(run: Path, stage: str) -> dict[str, int]:
    """Finished units of a stage (shards, checkpoints, directions, verified components): modification time by name."""
    folder = {
        "fishers": run / "shards",
        "factorize": run / "checkpoints",
        "lift": run / "partial/lift",
        "verify": run / "partial/verify",
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
    if any(not (run / "stages" / f"{name}.json").exists() for name in before):
        return False
    if stage == "fishers" and not (run / "fishers.zarr" / "zarr.json").exists():
        return False
    return (newest_checkpoint(run) if stage == "factorize" else len(units_done(run, stage))) >= units


def before_stage(reference: Path, stage: str, copy: Path) -> Path:
    """A copy of a finished run in which `stage`, and what comes after it, was never begun."""
    shutil.copytree(reference, copy)
    shutil.rmtree(copy / "report", ignore_errors=True)
    for name in STAGES[STAGES.index(stage) :]:
        (copy / "stages" / f"{name}.json").unlink(missing_ok=True)
        for output in OUTPUTS[name]:
            path = copy / output
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
    mine, theirs = (open_factorization(path / "factorization.zarr") for path in (run, reference))
    lines = _differing("components", mine.read_components(), theirs.read_components(), STEPS_TOLERANCE)
    lines += _differing("coefficients", mine.read_coefficients(), theirs.read_coefficients(), STEPS_TOLERANCE)
    tables = ("history", "coefficients", "top_examples")
    return lines + _differing_tables(run, reference, tables, STEPS_TOLERANCE, leave_out=("seconds",))


def _differing_directions(run: Path, reference: Path) -> list[str]:
    mine, theirs = (DirectionStore.open(path / "directions.zarr") for path in (run, reference))
    lines = []
    for component in range(N_COMPONENTS):
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
        mine, theirs = (read_table(path / f"tables/{name}.parquet", name) for path in (run, reference))
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


# The matrix


def write_run_file(path: Path, **executor: object) -> Path:
    document = {**CONFIG, "executor": {**CONFIG["executor"], **executor}}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def reference_run(folder: Path) -> Path:
    """An undisturbed run."""
    run = folder / "reference"
    run_file = write_run_file(folder / "run.yaml")
    with Command("run", run_file, "--run-dir", run, log=folder / "reference.log") as command:
        assert command.exit_code() == 0, command.output
    return run


@dataclass(frozen=True)
class Fault:
    victim: str
    """driver, actor, hung actor (stopped, not killed), Ray (all of it, actors too), gcs_server or raylet."""
    stage: str
    units: int
    """Shards, steps, directions or components that are finished when it strikes."""
    whole_run: bool = False
    """The command is ``npeff run`` from an empty directory, instead of the stage's from the reference's inputs."""

    def victims(self, command: Command) -> list[Process]:
        members = command.processes
        match self.victim:
            case "driver":
                return [process for process in members if process.pid == command.driver.pid]
            case "actor" | "hung actor":
                return command.actors()[:1]
            case "Ray":
                return [process for process in members if process.pid != command.driver.pid]
            case name:
                return [process for process in members if process.title.split(" ")[0].endswith("/" + name)]


@dataclass
class Outcome:
    fault: Fault
    found: int = 0
    """Units that were finished when it struck."""
    exit_code: int = 0
    """Of the command that was struck."""
    end_s: float = 0.0
    """From the blow to the end of that command."""
    outlived_s: float = 0.0
    """How long the command's other processes were there after it."""
    last_line: str = ""
    again_exit_code: int = 0
    again_s: float = 0.0
    redone: int = 0
    """Finished units that were computed again; solver steps since the last checkpoint are counted by `resumed`."""
    resumed: str = ""
    different: list[str] = field(default_factory=list)


def strike(fault: Fault, reference: Path, folder: Path) -> Outcome:
    """Start, strike, give the same command again at once, compare."""
    folder.mkdir(parents=True)
    run = folder / "run"
    timeout = {"timeout_s": 20} if fault.victim == "hung actor" else {}
    run_file = write_run_file(folder / "run.yaml", **timeout)
    if fault.whole_run:
        arguments: list[str | Path] = ["run", run_file, "--run-dir", run]
    else:
        before_stage(reference, fault.stage, run)
        arguments = [fault.stage, run_file, "--run-dir", run]
    outcome = Outcome(fault)
    with Command(*arguments, log=folder / "first.log") as first:
        first.wait_for(
            lambda: has_come_to(run, fault.stage, fault.units) and bool(first.actors()),
            f"{fault.units} units of {fault.stage} were finished",
        )
        first.wait_for(lambda: any(actor.is_computing for actor in first.actors()), "an actor computed")
        victims = fault.victims(first)
        assert victims, f"no {fault.victim} to kill"
        began = time.monotonic()
        send(victims, signal.SIGSTOP if fault.victim == "hung actor" else signal.SIGKILL)
        done = units_done(run, fault.stage)
        outcome.found = newest_checkpoint(run) if fault.stage == "factorize" else len(done)
        outcome.exit_code = first.exit_code()
        outcome.end_s = time.monotonic() - began
        with Command(*arguments, log=folder / "again.log") as again:
            outcome.outlived_s = first.seconds_until_nothing_is_left(but=SLOW_TO_END)
            outcome.again_exit_code = again.exit_code()
            outcome.again_s = time.monotonic() - again.began
            again.seconds_until_nothing_is_left()
        lines = first.output.strip().splitlines()
        outcome.last_line = lines[-1] if lines else ""
        resumed = [line for line in (first.output + again.output).splitlines() if "going on from iteration" in line]
        outcome.resumed = resumed[-1].rsplit(" ", 1)[1] if resumed else ""
    if fault.stage != "factorize":  # whose checkpoints are pruned
        now = units_done(run, fault.stage)
        outcome.redone = sum(now.get(name) != written for name, written in done.items())
    outcome.different = differences(run, reference, STAGES if fault.whole_run else (fault.stage,))
    return outcome


MATRIX = [
    *(
        Fault(victim, stage, units)
        for stage, points in (("fishers", (0, 4, 8)), ("factorize", (0, 4, 12)), ("lift", (0, 3)), ("verify", (0, 3)))
        for units in points
        for victim in ("driver", "actor", "Ray")
    ),
    Fault("gcs_server", "fishers", 4),
    Fault("raylet", "fishers", 4),
    Fault("gcs_server", "factorize", 4),
    Fault("raylet", "factorize", 4),
    Fault("hung actor", "fishers", 4),
    Fault("hung actor", "factorize", 4),
    Fault("driver", "fishers", 4, whole_run=True),
    Fault("Ray", "verify", 3, whole_run=True),
]

_HEADINGS = (
    "victim",
    "stage",
    "at",
    "exit",
    "ended in",
    "outlived by",
    "again",
    "took",
    "redone",
    "equal",
    "last line",
)


def row(outcome: Outcome) -> tuple[str, ...]:
    fault = outcome.fault
    unit = {"fishers": "shards", "factorize": "steps", "lift": "directions", "verify": "components"}[fault.stage]
    return (
        fault.victim,
        fault.stage + (" in run" if fault.whole_run else ""),
        f"{outcome.found} {unit}",
        str(outcome.exit_code),
        f"{outcome.end_s:.1f} s",
        f"{outcome.outlived_s:.1f} s",
        str(outcome.again_exit_code),
        f"{outcome.again_s:.1f} s",
        f"from {outcome.resumed or 0}" if fault.stage == "factorize" else str(outcome.redone),
        "yes" if not outcome.different else f"NO: {'; '.join(outcome.different[:3])}",
        outcome.last_line[:150],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="victim:stage[:units], such as driver:lift; the whole matrix without it")
    parser.add_argument("--folder", type=Path, help="keep everything there; a temporary folder without it")
    arguments = parser.parse_args()
    victim, stage, units = [*(arguments.only or "").split(":"), "", ""][:3]
    faults = [
        fault
        for fault in MATRIX
        if victim in ("", fault.victim) and stage in ("", fault.stage) and units in ("", str(fault.units))
    ]
    if not faults:
        parser.error(f"no fault of the matrix is {arguments.only}")
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        reference = folder / "reference" if (folder / "reference/report").exists() else reference_run(folder)
        print("| " + " | ".join(_HEADINGS) + " |\n|" + "---|" * len(_HEADINGS), flush=True)
        for number, fault in enumerate(faults):
            try:
                outcome = strike(fault, reference, folder / f"{number:02d}")
            except AssertionError as error:
                print(f"| {fault.victim} | {fault.stage} | {fault.units} | FAILED: {error} |", flush=True)
                bad += 1
                continue
            print("| " + " | ".join(row(outcome)) + " |", flush=True)
            bad += outcome.again_exit_code != 0 or outcome.redone > 0 or bool(outcome.different)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
