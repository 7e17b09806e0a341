"""The parts of a repair and its edited model that `check` verifies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part, intact_record
from npeff.storage.checksums import file_checksum, read_json
from npeff.storage.errors import StoreError


def repair_parts(run: RunDirectory) -> Iterator[Part]:
    record = run.record_file("repair")
    for path in sorted(run.partial_results("repair").glob("*.json")):
        yield Part(f"repair attempt {path.stem}", path, partial(read_json, path), (path, record))
    if run.repaired.is_dir():
        yield Part("edited model", run.repaired, partial(_verify_edited_model, run), (run.repaired, record))


def _verify_edited_model(run: RunDirectory) -> None:
    path = run.repaired / "model.safetensors"
    try:
        json.loads((run.repaired / "repair.json").read_bytes())
        found = file_checksum(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{run.repaired} is damaged", path=run.repaired) from error
    record = intact_record(run, "repair")
    if record is not None and found != record.get("model_checksum", found):
        raise StoreError(f"{path} does not match its checksum", path=path)
