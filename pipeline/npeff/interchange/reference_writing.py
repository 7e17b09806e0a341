"""Writers of the HDF5 files of the reference implementation."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from npeff.interchange.hdf5_files import load_h5py
from npeff.interchange.reference_files import (
    COMPONENT_ARRAYS,
    Decomposition,
    DiagonalPefBlock,
    DiagonalPefHeader,
    PefBlock,
    PefHeader,
)
from npeff.storage.atomic import PARTIAL, fsync, make_directory
from npeff.storage.errors import os_errors_explained
from npeff.storage.location import is_remote, location
from npeff.storage.objects import upload_files


def write_pef(path: str | Path, header: PefHeader, blocks: Iterable[PefBlock]) -> None:
    """Create or replace an LRM-PEF or LVRM-PEF file from consecutive blocks.

    Raises:
        ValueError: The blocks do not contain all examples of the header in order, or have other shapes.
        StoreError: The file cannot be written. The previous content of `path` is unchanged.
    """
    N, low_rank = header.n_examples, header.format == "LRM-PEF"
    with _created(location(path)) as file:
        data = file.create_group("data")
        data.attrs["n_parameters"] = header.n_parameters
        data.create_dataset("labels", (N,), "<i4")
        data.create_dataset("logits", (N, header.n_classes), "<f4")
        data.create_dataset("values", (N, header.n_values), "<f4")
        data.create_dataset("row_indices", (N, header.n_values), "<i4")
        data.create_dataset("pef_frobenius_norms", (N,), "<f4")
        if low_rank:
            data.attrs["n_classes"] = header.n_classes
            data.create_dataset("col_offsets", (N, header.n_classes + 1), "<i4")
        else:
            data.attrs["min_prob_class"] = header.min_prob_class or 0.0
            data.create_dataset("ranks", (N,), "<i4")
        column_sizes: list[np.ndarray] = []
        written = 0
        for block in blocks:
            rows = _next_rows(block.start, written, len(block.labels_N))
            data["labels"][rows] = block.labels_N
            data["logits"][rows] = block.logits_NC
            data["values"][rows] = block.values_NV
            data["row_indices"][rows] = block.indices_NV
            data["pef_frobenius_norms"][rows] = block.frobenius_norms_N
            if low_rank:
                data["col_offsets"][rows] = block.offsets_NR
            else:
                data["ranks"][rows] = block.ranks_N
                sizes_NR = np.diff(block.offsets_NR, axis=1)
                column_sizes.append(sizes_NR[np.arange(sizes_NR.shape[1]) < block.ranks_N[:, None]])
            written = rows.stop
        if written != N:
            raise ValueError(f"{written} examples were given to write, not {N}")
        if not low_rank:
            data.create_dataset("col_sizes", data=np.concatenate(column_sizes), dtype="<i4")


def write_diagonal_pef(path: str | Path, header: DiagonalPefHeader, blocks: Iterable[DiagonalPefBlock]) -> None:
    """Create or replace a D-PEF file from consecutive blocks. Raises the errors of `write_pef`."""
    N = header.n_examples
    with _created(location(path)) as file:
        data, fisher = file.create_group("data"), file.create_group("data/fisher")
        fisher.attrs["dense_fisher_size"] = header.n_parameters
        data.create_dataset("labels", (N,), "<i4")
        data.create_dataset("predicted_logits", (N, header.n_classes), "<f4")
        data.create_dataset("dense_fisher_norms", (N,), "<f4")
        fisher.create_dataset("values", (N, header.n_values), "<f4")
        fisher.create_dataset("indices", (N, header.n_values), "<i4")
        written = 0
        for block in blocks:
            rows = _next_rows(block.start, written, len(block.labels_N))
            data["labels"][rows] = block.labels_N
            data["predicted_logits"][rows] = block.logits_NC
            data["dense_fisher_norms"][rows] = block.norms_N
            fisher["values"][rows] = block.values_NV
            fisher["indices"][rows] = block.indices_NV
            written = rows.stop
        if written != N:
            raise ValueError(f"{written} examples were given to write, not {N}")


def write_decomposition(path: str | Path, decomposition: Decomposition, components_KM: np.ndarray) -> None:
    """Create or replace an LRM or D decomposition.

    Raises:
        ValueError: The shapes do not agree.
        StoreError: The file cannot be written. The previous content of `path` is unchanged.
    """
    shape = (decomposition.n_components, len(decomposition.column_indices_M))
    if components_KM.shape != shape:
        raise ValueError(f"components have shape {components_KM.shape}, not {shape}")
    with _created(location(path)) as file:
        data = file.create_group("data")
        data.create_dataset("W", data=decomposition.coefficients_NK, dtype="<f4")
        file.create_dataset(COMPONENT_ARRAYS[decomposition.format], data=components_KM, dtype="<f4")
        if decomposition.format == "LRM decomposition":
            data.create_dataset("new_to_old_col_indices", data=decomposition.column_indices_M, dtype="<i4")
            data.attrs["n_parameters"] = decomposition.n_parameters
            data.attrs["n_classes"] = decomposition.n_classes
            losses = file.create_group("losses")
            for name, values in (("G_only", decomposition.losses_g_only), ("joint", decomposition.losses_joint)):
                losses.create_dataset(name, data=[] if values is None else values, dtype="<f4")
            losses.attrs["log_loss_frequency"] = decomposition.log_loss_frequency or 1
        else:
            kept = data.create_dataset("reduce_kept_indices", data=decomposition.column_indices_M, dtype="<i8")
            for holder in (data, kept):  # readers differ in where they expect it
                holder.attrs["full_dense_size"] = np.array([decomposition.n_parameters])


def _next_rows(start: int, written: int, count: int) -> slice:
    if start != written:
        raise ValueError(f"a block begins at example {start}, but {written} examples were written")
    return slice(start, start + count)


@contextmanager
def _one_os_error() -> Iterator[None]:
    """Convert the errors of HDF5 to a short `OSError`.

    HDF5 raises a long `OSError` for a full disk, and a `RuntimeError` when the file is closed.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else _errno_of(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number)) from error


def _errno_of(error: RuntimeError) -> int | None:
    """Return the errno of a failed system call, which only the text of HDF5's `RuntimeError` contains."""
    found = re.search(r"errno = (\d+)", str(error))
    return int(found[1]) if found else None


@contextmanager
def _created(path: Path) -> Iterator[Any]:
    """Create an HDF5 file that replaces `path` after the body."""
    h5py = load_h5py(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
            with _created(Path(folder, path.name)) as file:
                yield file
            upload_files(Path(folder), path.parent, [path.name])
        return
    partial = path.with_name(path.name + PARTIAL)
    with os_errors_explained("write", path):
        make_directory(path.parent)
        try:
            with _one_os_error(), h5py.File(partial, "w") as file:
                yield file
            fsync(partial)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                partial.unlink(missing_ok=True)
            raise
        fsync(path.parent)
