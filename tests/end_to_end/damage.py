"""Damage to the files of a finished run, one at a time: `npeff check` finds it, and `check --recompute` corrects it.

    PYTHONPATH=tests python -m end_to_end.damage RUN_DIR FOLDER

damages every single file of RUN_DIR, in copies in FOLDER, in three ways, and prints what was not found or not mended.
`faults.py` takes one file of each kind.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import npeff
from end_to_end.run_contents import differences
from npeff.runs.directory import RunDirectory
from npeff.storage.errors import StoreError
from places import place, plain


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


WAYS: dict[str, Callable[[Path], None]] = {"flip": flip, "truncate": truncate, "delete": Path.unlink}

KINDS = {
    "shard's record": "shards/00001.json",
    "shard's factors": "fishers.zarr/factors/c/1/0/0",
    "shard's norms": "fishers.zarr/frobenius_norms/c/1",
    "metadata of the Fishers": "fishers.zarr/zarr.json",
    "metadata of an array": "fishers.zarr/factors/zarr.json",
    "table of examples": "tables/examples.parquet",
    "record of fishers": "stages/fishers.json",
    "components": "factorization.zarr/components/c/0/0",
    "coefficients": "factorization.zarr/coefficients/c/0/0",
    "metadata of the components": "factorization.zarr/zarr.json",
    "table of coefficients": "tables/coefficients.parquet",
    "table of components": "tables/components.parquet",
    "checkpoint's array": "checkpoints/*/components.npy",
    "checkpoint's manifest": "checkpoints/*/MANIFEST.json",
    "record of factorize": "stages/factorize.json",
    "direction": "directions.zarr/*.bias/c/1/0",
    "direction's record": "partial/lift/00001.json",
    "metadata of the directions": "directions.zarr/zarr.json",
    "table of layers": "tables/layer_energy.parquet",
    "record of lift": "stages/lift.json",
    "component's verification": "partial/verify/00001.parquet",
    "component's selectivity": "partial/verify/selectivity/00001.parquet",
    "table of verification": "tables/verification.parquet",
    "record of verify": "stages/verify.json",
    "component's shares": "partial/attribute/00001.parquet",
    "table of shares": "tables/position_shares.parquet",
    "record of attribute": "stages/attribute.json",
}
"""One file of each kind, the last one that matches."""

NOT_COMPARED = re.compile(
    r"\.lock|\.workers|report/.*|provenance\.json|task/.*|(stages|shards)/.*|tables/history\.parquet|checkpoints/.*/(MANIFEST\.json|history\.npy)"
)
"""Locks; and files that hold times."""
LIFTED = re.compile(r"directions\.zarr/[^/]+/c/.*|partial/lift/.*|tables/(layer_energy|components)\.parquet")
"""What is computed from directions. A direction that is lifted again alone has other last bits than one of a block."""
NO_CHECKSUM = re.compile(r"report/.*|provenance\.json|run\.yaml|factorization\.yaml")
"""Files in which a flipped bit may be none that matters, or is not found; and what is only for people."""
GONE_FOR_GOOD = re.compile(r"checkpoints/.*")
"""Once the factorization is complete, a damaged checkpoint is deleted, and not made again."""
NO_LOSS_WHEN_DELETED = re.compile(
    r"stages/(verify|attribute)\.json|report/.*|partial/(select|repair)/.*|checkpoints/.*"
)
"""The run is then as it was before; the same command goes on, or there is nothing to go on with."""


@dataclass
class Outcome:
    file: str
    way: str
    found: list[str] = field(default_factory=list)
    """What `check` says is damaged."""
    left: list[str] = field(default_factory=list)
    """What it says after the repair."""
    rewritten: list[str] = field(default_factory=list)
    """Intact files that the repair wrote again, with other bytes or the same."""
    different: list[str] = field(default_factory=list)
    """Files that are not what they were."""
    seconds: float = 0.0

    @property
    def named(self) -> bool:
        """Whether damage was found where there is some."""
        if self.way == "delete" and NO_LOSS_WHEN_DELETED.fullmatch(self.file):
            return True
        return bool(self.found) or bool(NO_CHECKSUM.fullmatch(self.file))

    @property
    def mended(self) -> bool:
        return not self.left and not self.different


def damage_and_repair(reference: Path, pattern: str, way: str, folder: Path) -> Outcome:
    """Copy a run, damage a file, check, repair, give the command again, compare with what it was."""
    run = folder / "run"
    shutil.copytree(reference, run)
    path = sorted(run.glob(place(pattern)))[-1]
    outcome = Outcome(plain(str(path.relative_to(run))), way)
    before = written(run)
    WAYS[way](path)
    opened = RunDirectory.open(run)
    outcome.found = [each.what for each in npeff.check(opened)]
    began = time.monotonic()
    outcome.left = [each.what for each in npeff.check(opened, recompute=True)]
    npeff.run(opened)
    outcome.seconds = time.monotonic() - began
    outcome.different, times = different(run, reference), written(run)
    if way == "delete" or outcome.found:
        outcome.different = [name for name in outcome.different if not GONE_FOR_GOOD.fullmatch(name)]
    outcome.rewritten = sorted(name for name in before if times.get(name) != before[name] and name != outcome.file)
    shutil.rmtree(run)
    return outcome


def different(run: Path, reference: Path) -> list[str]:
    """Files of other bytes; of those in `LIFTED`, files whose numbers differ by more than the tolerance of directions.

    All else has equal bytes on every processor: it was not written again, or computed again in the same shapes.
    """
    now, expected = contents(run), contents(reference)
    names = {name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name)}
    lifted = {name for name in names if LIFTED.fullmatch(name) and name in now and name in expected}
    try:
        equal = lifted and not differences(run, reference, ["lift"])
    except StoreError:  # a direction is still damaged
        equal = False
    return sorted(names - lifted if equal else names)


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file's bytes, those apart that hold times or locks, by the name that `places.plain` gives."""
    return {name: hashlib.sha256((folder / place(name)).read_bytes()).hexdigest() for name in written(folder)}


def written(folder: Path) -> dict[str, int]:
    """When each of these files was written."""
    files = {plain(str(path.relative_to(folder))): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.stat().st_mtime_ns for name, path in files.items() if not NOT_COMPARED.fullmatch(name)}


def main(reference: Path, folder: Path) -> int:
    """All files, all ways."""
    bad = 0
    for path in sorted(path for path in reference.rglob("*") if path.is_file()):
        name = plain(str(path.relative_to(reference)))
        if name in (".lock", ".workers", "run.yaml", "factorization.yaml") or name.startswith("task/"):
            continue
        for way in WAYS:
            outcome = damage_and_repair(reference, name.replace("[", "[[]"), way, folder)
            if not outcome.named or not outcome.mended:
                bad += 1
                print(outcome, flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
