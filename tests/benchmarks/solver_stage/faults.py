"""What a lost worker costs: one killed, one stopped past the timeout, a node removed and one added; by the clock."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from end_to_end import commands, kills, run_contents

TIMEOUT_S = 20


def faults() -> dict[str, Any]:
    """Each against the same work undisturbed, and what differs in the end (nothing, is wanted)."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = kills.reference_run(Path(folder))
        for name, what in (("none", None), ("a worker killed", signal.SIGKILL), ("a worker stopped", signal.SIGSTOP)):
            found[name] = _factorize(reference, Path(folder) / name.replace(" ", "-"), what)
        found["a node removed, one added"] = _nodes(Path(folder) / "nodes")
    undisturbed = found["none"]["seconds"]
    print(f"faults: the command `npeff factorize`, two workers, timeout {TIMEOUT_S} s")
    for name, row in found.items():
        lost = row["seconds"] - row.get("undisturbed_s", undisturbed)
        print(f"  {name:<28} {row['seconds']:6.1f} s, {lost:5.1f} s lost; differs in: {row['differs'] or 'nothing'}")
    return found


def _factorize(reference: Path, run: Path, what: signal.Signals | None) -> dict[str, Any]:
    run_contents.before_stage(reference, "factorize", run)
    run_file = run_contents.write_run_file(run.with_suffix(".yaml"), timeout_s=TIMEOUT_S)
    with commands.Command("factorize", run_file, "--run-dir", run, log=run.with_suffix(".log")) as command:
        if what is not None:
            command.wait_for(lambda: run_contents.newest_checkpoint(run) >= 4, "4 steps were taken")
            commands.send(command.actors()[:1], what)
        code = command.exit_code()
        seconds = time.monotonic() - command.began
        assert code == 0, command.output
    return {"seconds": seconds, "differs": run_contents.differences(run, reference, ["factorize"])}


def _nodes(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    found = commands.printed("end_to_end.cluster_faults", folder)
    difference = found["largest_difference_of_losses"]
    return {
        **found,
        "seconds": found["disturbed_s"],
        "differs": [] if difference < run_contents.STEPS_TOLERANCE else [f"losses by {difference:.1e}"],
    }
