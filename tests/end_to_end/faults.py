"""Every fault in every stage: what happens, what it costs, what is lost.

    PYTHONPATH=tests python -m end_to_end.faults [--only kill:driver:lift] [--all-points] [--folder DIR] [--json FILE]

prints one table and writes it as JSON. `test_faults.py` runs some of it; `kills.py`, `damage.py` and `surroundings.py`
are the faults; those of object stores are injected where these are tested, in `tests/store`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from end_to_end import damage, kills, surroundings
from end_to_end.commands import Command
from end_to_end.run_contents import STAGES, before_stage
from places import place

OBJECT_STORE = ("errors", "throttling", "a torn upload")
"""Faults of an object store, which tests/store injects."""

_DAYS_S = 3 * 86_400.0


@dataclass
class Row:
    """Of the table."""

    fault: str
    stage: str
    outcome: str = ""
    seconds_lost: float | None = None
    data_lost: int = 0
    """Finished units (shards, checkpoints, directions, components; files) that were lost, or differ in the end."""
    wrong: list[str] = field(default_factory=list)
    """What is not as it should be."""


@dataclass(frozen=True)
class Trial:
    """One row to be: its name is kind:fault:stage."""

    kind: str
    fault: str
    stage: str
    meet: Callable[[Path, Path], Row]
    """Given the reference runs' folder, and an empty folder."""


def kill_trial(fault: kills.Fault) -> Trial:
    def meet(references: Path, folder: Path) -> Row:
        outcome = kills.strike(fault, _ray_reference(references), folder)
        undisturbed = _undisturbed_s(references, fault.stage) if not fault.whole_run else None
        took = outcome.first_s + (outcome.again_s if outcome.exit_code else 0.0)
        code = outcome.exit_code
        happened = "recovers by itself" if code == 0 else f"exit {code}; the same command resumes"
        if fault.stage == "factorize" and outcome.resumed:
            happened += f" from step {outcome.resumed} of {outcome.found}"
        wrong = list(outcome.different) + ([f"exit {outcome.again_exit_code}"] if outcome.again_exit_code else [])
        lost = outcome.redone + len(outcome.different)
        return Row(fault.victim, fault.stage, happened, took - undisturbed if undisturbed else None, lost, wrong)

    return Trial("kill", fault.victim, fault.stage + (" in run" if fault.whole_run else ""), meet)


def damage_trial(kind: str, pattern: str) -> Trial:
    def meet(references: Path, folder: Path) -> Row:
        small, outcomes = _small_reference(references), []
        for way in damage.WAYS:
            outcomes.append(damage.damage_and_repair(small, pattern, way, folder / way))
        wrong = [
            f"{each.way}: " + ("; ".join(each.left + each.different) if each.named else "not found")
            for each in outcomes
            if not each.named or not each.mended
        ]
        found = {each.way: ", ".join(each.found) or "nothing is missing" for each in outcomes}
        said = (
            found["flip"]
            if len(set(found.values())) == 1
            else "; ".join(f"{way}: {what}" for way, what in found.items())
        )
        outcome = f"found ({said}), made again" if not wrong else "NOT MENDED"
        return Row(kind, "", outcome, max(each.seconds for each in outcomes), len(wrong), wrong)

    return Trial("damage", kind, pattern.partition("/")[0], meet)


def surrounding_trial(fault: str, stage: str, meet: Callable[[Path, Path], surroundings.Met]) -> Trial:
    def measured(references: Path, folder: Path) -> Row:
        met = meet(references, folder)
        wrong = met.different + ([met.outcome] if met.outcome.isupper() else [])
        return Row(fault, stage, met.outcome, met.seconds, met.lost + len(met.different), wrong)

    return Trial("surroundings", fault, stage, measured)


def trials(all_points: bool) -> Iterator[Trial]:
    for fault in kills.MATRIX if all_points else kills.ONE_POINT:
        yield kill_trial(fault)
    yield surrounding_trial("node lost, another comes", "factorize", lambda _, folder: surroundings.node_lost(folder))
    yield surrounding_trial(
        "two drivers", "run", lambda references, folder: surroundings.two_drivers(_ray_reference(references), folder)
    )
    for stage in STAGES:
        yield surrounding_trial(
            "disk full",
            stage,
            lambda references, folder, stage=stage: surroundings.disk_full(_small_reference(references), stage, folder),
        )
    for fault, shift_s in (
        ("files of the future, clock behind", _DAYS_S),
        ("files of the past, clock ahead", -_DAYS_S),
    ):
        for stage in STAGES:
            yield surrounding_trial(
                fault,
                stage,
                lambda references, folder, stage=stage, shift_s=shift_s: surroundings.clock(
                    _small_reference(references), stage, folder, shift_s
                ),
            )
    for kind, pattern in damage.KINDS.items():
        yield damage_trial(kind, pattern)


def _ray_reference(references: Path) -> Path:
    reference = references / "reference"
    return reference if (reference / place("report")).exists() else kills.reference_run(references)


def _small_reference(references: Path) -> Path:
    path = references / "small"
    return path if (path / place("report")).exists() else surroundings.small_run(path).path


def _undisturbed_s(references: Path, stage: str) -> float:
    """How long the stage's command takes."""
    kept = references / f"undisturbed-{stage}.json"
    if not kept.exists():
        run = before_stage(_ray_reference(references), stage, references / f"undisturbed-{stage}")
        arguments = (stage, references / "run.yaml", "--run-dir", run)
        with Command(*arguments, log=references / f"undisturbed-{stage}.log") as command:
            assert command.exit_code() == 0, command.output
            kept.write_text(json.dumps(time.monotonic() - command.began))
    return float(json.loads(kept.read_text()))


_HEADINGS = ("fault", "stage", "outcome", "time lost", "data lost")


def _line(row: Row) -> str:
    lost = "" if row.seconds_lost is None else f"{row.seconds_lost:.1f} s"
    shown = f"{row.data_lost}" + (f" WRONG: {'; '.join(row.wrong)[:200]}" if row.wrong else "")
    return "| " + " | ".join((row.fault, row.stage, row.outcome, lost, shown)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="kind:fault:stage, such as kill:driver:lift, or damage")
    parser.add_argument("--all-points", action="store_true", help="kill at several instants of each stage")
    parser.add_argument("--folder", type=Path, help="keep everything there; a temporary folder without it")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    wanted = arguments.only.split(":")
    chosen = [
        trial
        for trial in trials(arguments.all_points)
        if all(want in ("", has) for want, has in zip(wanted, (trial.kind, trial.fault, trial.stage), strict=False))
    ]
    if not chosen:
        parser.error(f"no fault is called {arguments.only}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print("| " + " | ".join(_HEADINGS) + " |\n|" + "---|" * len(_HEADINGS), flush=True)
        for number, trial in enumerate(chosen):
            try:
                row = trial.meet(folder, folder / f"{number:02d}")
            except AssertionError as error:
                row = Row(trial.fault, trial.stage, "FAILED", None, 0, [str(error).partition("\n")[0]])
            row.stage = row.stage or trial.stage
            rows.append(row)
            print(_line(row), flush=True)
    for fault in OBJECT_STORE if not arguments.only else ():
        print(f"| object store: {fault} | all | see tests/store | | |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 1 if any(row.wrong or row.data_lost for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
