"""Kills what a job needs, submits it again, and compares what comes of it with an undisturbed job's run.

    python tests/end_to_end/job_faults.py [--only npeff:head] [--folder DIR]

runs the whole matrix (who submits × who is killed × when) on a head of its own and prints a table. `test_jobs.py` uses
the same parts for a chain of three faults; `test_job_faults.py` runs the matrix on request.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from end_to_end import run_contents
from end_to_end.local_head import LocalHead
from places import place

_numbers = itertools.count(1)
_ENDED = ("SUCCEEDED", "STOPPED", "FAILED")


def submit(submitter: str, head: LocalHead, run_file: Path, run: Path) -> str:
    """Submit, without waiting for it, by ``npeff submit`` or plain ``ray job submit``; the job's id."""
    if submitter == "npeff":
        command = ["npeff", "submit", run_file, "--run-dir", run, "--address", head.address, "--detach"]
        done = head.command(*command)
        assert done.stdout.startswith("submitted "), done.stdout + done.stderr
        return done.stdout.split()[1]
    job = f"plain-{next(_numbers)}"
    command = ["ray", "job", "submit", "--address", head.address, "--no-wait", "--submission-id", job, "--"]
    for _ in range(10):
        done = head.command(*command, "python", "jobs/run.py", "run", run_file, "--run-dir", run)
        if "No available agent" not in done.stdout + done.stderr:  # a head that has just been started
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return job


def details(head: LocalHead, job: str) -> dict:
    return json.loads(head.get(f"/api/jobs/{job}"))


def log(head: LocalHead, job: str) -> str:
    return json.loads(head.get(f"/api/jobs/{job}/logs"))["logs"]


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = 600.0) -> None:
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(0.1)


def wait_for_end(head: LocalHead, job: str) -> str:
    """How the job ended."""
    wait_for(lambda: details(head, job)["status"] in _ENDED, f"{job} ended")
    return details(head, job)["status"]


def wait_for_units(head: LocalHead, job: str, run: Path, stage: str, units: int) -> None:
    """Until a running job has finished so much of a stage, and its workers are at work."""
    look_at_job = time.monotonic() + 1.0
    until = time.monotonic() + 600.0
    while not (run_contents.has_come_to(run, stage, units) and head.actors()):
        time.sleep(0.005)
        if time.monotonic() >= look_at_job:  # seldom: the head has better things to do than to answer
            look_at_job = time.monotonic() + 1.0
            assert details(head, job)["status"] not in _ENDED, log(head, job)
            assert time.monotonic() < until, log(head, job)


def strike(head: LocalHead, victim: str) -> None:
    """Kill a job's driver, one of its workers, or the head, which is then started again."""
    match victim:
        case "driver":
            for driver in head.drivers():
                driver.kill()
        case "worker":
            head.actors()[0].kill()
        case "head":
            outlived = head.kill()
            assert not outlived, outlived
            head.start()


@dataclass(frozen=True)
class Fault:
    submitter: str
    """npeff (``npeff submit``) or ray (``ray job submit``)."""
    victim: str
    """driver, worker or head."""
    stage: str
    units: int
    """Shards, steps or components that are finished when it strikes."""


@dataclass
class Outcome:
    fault: Fault
    found: int = 0
    state: str = ""
    """Of the job that was struck; "gone" where the head forgot it with everything else."""
    end_s: float = 0.0
    """From the blow until that, and until the head is there again where it was killed."""
    again: str = ""
    """How the job ended that was submitted after it; the same job, where only a worker was killed."""
    again_s: float = 0.0
    redone: int = 0
    different: list[str] = field(default_factory=list)


def play(fault: Fault, head: LocalHead, reference: Path, folder: Path) -> Outcome:
    """Submit, strike, submit again, compare."""
    folder.mkdir(parents=True)
    run = run_contents.before_stage(reference, fault.stage, folder / "run")
    run_file = run_contents.write_run_file(folder / "run.yaml")
    outcome = Outcome(fault)
    job = submit(fault.submitter, head, run_file, run)
    wait_for_units(head, job, run, fault.stage, fault.units)
    began = time.monotonic()
    strike(head, fault.victim)
    done = run_contents.units_done(run, fault.stage)
    outcome.found = run_contents.newest_checkpoint(run) if fault.stage == "factorize" else len(done)
    if fault.victim == "head":
        try:
            outcome.state = details(head, job)["status"]
        except urllib.error.HTTPError:
            outcome.state = "gone"
    else:
        outcome.state = wait_for_end(head, job)
    outcome.end_s = time.monotonic() - began
    began = time.monotonic()
    if fault.victim != "worker":
        job = submit(fault.submitter, head, run_file, run)
    outcome.again = wait_for_end(head, job)
    outcome.again_s = time.monotonic() - began
    if fault.stage != "factorize" and fault.victim != "worker":  # checkpoints are pruned
        now = run_contents.units_done(run, fault.stage)
        outcome.redone = sum(now.get(name) != written for name, written in done.items())
    outcome.different = run_contents.differences(run, reference)
    return outcome


MATRIX = [
    Fault(submitter, victim, stage, units)
    for submitter in ("npeff", "ray")
    for stage, units in (("fishers", 4), ("factorize", 4), ("verify", 2))
    for victim in ("driver", "worker", "head")
]
_HEADINGS = ("submitted by", "killed", "stage", "at", "job", "after", "again", "took", "redone", "equal")


def row(outcome: Outcome) -> tuple[str, ...]:
    fault = outcome.fault
    return (
        {"npeff": "npeff submit", "ray": "ray job submit"}[fault.submitter],
        fault.victim,
        fault.stage,
        f"{outcome.found} {({'fishers': 'shards', 'factorize': 'steps', 'verify': 'components'})[fault.stage]}",
        outcome.state,
        f"{outcome.end_s:.1f} s",
        "the same" if fault.victim == "worker" else outcome.again,
        f"{outcome.again_s:.1f} s",
        str(outcome.redone),
        "yes" if not outcome.different else f"NO: {'; '.join(outcome.different[:3])}",
    )


def reference_job(head: LocalHead, folder: Path) -> Path:
    """The run of an undisturbed job, unless the folder has it from before."""
    run = folder / "reference"
    if (run / place("report")).exists():
        return run
    job = submit("ray", head, run_contents.write_run_file(folder / "reference.yaml"), run)
    assert wait_for_end(head, job) == "SUCCEEDED", log(head, job)
    return run


def play_all(matrix: list[Fault], folder: Path) -> list[Outcome]:
    """Every fault, on one head, with a line printed for each."""
    outcomes = []
    with LocalHead() as head:
        reference = reference_job(head, folder)
        print("| " + " | ".join(_HEADINGS) + " |\n|" + "---|" * len(_HEADINGS), flush=True)
        for number, fault in enumerate(matrix):
            outcomes.append(play(fault, head, reference, folder / f"{number:02d}"))
            print("| " + " | ".join(row(outcomes[-1])) + " |", flush=True)
    return outcomes


def is_good(outcome: Outcome) -> bool:
    return outcome.again == "SUCCEEDED" and not outcome.redone and not outcome.different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="submitter:victim:stage, such as npeff:head; the whole matrix without it")
    parser.add_argument("--folder", type=Path, help="keep everything there; a temporary folder without it")
    arguments = parser.parse_args()
    submitter, victim, stage = [*(arguments.only or "").split(":"), "", ""][:3]
    matrix = [
        fault
        for fault in MATRIX
        if submitter in ("", fault.submitter) and victim in ("", fault.victim) and stage in ("", fault.stage)
    ]
    if not matrix:
        parser.error(f"no fault of the matrix is {arguments.only}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return 0 if all(map(is_good, play_all(matrix, folder))) else 1


if __name__ == "__main__":
    raise SystemExit(main())
