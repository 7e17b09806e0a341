"""A disk, or a bucket, that is full in the middle of every stage: one line, exit code 2, and nothing that is lost.

On a disk, the limit of the size of files becomes zero with a certain file of the stage, so that writing any file fails
from then on, in every library. In a bucket, all requests that write are refused from then on.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from end_to_end.run_contents import differences
from in_process import command
from npeff.stages.registry import STAGES
from object_store import ObjectStore, Request

pytestmark = pytest.mark.process

CONFIG: dict[str, Any] = {
    "task": {"name": "digits", "options": {"limit": 36, "train_examples": 100, "epochs": 1}},
    "fishers": {"sketch": {"kind": "tensorsketch", "dim": 64}, "shard_size": 12, "diagonal": {"mean": True}},
    "factorization": {
        "n_components": 2,
        "checkpoint_every": 2,
        "max_iterations": 4,
        "tolerance": 1e-15,
        "n_starts": 1,
        "stability_examples": 0,
    },
    "selection": {"components": [1, 2], "refine": False, "seeds": 1, "max_iterations": 2, "n_starts": 1},
    "verification": {"top_examples": 3, "baseline_examples": 4, "epsilon": 0.1},
    "step": {"kind": "diagonal", "kl_steps": [0.1]},
    "repair": {"kl_steps": [0.1], "significance": 0.5, "joint_passes": 0, "max_edits": 1},
    "inputs": {"samples": 2},
    "scale": {"pairs": 1, "components": [1], "space": "gaussian"},
    "report": {"top_examples": 2},
    "executor": {"kind": "serial"},
}
COMMANDS = [stage.name for stage in STAGES if stage.name != "transform"] + ["report"]
"""In the order in which they can run. `transform` is in a run of its own, since it takes the place of `factorize`."""


RUN = "s3://runs/team/full"
VARIES = re.compile(r"(^|/)\.|\.partial|checkpoints/|metrics/|provenance\.json|tables/components\.parquet")
"""Locks, files in the making, old checkpoints, what records every command, and the table that `lift` extends."""


@dataclass
class Writes:
    """The writes of a run: files that come to be, or requests that change a bucket."""

    begin: Callable[[int | None], AbstractContextManager[None]]
    """Storage that is full from the write with this number on; None: never."""
    count: int = 0


class _Renames:
    """Hears of every rename of this process, through an audit hook, which cannot be removed again."""

    def __init__(self) -> None:
        self.heard: Callable[[str], None] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and self.heard is not None:
            self.heard(str(arguments[1]))


_renames = _Renames()


def on_disk(run_dir: str) -> Writes:
    def begin(full_from: int | None) -> AbstractContextManager[None]:
        return _full_disk(run_dir, writes, full_from)

    writes = Writes(begin)
    return writes


@contextmanager
def _full_disk(run_dir: str, writes: Writes, full_from: int | None) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        if writes.count == full_from:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))

    def heard(target: str) -> None:
        if target.startswith(run_dir):
            writes.count += 1
            fill()

    writes.count, _renames.heard = 0, heard
    try:
        fill()
        yield
    finally:
        _renames.heard = None
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def in_bucket(store: ObjectStore) -> Writes:
    @contextmanager
    def begin(full_from: int | None) -> Iterator[None]:
        def fault(request: Request) -> tuple[str, str] | None:
            if request.kind not in ("PUT", "multipart") or request.key.endswith((".lock", ".clock")):
                return None
            writes.count += 1
            is_full = full_from is not None and writes.count > full_from
            return ("403 Forbidden", "QuotaExceeded") if is_full else None

        writes.count = 0
        store.faults.append(fault)
        try:
            yield
        finally:
            store.faults.remove(fault)

    writes = Writes(begin)
    return writes


def written(run_dir: str, folder: Path) -> Path:
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump({**CONFIG, "run_dir": run_dir}), encoding="utf-8")
    return run_file


@dataclass(frozen=True)
class Reference:
    """An undisturbed run on a disk, and how many files each of its stages wrote."""

    path: Path
    writes: dict[str, int]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    path, counts = folder / "run", {}
    run_file, writes = written(str(path), folder), on_disk(str(path))
    for name in COMMANDS:
        with writes.begin(None):
            assert command(name, run_file) == 0, name
        counts[name] = writes.count
    return Reference(path, counts)


def fails_in_one_line(capsys: pytest.CaptureFixture[str], where: str, *arguments: str | Path) -> bool:
    """Whether a command ends with exit code 2, and with one line that names the file or the object."""
    capsys.readouterr()
    code, shown = command(*arguments), capsys.readouterr().err
    if code == 0:
        return False
    (line,) = [line for line in shown.splitlines() if line.startswith("npeff: ")]
    assert (code, "Traceback" in shown) == (2, False), shown
    assert where in line, line
    assert re.search("File too large|QuotaExceeded", line), line
    return True


def interrupted_in_every_stage(
    reference: Reference,
    run_file: Path,
    writes: Writes,
    where: str,
    finished: Callable[[], dict[str, bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run every stage on storage that is full before its first write, and again and again after a third of its writes.

    Args:
        where: the run directory.
        finished: what must not be lost, by name.
    """
    for name in COMMANDS:
        refused, third = 0, reference.writes[name] // 3 + 1
        for full_from in (0, third, third, third, third):
            before = finished()
            with writes.begin(full_from):
                if not fails_in_one_line(capsys, where, name, run_file):
                    break
            refused += 1
            kept = finished()
            assert [each for each in before if kept.get(each) != before[each]] == [], (name, full_from)
        assert refused >= min(2, reference.writes[name]), f"{name}: it is interrupted before and in the stage"
        assert command(name, run_file) == 0, name


def test_a_disk_that_is_full_in_any_stage_is_one_line_and_nothing_is_lost(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finished() -> dict[str, bytes]:
        files = [each for each in path.rglob("*") if each.is_file() and not VARIES.search(str(each.relative_to(path)))]
        return {str(each.relative_to(path)): each.read_bytes() for each in files}

    path = tmp_path / "run"
    run_file = written(str(path), tmp_path)
    interrupted_in_every_stage(reference, run_file, on_disk(str(path)), str(path), finished, capsys)
    assert differences(path, reference.path) == []


def test_a_disk_that_is_full_while_coefficients_of_new_examples_are_computed(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    run_file, writes = written(str(path), tmp_path), on_disk(str(path))
    assert command("fishers", run_file) == 0
    for full_from in (0, 1, 4):
        with writes.begin(full_from):
            assert fails_in_one_line(capsys, str(path), "transform", reference.path, "--run", run_file)
    assert command("transform", reference.path, "--run", run_file) == 0
    assert command("check", path) == 0


@pytest.mark.slow
def test_a_bucket_that_is_full_in_any_stage_is_one_line_and_nothing_is_lost(
    reference: Reference, s3: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finished() -> dict[str, bytes]:
        return {name: content for name, content in s3.contents(RUN).items() if not VARIES.search(name)}

    run_file = written(RUN, tmp_path)
    interrupted_in_every_stage(reference, run_file, in_bucket(s3), RUN, finished, capsys)
    copy = tmp_path / "copy"
    for name, content in s3.contents(RUN).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert differences(copy, reference.path) == []
