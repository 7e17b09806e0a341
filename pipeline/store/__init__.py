"""What a run keeps on disk: Fisher factors, completion records, checkpoints, components and tables."""

from __future__ import annotations

from pipeline.store.atomic import is_committed, remove_directory, replacing_directory, write_file_atomically
from pipeline.store.checkpoint import Checkpoint, CheckpointStore, write_checkpoint_array
from pipeline.store.component_store import StoredFactorization, open_factorization, write_factorization
from pipeline.store.diagonal_store import DiagonalSums
from pipeline.store.direction_store import DirectionStore
from pipeline.store.errors import ObjectStoreError, StoreError
from pipeline.store.fisher_store import FisherStore, fisher_store_bytes
from pipeline.store.fit_store import FitStore, StoredFit
from pipeline.store.layout import ShardPlan, inner_chunk_examples
from pipeline.store.location import is_remote, location
from pipeline.store.manifest import (
    CompletionRecord,
    ShardRecords,
    checksum,
    read_json,
    write_json_atomically,
)
from pipeline.store.splits import Splits
from pipeline.store.tables import SCHEMAS, read_table, write_table
from pipeline.store.task_files import preparing, task_files

__all__ = [
    "SCHEMAS",
    "Checkpoint",
    "CheckpointStore",
    "CompletionRecord",
    "DiagonalSums",
    "DirectionStore",
    "FisherStore",
    "FitStore",
    "ObjectStoreError",
    "ShardPlan",
    "ShardRecords",
    "Splits",
    "StoreError",
    "StoredFactorization",
    "StoredFit",
    "checksum",
    "fisher_store_bytes",
    "inner_chunk_examples",
    "is_committed",
    "is_remote",
    "location",
    "open_factorization",
    "preparing",
    "read_json",
    "read_table",
    "remove_directory",
    "replacing_directory",
    "task_files",
    "write_checkpoint_array",
    "write_factorization",
    "write_file_atomically",
    "write_json_atomically",
    "write_table",
]
