"""Processes of a run are killed, or stopped, at chosen instants; the same command is given again."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from end_to_end.commands import SLOW_TO_END, Command, Process, send
from end_to_end.run_contents import (
    STAGES,
    before_stage,
    differences,
    has_come_to,
    newest_checkpoint,
    units_done,
    write_run_file,
)


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
    first_s: float = 0.0
    """That it took, from its start."""
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
        outcome.end_s, outcome.first_s = time.monotonic() - began, time.monotonic() - first.began
        with Command(*arguments, log=folder / "again.log") as again:
            outcome.outlived_s = first.seconds_until_nothing_is_left(but=SLOW_TO_END)
            outcome.again_exit_code = again.exit_code()
            outcome.again_s = time.monotonic() - again.began
            again.seconds_until_nothing_is_left()
        lines = first.output.strip().splitlines()
        outcome.last_line = lines[-1] if lines else ""
        resumed = [line for line in (first.output + again.output).splitlines() if "resuming from iteration" in line]
        outcome.resumed = resumed[-1].rsplit(" ", 1)[1] if resumed else ""
    if fault.stage != "factorize":  # whose checkpoints are pruned
        now = units_done(run, fault.stage)
        outcome.redone = sum(now.get(name) != written for name, written in done.items())
    outcome.different = differences(run, reference, STAGES if fault.whole_run else (fault.stage,))
    return outcome


POINTS = {"fishers": (0, 4, 8), "factorize": (0, 4, 12), "lift": (0, 3), "verify": (0, 3)}
"""Finished units when it strikes."""

MATRIX = [
    *(
        Fault(victim, stage, units)
        for stage, points in POINTS.items()
        for units in points
        for victim in ("driver", "actor", "Ray")
    ),
    *(Fault("hung actor", stage, points[1]) for stage, points in POINTS.items()),
    *(Fault(victim, stage, 4) for stage in ("fishers", "factorize") for victim in ("gcs_server", "raylet")),
    Fault("driver", "fishers", 4, whole_run=True),
    Fault("Ray", "verify", 3, whole_run=True),
]

ONE_POINT = [fault for fault in MATRIX if fault.units == POINTS[fault.stage][1] and not fault.whole_run]
"""Each victim in each stage once, in its midst."""
