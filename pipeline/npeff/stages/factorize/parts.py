"""The parts of a factorization and its checkpoints that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part, intact_record, verify_table
from npeff.storage.atomic import is_committed
from npeff.storage.errors import StoreError
from npeff.store.checkpoint import CheckpointStore
from npeff.store.component_store import open_factorization


def factorize_parts(run: RunDirectory) -> Iterator[Part]:
    if run.home != run.path and (own := run.own_examples).is_file():
        checksum = (intact_record(run, "factorize") or {}).get("own_examples")
        yield Part("table examples", own, partial(verify_table, own, checksum), (own, run.record_file("factorize")))
    yield from _checkpoint_parts(run)
    if is_committed(run.factorization):
        yield Part("factorization", run.factorization, partial(_verify_factorization, run), (run.factorization,))


def _checkpoint_parts(run: RunDirectory) -> Iterator[Part]:
    if (fishers := intact_record(run, "fishers")) is None:
        return
    config_hash = run.config.factorization_signature() + fishers["signature"]
    store = CheckpointStore(run.checkpoints, config_hash=config_hash)
    for iteration, path in store.committed():
        yield Part(f"checkpoint {iteration}", path, partial(store.verify, path), (path,))


def _verify_factorization(run: RunDirectory) -> None:
    stored = open_factorization(run.factorization)
    stored.read_components()
    stored.read_coefficients()
    stored.read_columns()
    stored.read_evidence()
    record = intact_record(run, "factorize")
    if record is not None and record.get("checksums", stored.attrs["checksums"]) != stored.attrs["checksums"]:
        raise StoreError(f"{run.factorization} does not match the record of its stage", path=run.factorization)


def transformed_from(run: RunDirectory) -> str | None:
    """Return the run from which `transform` copied the components. None if they were fitted or this is unknown."""
    record = intact_record(run, "factorize")
    if record is None:
        try:
            record = open_factorization(run.factorization).attrs
        except StoreError:
            return None
    return record.get("transformed_from")
