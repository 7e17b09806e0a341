"""The parts of the lifted directions that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from npeff.runs.definition import Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.lineage import lineage_of, made_from
from npeff.runs.part import Part, finished_units, intact_record, metadata_parts
from npeff.stages.lift import LIFT
from npeff.storage.atomic import is_committed
from npeff.storage.checksums import read_json
from npeff.storage.errors import StoreError
from npeff.store.direction_store import DirectionStore
from npeff.store.lineage import group_lineage, refuse_foreign


def lift_parts(run: RunDirectory) -> Iterator[Part]:
    if not is_committed(run.directions):
        return
    record, results = run.record_file("lift"), run.partial_results("lift")
    facts = {component: path for component, path in finished(results).items() if path.suffix == ".json"}
    try:
        store = DirectionStore.open(run.directions, _checksums(facts, intact_record(run, "lift")))
    except StoreError as error:
        yield from metadata_parts(run.directions, error, record)
        return
    yield Part("directions", run.directions, partial(_verify_store, run), (run.directions, results, record))
    for component in finished_units(run, "lift"):
        path = results / f"{component:05d}.json"
        yield Part(f"direction {component}", path, partial(_verify_direction, store, path, component), (path, record))


def _checksums(facts: Mapping[int, Path], record: Summary | None) -> dict[int, str]:
    """Return the checksums of the directions: those of the stage's record, or those of the finished units."""
    units = {int(component): found for component, found in (record or {}).get("units", {}).items()}
    for component, path in facts.items():
        with suppress(StoreError):  # `check` reports it
            found = read_json(path)
            if component not in units and "checksum" in found:
                units[component] = found["checksum"]
    return units


def _verify_store(run: RunDirectory) -> None:
    """Check that the directions are those of the stage's record, or of the factorization if there is no record."""
    record = intact_record(run, "lift")
    sources = made_from(run, LIFT, intact_record(run, "factorize"))
    expected = record if record is not None else {"lineage": lineage_of(LIFT, sources)}
    refuse_foreign(run.directions, group_lineage(run.directions), expected, "")


def _verify_direction(store: DirectionStore, facts: Path, component: int) -> None:
    found = read_json(facts)
    refuse_foreign(facts, found.get("lineage"), {"lineage": store.attrs.get("lineage")}, "")
    store.read(component)
