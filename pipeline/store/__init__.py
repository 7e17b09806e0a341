"""What a run keeps on disk: Fisher factors, completion records, checkpoints, components and tables."""

from __future__ import annotations

from pipeline.store.atomic import is_committed, remove_directory, replacing_directory, write_file_atomically
from pipeline.store.checkpoint import Checkpoint, CheckpointStore, write_checkpoint_array
from pipeline.store.coefficient_rows import Coefficients, StackedRows, columns_of
from pipeline.store.component_store import (
    StoredFactorization,
    factorization_checksums,
    open_factorization,
    write_factorization,
)
from pipeline.store.diagonal_store import DiagonalSums, read_diagonal
from pipeline.store.direction_store import DirectionStore, read_sums, write_sums
from pipeline.store.errors import ObjectStoreError, StoreError
from pipeline.store.fisher_store import FisherStore, fisher_store_bytes
from pipeline.store.fit_store import FitStore, StoredFit
from pipeline.store.groups import METADATA
from pipeline.store.layout import ShardPlan, inner_chunk_examples
from pipeline.store.location import is_remote, location
from pipeline.store.manifest import (
    CompletionRecord,
    ShardRecords,
    checksum,
    file_checksum,
    json_checksum,
    read_json,
    write_json_atomically,
)
from pipeline.store.same_space import differences_in_space
from pipeline.store.splits import Splits
from pipeline.store.tables import SCHEMAS, check_version, read_table, write_table, write_table_in_parts
from pipeline.store.task_files import preparing, task_files

__all__ = [
    "METADATA",
    "SCHEMAS",
    "Checkpoint",
    "CheckpointStore",
    "Coefficients",
    "CompletionRecord",
    "DiagonalSums",
    "DirectionStore",
    "FisherStore",
    "FitStore",
    "ObjectStoreError",
    "ShardPlan",
    "ShardRecords",
    "Splits",
    "StackedRows",
    "StoreError",
    "StoredFactorization",
    "StoredFit",
    "check_version",
    "checksum",
    "columns_of",
    "differences_in_space",
    "factorization_checksums",
    "file_checksum",
    "fisher_store_bytes",
    "inner_chunk_examples",
    "is_committed",
    "is_remote",
    "json_checksum",
    "location",
    "open_factorization",
    "preparing",
    "read_diagonal",
    "read_json",
    "read_sums",
    "read_table",
    "remove_directory",
    "replacing_directory",
    "task_files",
    "write_checkpoint_array",
    "write_factorization",
    "write_file_atomically",
    "write_json_atomically",
    "write_sums",
    "write_table",
    "write_table_in_parts",
]
