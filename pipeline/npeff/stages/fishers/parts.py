"""The parts of the stored Fishers that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from npeff.runs.definition import finished
from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part, intact_record, metadata_parts, missing
from npeff.storage.atomic import is_committed
from npeff.storage.errors import StoreError
from npeff.store.array_files import read_arrays
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords


def fisher_parts(run: RunDirectory) -> Iterator[Part]:
    record = run.record_file("fishers")
    if (other := run.fishers_home) != run.path:
        remedy = f"npeff check --recompute {other}"
        verify = partial(_verify_other_run, run)
        yield Part(f"Fishers of {other}", run.fishers, verify, recomputable=False, remedy=remedy)
        return
    for path in sorted(run.partial_results("diagonal").glob("*.safetensors")):
        yield Part(f"sums of diagonals {path.stem}", path, partial(read_arrays, path), (path, record))
    if not is_committed(run.fishers):
        return
    try:
        store = FisherStore.open(run.fishers)
    except StoreError as error:
        yield from metadata_parts(run.fishers, error, record)
        return
    records = ShardRecords(run.shard_records, _shard_signature(run, store))
    for shard in range(store.plan.n_shards):
        path = run.shard_records / f"{shard:05d}.json"
        if path.exists() or record.exists():
            yield Part(f"shard {shard}", path, partial(_verify_shard, store, records, shard), (path,))
    for shard, path in finished(run.shard_records).items():
        if shard >= store.plan.n_shards and path.suffix == ".json":
            yield Part(f"shard {shard}", path, partial(missing, run.fishers), (path,))


def _verify_other_run(run: RunDirectory) -> None:
    """Check that the run with the Fishers is there. Its shards are verified with that run."""
    store, record = FisherStore.open(run.fishers), intact_record(run, "fishers")
    if record is not None:
        complete = ShardRecords(run.shard_records, record["signature"]).complete()
        if lost := sorted(set(range(store.plan.n_shards)) - set(complete)):
            raise StoreError(f"shard {lost[0]} of {run.fishers} has no record", path=run.fishers)


def _verify_shard(store: FisherStore, records: ShardRecords, shard: int) -> None:
    record = records.read(shard)
    if (record.start, record.stop) != store.plan.bounds(shard):
        raise StoreError(f"the record of shard {shard} belongs to other examples")
    store.read_shard(shard, record.checksum)


def _shard_signature(run: RunDirectory, store: FisherStore) -> str:
    """Return the signature of the shards' records: from the stage's record or, if that is damaged, computed again."""
    if (record := intact_record(run, "fishers")) is not None:
        return str(record["signature"])
    computed = run.config.signature("task", "parameters", "fishers", "seed")
    return f"{computed}-{store.attrs['model_fingerprint'][:16]}"
