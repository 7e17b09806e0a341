"""A run that is killed again and again, and goes on each time; `faults.py` has the parts and the whole matrix."""

import shutil
import signal
import time

import pytest
from end_to_end import commands, kills, run_contents
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import read_table, write_table
from places import place

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(900)]  # four minutes on two free cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def reference(folder):
    return kills.reference_run(folder)


def start(folder, run, name, command="run"):
    return commands.Command(command, folder / "run.yaml", "--run-dir", run, log=folder / f"{run.name}-{name}.log")


def unchanged(run, stage, before):
    """The units finished before are there, and were not written again."""
    now = run_contents.units_done(run, stage)
    return {name: now.get(name) for name in before} == before


def test_a_run_goes_on_after_kills_of_the_driver_and_of_ray_and_interruptions(folder, reference):
    run = folder / "chain"
    with start(folder, run, "driver") as command:
        command.wait_for(lambda: run_contents.has_come_to(run, "fishers", 3), "3 shards were recorded")
        command.driver.kill()
        command.driver.wait()
        shards = run_contents.units_done(run, "fishers")
        # the same command at once: it waits for the orphaned actors, which may be writing
        with start(folder, run, "sigint") as again:
            again.wait_for(lambda: run_contents.newest_checkpoint(run) >= 4, "4 steps were taken")
            interrupt(again)
        command.seconds_until_nothing_is_left(but=commands.SLOW_TO_END)
    assert unchanged(run, "fishers", shards)
    assert run_contents.differences(run, reference, ["fishers"]) == []

    with start(folder, run, "ray") as command:
        command.wait_for(lambda: run_contents.has_come_to(run, "verify", 2), "2 components were verified")
        began = time.monotonic()
        commands.send(process for process in command.processes if process.pid != command.driver.pid)
        components = run_contents.units_done(run, "verify")
        assert command.exit_code() == 2
        assert time.monotonic() - began < 60
        assert "npeff: error: Ray stopped working" in command.output.splitlines()[-1]
        assert "run the same command again" in command.output.splitlines()[-1]
        command.seconds_until_nothing_is_left()

    with start(folder, run, "last") as command:
        assert command.exit_code() == 0, command.output
        command.seconds_until_nothing_is_left()
    assert unchanged(run, "verify", components)
    assert run_contents.differences(run, reference) == []
    assert (run / place("report/index.html")).exists()


def interrupt(command):
    """Ctrl-C, which a terminal sends to all processes; `test_interruption.py` has what a scheduler sends."""
    commands.send(command.processes, signal.SIGINT)
    assert command.exit_code() == 130, command.output
    assert command.output.splitlines()[-1] == "npeff: interrupted; run the same command again to resume"
    assert "Traceback" not in command.output
    command.seconds_until_nothing_is_left()


def test_a_command_whose_solver_actor_is_killed_recovers_by_itself(folder, reference):
    run = run_contents.before_stage(reference, "factorize", folder / "actor")
    with start(folder, run, "actor", "factorize") as command:
        command.wait_for(lambda: run_contents.newest_checkpoint(run) >= 4, "4 steps were taken")
        commands.send(command.actors()[:1])
        assert command.exit_code() == 0, command.output
        command.seconds_until_nothing_is_left()
    lines = command.output.splitlines()
    lost = next(line for line in lines if "a worker was lost" in line or "failed" in line)
    resumed = int(next(line for line in lines if line.startswith("resuming from iteration")).rsplit(" ", 1)[1])
    assert lost.endswith(f"restarting the workers from iteration {resumed}")
    assert resumed >= 4
    assert run_contents.differences(run, reference, ["factorize"]) == []


def test_the_comparison_sees_what_differs(folder, reference):
    run = folder / "altered"
    shutil.copytree(reference, run)
    assert run_contents.differences(run, reference) == []
    table = read_table(run / place("tables/history.parquet"), "history").to_pydict()
    table["loss"][0] *= 1 + 1e-5
    write_table(run / place("tables/history.parquet"), "history", table)
    direction = DirectionStore.open(run / place("directions.zarr"))
    moved = {name: array + 1e-4 for name, array in direction.read(1).items()}
    direction.write(1, moved, direction.read_sketches()[1])
    record = run / "shards/00003.json"
    record.unlink()
    differing = run_contents.differences(run, reference)
    assert any("history.loss" in line for line in differing)
    assert any("direction 1" in line for line in differing)
    assert any(line.startswith("fishers: shards") for line in differing)
