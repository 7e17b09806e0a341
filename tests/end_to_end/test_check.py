"""`npeff check`: whatever is damaged is named; `--recompute` makes that again, and only that."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import npeff
import numpy as np
import pytest
import yaml
from end_to_end import damage, surroundings
from npeff.cli.main import main
from npeff.runs.directory import RunDirectory
from npeff.store.direction_store import DirectionStore
from places import place


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return surroundings.small_run(tmp_path_factory.mktemp("check") / "run").path


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "run"))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handler, path = signal.getsignal(signal.SIGTERM), list(sys.path)
    yield
    signal.signal(signal.SIGTERM, handler)
    sys.path[:] = path


def command(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_a_whole_run_is_whole_and_stays_as_it_is(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = damage.written(run)
    assert command("check", run) == 0
    assert f"check: everything in {run} is intact" in capfd.readouterr().out
    assert command("check", run, "--recompute") == 0
    assert damage.written(run) == before


def test_each_damage_is_a_row_and_the_repair_rewrites_nothing_that_is_intact(
    run: Path, reference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage.flip(run / "fishers.zarr/factors/c/1/0/0")
    damage.truncate(run / place("partial/lift/00002.json"))
    (run / place("tables/coefficients.parquet")).unlink()
    before = damage.written(run)
    assert command("check", run) == 1
    out = capfd.readouterr().out
    for named in ("shard 1", "direction 2", "table coefficients", "npeff check --recompute"):
        assert named in out
    assert damage.written(run) == before
    assert command("check", run, "--recompute") == 0
    assert damage.different(run, reference) == []
    after = damage.written(run)
    rewritten = {name for name in before if after[name] != before[name]}
    assert not {name for name in rewritten if name.startswith(("fishers.zarr", "shards")) and "1" not in name}
    assert not {name for name in rewritten if name.startswith(("checkpoints", "partial/verify"))}
    assert not {name for name in rewritten if re.match(r"directions\.zarr/[^/]+/c/[01]/|partial/lift/0000[01]", name)}
    now, expected = damage.contents(run), damage.contents(reference)
    assert {name for name in before if now[name] != expected[name]} <= rewritten


@pytest.mark.parametrize(("change", "found"), [(1e-7, False), (1e-3, True)])
def test_directions_are_compared_to_a_tolerance(change: float, found: bool, run: Path, reference: Path) -> None:
    directions = DirectionStore.open(run / place("directions.zarr"))
    written = directions.read(1)
    name = next(iter(written))
    sketches = directions.read_sketches()
    assert sketches is not None
    directions.write(1, {**written, name: written[name] + np.float32(change)}, sketches[1])
    files = {file.rpartition("/c/")[0] for file in damage.different(run, reference)}
    assert files == ({f"directions.zarr/{name}"} if found else set())


@pytest.mark.parametrize("kind", ["metadata of an array", pytest.param("components", marks=pytest.mark.slow)])
def test_one_file_of_a_kind_is_found_and_made_again_however_it_was_damaged(
    kind: str, reference: Path, tmp_path: Path
) -> None:
    for way in damage.WAYS:
        outcome = damage.damage_and_repair(reference, damage.KINDS[kind], way, tmp_path / way)
        assert outcome.named, outcome
        assert outcome.mended, outcome
        assert not [name for name in outcome.rewritten if name.startswith(("partial/", "shards/", "directions.zarr/"))]


def test_what_is_damaged_is_told_by_fields_and_not_by_texts(reference: Path, tmp_path: Path) -> None:
    """The name of the directory has all that texts were once taken apart at."""
    run = Path(shutil.copytree(reference, tmp_path / "a run: it is damaged: twice; or so"))
    metadata = run / "fishers.zarr/factors/zarr.json"
    record = run / place("partial/lift/00002.json")
    damage.truncate(metadata)
    damage.truncate(record)
    opened = RunDirectory.open(run)
    found = {each.what: each for each in npeff.check(opened)}
    assert sorted(found) == ["direction 2", "metadata of fishers.zarr"]
    assert found["metadata of fishers.zarr"].where == metadata
    assert found["metadata of fishers.zarr"].why == f"{metadata} is damaged"
    assert found["direction 2"].why == f"{record} is damaged (not JSON)"
    assert {each.remedy for each in found.values()} == {f"npeff check --recompute {run}"}
    assert npeff.check(opened, recompute=True) == []


def test_metadata_of_another_version_are_not_deleted(run: Path) -> None:
    path = run / "fishers.zarr/zarr.json"
    content = json.loads(path.read_bytes())
    content["attributes"]["schema_version"] = 99
    content.pop("seal", None)
    path.write_text(json.dumps(content))
    (found,) = npeff.check(RunDirectory.open(run), recompute=True)
    assert (found.what, found.where) == ("metadata of fishers.zarr", run / "fishers.zarr")
    assert found.why == f"{run}/fishers.zarr has schema version 99, but this program reads version 3"
    assert found.remedy == "use the version that wrote it, or choose another run_dir"
    assert path.exists()


def test_a_checkpoint_that_is_damaged_goes_and_the_one_before_is_kept(run: Path) -> None:
    newest = max((run / place("checkpoints")).iterdir())
    damage.flip(newest / "components.npy")
    opened = RunDirectory.open(run)
    assert [each.what for each in npeff.check(opened)] == [f"checkpoint {int(newest.name)}"]
    assert npeff.check(opened, recompute=True) == []
    assert not newest.exists()
    assert len(list((run / place("checkpoints")).iterdir())) == 1


def test_a_run_that_another_process_holds_is_left_alone(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage.flip(run / "fishers.zarr/factors/c/1/0/0")
    before = damage.written(run)
    with open(run / ".lock", "a") as lock:  # of another open file, as of another process
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert command("check", run, "--recompute") == 2
    assert "is in use by another command" in capfd.readouterr().err
    assert damage.written(run) == before


def test_what_cannot_be_made_again_is_said_and_left(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run / "run.yaml"
    path.write_text(path.read_text().replace("shard_size: 8", "shard_size: 9"))
    assert command("check", run, "--recompute") == 1
    assert "restore it from a copy" in capfd.readouterr().out


def test_an_unfinished_run_is_whole_and_a_repair_does_not_finish_it(reference: Path, tmp_path: Path) -> None:
    opened = surroundings.without(reference, "lift", tmp_path / "run")
    assert npeff.check(opened) == []
    (opened.shard_records / "00002.json").unlink()
    assert [each.what for each in npeff.check(opened)] == ["shard 2"]
    assert npeff.check(opened, recompute=True) == []
    assert not opened.directions.exists()


def test_a_shard_that_fails_three_times_is_told_with_its_examples_and_the_others_are_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, run_file = tmp_path / "run", tmp_path / "run.yaml"
    fishers = {**surroundings.SMALL["fishers"], "batch_size": 4}
    task = {"name": "defective_tasks:RaisingBatchTask"}
    run_file.write_text(yaml.safe_dump({**surroundings.SMALL, "run_dir": str(run), "task": task, "fishers": fishers}))
    written = []
    for _ in range(2):  # the second time only that shard is tried
        assert command("fishers", run_file) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert "shard 3 (examples 24 to 31, 'point-24' to 'point-31') failed 3 times: " in said
        assert "KeyError: 'image_30.png' (defective_tasks.py, line " in said
        assert "computes only the failed shards" in said
        records = {path.stem: path.stat().st_mtime_ns for path in (run / "shards").glob("*.json")}
        assert sorted(records) == ["00000", "00001", "00002", "00004"]
        written.append(records)
    assert written[0] == written[1]
    assert json.loads((run / "shards/00004.json").read_text())["n_invalid"] == 0


def test_a_record_that_later_stages_rest_on_is_made_again(run: Path, reference: Path) -> None:
    (run / place("stages/factorize.json")).unlink()
    opened = RunDirectory.open(run)
    assert [each.what for each in npeff.check(opened)] == ["record of factorize"]
    assert npeff.check(opened, recompute=True) == []
    assert damage.different(run, reference) == []


@pytest.mark.slow
def test_a_full_disk_and_a_wrong_clock_cost_nothing(reference: Path, tmp_path: Path) -> None:
    for stage in ("factorize", "lift"):
        met = surroundings.disk_full(reference, stage, tmp_path / f"disk-{stage}")
        assert (met.lost, met.different) == (0, [])
        assert met.outcome.startswith("exit 2")
    met = surroundings.clock(reference, "factorize", tmp_path / "clock", surroundings.YEAR_S)
    assert met.different == []
