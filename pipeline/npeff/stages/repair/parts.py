"""The parts of a repair and its edited model that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part
from npeff.stages.edited_model import verify_edited_model
from npeff.storage.checksums import read_json


def repair_parts(run: RunDirectory) -> Iterator[Part]:
    record = run.record_file("repair")
    for path in sorted(run.partial_results("repair").glob("*.json")):
        yield Part(f"repair attempt {path.stem}", path, partial(read_json, path), (path, record))
    if run.repaired.is_dir():
        yield Part(
            "edited model",
            run.repaired,
            partial(verify_edited_model, run, run.repaired, "repair"),
            (run.repaired, record),
        )
