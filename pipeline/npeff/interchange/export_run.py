"""Export of Fishers and factorizations of a run to files of the reference implementation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from npeff.interchange.coordinates import parameters_of
from npeff.interchange.reference_files import BLOCK_VALUES, Decomposition, PefBlock, PefHeader
from npeff.interchange.reference_writing import write_decomposition, write_pef
from npeff.runs.config_reading import ConfigError
from npeff.runs.config_sections import IMPORTED_TASK
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.storage.errors import StoreError
from npeff.store.component_store import open_factorization
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords
from npeff.store.tables import read_table


def export_run(
    run_dir: str | Path,
    file: str | Path,
    *,
    what: Literal["fishers", "factorization"] = "fishers",
    n_values: int | None = None,
    factorization: str | None = None,
) -> None:
    """Export the Fishers (`export_fishers`) or a factorization (`export_factorization`) of a run.

    Raises:
        ConfigError, RunDirectoryError, StoreError: As in these functions.
    """
    if what == "fishers":
        return export_fishers(run_dir, file, n_values)
    if n_values is not None:
        raise ConfigError("a factorization is exported as a whole: give values (n_values) for fishers only")
    export_factorization(run_dir, file, factorization)


def export_fishers(run_dir: str | Path, file: str | Path, n_values: int | None = None) -> None:
    """Export the Fishers of a run as a PEF file.

    The rows are those of the run's factors and do not belong to classes, so the format is LVRM-PEF, unless the run was
    imported from an LRM-PEF file. The parameters are the coordinates of the run's sketch, or the parameters of the
    imported file if the import kept them (`Columns`). Invalid examples have no rows and norm 0.

    Args:
        run_dir: The run directory.
        file: The file to write.
        n_values: Number of entries of largest magnitude to keep per example; all by default.

    Raises:
        ConfigError: `n_values` is less than 1.
        RunDirectoryError: The Fishers are not complete.
        StoreError: A shard is damaged, the store has no logits, or the file cannot be written.
    """
    if n_values is not None and n_values < 1:
        raise ConfigError(f"n_values = {n_values} must be at least 1")
    run = RunDirectory.open(run_dir)
    store, checksums = complete_fishers(run)
    if "logits" not in store.array_names:
        problem = f"{store.path} has no logits, because its examples are sequences"
        raise StoreError(problem, "a PEF file needs the logits of single predictions")
    parameters_D, n_parameters = parameters_of(store.attrs["sketch"], store.dim)
    source = store.attrs.get("source", {})
    low_rank = source.get("format") == "LRM-PEF"
    header = PefHeader(
        format="LRM-PEF" if low_rank else "LVRM-PEF",
        n_examples=store.plan.n_examples,
        n_classes=store.n_classes,
        n_parameters=n_parameters,
        n_values=_most_entries(store, checksums) if n_values is None else min(n_values, store.rank * store.dim),
        rank=store.rank,
        min_prob_class=None if low_rank else source.get("min_prob_class", 0.0),
    )
    write_pef(file, header, _exported_blocks(store, checksums, header.n_values, parameters_D))


def export_factorization(run_dir: str | Path, file: str | Path, factorization: str | None = None) -> None:
    """Export a factorization of a run as an LRM decomposition.

    The components are unit rows, and the losses are those of the history. The parameters are as in `export_fishers`.
    Left-out examples have coefficients 0.

    Raises:
        RunDirectoryError: The run does not exist, or factorizes diagonals.
        StoreError: The factorization is missing or damaged, or the file cannot be written.
    """
    run = RunDirectory.open(run_dir, factorization)
    if run.config.factorization.kind != "fishers":
        raise RunDirectoryError(
            f"the components of {run.path} are of kind {run.config.factorization.kind}: only kind fishers can be "
            "exported"
        )
    stored = open_factorization(run.factorization)
    components_KD = stored.read_components()
    sketch = stored.attrs.get("sketch") or FisherStore.open(run.fishers).attrs["sketch"]
    parameters_D, n_parameters = parameters_of(sketch, components_KD.shape[1])
    history = read_table(run.table("history"), "history")
    decomposition = Decomposition(
        format="LRM decomposition",
        coefficients_NK=np.nan_to_num(stored.read_coefficients(), nan=0.0),
        column_indices_M=parameters_D,
        n_parameters=n_parameters,
        n_classes=len(read_table(run.table("classes"), "classes")),
        losses_joint=history.filter(history["accepted"])["loss"].to_numpy(),
        log_loss_frequency=1,
    )
    write_decomposition(file, decomposition, components_KD.astype(np.float32))


def complete_fishers(run: RunDirectory) -> tuple[FisherStore, dict[int, str]]:
    """Return the complete Fishers of a run, and the checksum of every shard."""
    record = run.record("fishers")
    imported = run.config.task.name == IMPORTED_TASK
    remedy = "import it again, with its Fishers" if imported else f"run `npeff fishers {run.path}` first"
    if record is None:
        raise RunDirectoryError(f"stage fishers of {run.path} is not complete", remedy)
    store = FisherStore.open(run.fishers)
    records = ShardRecords(run.shard_records, record["signature"]).complete()
    if missing := sorted(set(range(store.plan.n_shards)) - set(records)):
        raise StoreError(f"shard {missing[0]} of {run.fishers} has no record", remedy, path=run.fishers)
    return store, {shard: records[shard].checksum for shard in range(store.plan.n_shards)}


def _most_entries(store: FisherStore, checksums: dict[int, str]) -> int:
    """Return the largest number of non-zero entries of an example."""
    shards = (store.read_shard(shard, checksum)["factors"] for shard, checksum in checksums.items())
    return max(1, *(int(np.count_nonzero(factors, axis=(1, 2)).max()) for factors in shards))


def _exported_blocks(
    store: FisherStore, checksums: dict[int, str], n_values: int, parameters_D: np.ndarray
) -> Iterator[PefBlock]:
    """Yield the `n_values` entries of largest magnitude of every example, or all, ordered by row and parameter."""
    rank, dim = store.rank, store.dim
    step = max(1, 4 * BLOCK_VALUES // (rank * dim))
    for shard, checksum in checksums.items():
        arrays = store.read_shard(shard, checksum)
        start, stop = store.plan.bounds(shard)
        for first in range(0, stop - start, step):
            some = {name: values[first : first + step] for name, values in arrays.items()}
            n, ranks_N = len(some["ranks"]), some["ranks"]
            scale_N = np.sqrt(some["frobenius_norms"]).astype(np.float32)
            values_NE = (some["factors"] * scale_N[:, None, None]).reshape(n, -1)
            magnitudes_NE = np.abs(values_NE)
            magnitudes_NE[np.arange(rank * dim) >= ranks_N[:, None] * dim] = -1.0
            chosen_NV = np.argpartition(-magnitudes_NE, n_values - 1, axis=1)[:, :n_values]
            in_use_NV = np.take_along_axis(magnitudes_NE, chosen_NV, axis=1) >= 0
            chosen_NV = np.sort(np.where(in_use_NV, chosen_NV, rank * dim), axis=1)  # padding is last
            sizes = np.bincount(
                (np.arange(n)[:, None] * (rank + 1) + chosen_NV // dim).reshape(-1), minlength=n * (rank + 1)
            )
            padding_NV = chosen_NV == rank * dim
            chosen_NV[padding_NV] = 0
            values_NV = np.take_along_axis(values_NE, chosen_NV, axis=1)
            yield PefBlock(
                start=start + first,
                labels_N=some["labels"].astype(np.int32),
                logits_NC=some["logits"],
                frobenius_norms_N=some["frobenius_norms"].astype(np.float32),
                ranks_N=ranks_N,
                offsets_NR=np.pad(sizes.reshape(n, -1)[:, :rank].cumsum(axis=1), ((0, 0), (1, 0))).astype(np.int32),
                values_NV=np.where(padding_NV, 0.0, values_NV),
                indices_NV=np.where(padding_NV, 0, parameters_D[chosen_NV % dim]).astype(np.int32),
            )
