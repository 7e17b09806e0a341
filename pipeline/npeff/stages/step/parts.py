"""The parts of a step and its edited model that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part
from npeff.stages.edited_model import verify_edited_model
from npeff.storage.checksums import read_json
from npeff.store.array_files import read_arrays


def step_parts(run: RunDirectory) -> Iterator[Part]:
    record, results = run.record_file("step"), run.partial_results("step")
    for path in sorted(results.glob("trial-*.json")):
        yield Part(f"step size {path.stem.removeprefix('trial-')}", path, partial(read_json, path), (path, record))
    for path in sorted(results.glob("*.safetensors")):
        later = sorted(results.glob("trial-*.json"))  # they were measured with the direction
        yield Part(f"{path.stem} of the step", path, partial(read_arrays, path), (path, *later, record))
    if run.stepped.is_dir():
        yield Part(
            "model after the step",
            run.stepped,
            partial(verify_edited_model, run, run.stepped, "step"),
            (run.stepped, record),
        )
