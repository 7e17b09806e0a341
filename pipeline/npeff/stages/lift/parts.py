"""The parts of the lifted directions that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part, finished_components, metadata_parts
from npeff.storage.atomic import is_committed
from npeff.storage.checksums import read_json
from npeff.storage.errors import StoreError
from npeff.store.direction_store import DirectionStore


def lift_parts(run: RunDirectory) -> Iterator[Part]:
    if not is_committed(run.directions):
        return
    record, results = run.record_file("lift"), run.partial_results("lift")
    try:
        store = DirectionStore.open(run.directions)
    except StoreError as error:
        yield from metadata_parts(run.directions, error, record)
        return
    for component in finished_components(run, "lift"):
        path = results / f"{component:05d}.json"
        yield Part(f"direction {component}", path, partial(_verify_direction, store, path, component), (path, record))


def _verify_direction(store: DirectionStore, facts: Path, component: int) -> None:
    read_json(facts)
    store.read(component)
