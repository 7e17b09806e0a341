"""Readers of the HDF5 files of the NPEFF reference implementation, by blocks of examples.

    LRM-PEF            data@n_classes n_parameters; data/labels logits values row_indices col_offsets
                       pef_frobenius_norms
    LVRM-PEF           data@min_prob_class n_parameters; ranks and col_sizes instead of col_offsets
    D-PEF              data/labels predicted_logits dense_fisher_norms; data/fisher/values indices, @dense_fisher_size
    LRM decomposition  data@n_classes n_parameters; data/W G new_to_old_col_indices; losses/G_only joint
    D decomposition    data/W H reduce_kept_indices; full_dense_size

A PEF is the Fisher factor A of an example (F = AᵀA), of which only the entries of largest magnitude are kept. LRM has
one row √p_y ∇log p_y per class y. LVRM has one row per class of sufficient probability, so the number of rows varies.
Parameters are numbered consecutively from 0.

Legend: N examples, C classes, R rows of a factor, V values kept of an example, K components, M columns of components.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from npeff.interchange.hdf5_files import Hdf5File, opened
from npeff.storage.errors import StoreError
from npeff.storage.location import location

PefFormat = Literal["LRM-PEF", "LVRM-PEF"]
DecompositionFormat = Literal["LRM decomposition", "D decomposition"]
Format = PefFormat | DecompositionFormat | Literal["D-PEF"]

BLOCK_VALUES = 1 << 20
"""Approximate number of values in a block."""
_FORMAT_MARKERS: dict[str, Format] = {
    "fisher/values": "D-PEF", "col_offsets": "LRM-PEF", "col_sizes": "LVRM-PEF",
    "G": "LRM decomposition", "H": "D decomposition",
}  # fmt: skip
"""Entry below ``data`` that occurs in one format only."""
COMPONENT_ARRAYS = {"LRM decomposition": "data/G", "D decomposition": "data/H"}


@dataclass(frozen=True)
class PefHeader:
    """Sizes of an LRM-PEF or LVRM-PEF file."""

    format: PefFormat
    n_examples: int
    n_classes: int
    n_parameters: int
    n_values: int
    """Stored values per example, including padding."""
    rank: int
    """Largest number of rows of a factor."""
    min_prob_class: float | None
    """Smallest probability of a class with a row; LVRM-PEF only."""


@dataclass(frozen=True)
class PefBlock:
    """Consecutive examples: sparse Fisher factors in parameter coordinates."""

    start: int
    """Number of the first example."""
    labels_N: np.ndarray
    """int32; negative if unknown."""
    logits_NC: np.ndarray
    """float32"""
    frobenius_norms_N: np.ndarray
    """float32: ‖F‖_F of the factor before the selection of the largest entries."""
    ranks_N: np.ndarray
    """int32: rows of each factor."""
    offsets_NR: np.ndarray
    """(N, R + 1) int32, from 0: row r of example i has values[i, offsets[i, r]:offsets[i, r + 1]]."""
    values_NV: np.ndarray
    """float32"""
    indices_NV: np.ndarray
    """int32: the parameter of each value."""

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return all values of the block without padding, as (position in the block, row, parameter, value)."""
        sizes_NR = np.diff(self.offsets_NR, axis=1).astype(np.int64)
        rank = sizes_NR.shape[1]
        used_N = sizes_NR.sum(axis=1)
        used_NV = np.arange(self.values_NV.shape[1]) < used_N[:, None]
        examples = np.repeat(np.arange(len(used_N)), used_N)
        rows = np.repeat(np.tile(np.arange(rank), len(used_N)), sizes_NR.reshape(-1))
        return examples, rows, self.indices_NV[used_NV].astype(np.int64), self.values_NV[used_NV]


@dataclass(frozen=True)
class DiagonalPefHeader:
    """Sizes of a D-PEF file."""

    n_examples: int
    n_classes: int
    n_parameters: int
    n_values: int


@dataclass(frozen=True)
class DiagonalPefBlock:
    """Consecutive examples: the largest entries of diagonal Fishers."""

    start: int
    labels_N: np.ndarray
    """int32"""
    logits_NC: np.ndarray
    """float32"""
    norms_N: np.ndarray
    """float32: ‖f‖ before the selection of the largest entries."""
    values_NV: np.ndarray
    """float32, descending."""
    indices_NV: np.ndarray
    """int32: the parameter of each value."""


@dataclass(frozen=True)
class Decomposition:
    """A decomposition without its components."""

    format: DecompositionFormat
    coefficients_NK: np.ndarray
    """float32, W."""
    column_indices_M: np.ndarray
    """int64: the parameter of each column of the components."""
    n_parameters: int
    n_classes: int | None = None
    """LRM decomposition only."""
    losses_g_only: np.ndarray | None = None
    """float32, as stored: the reference implementation adds a wrong constant. None if the file has no losses; the same
    holds for the next two fields."""
    losses_joint: np.ndarray | None = None
    log_loss_frequency: int | None = None
    """Iterations between two recorded losses."""

    @property
    def n_components(self) -> int:
        return int(self.coefficients_NK.shape[1])


class PefFile:
    """An open LRM-PEF or LVRM-PEF file; see `open_pef`."""

    def __init__(self, file: Hdf5File, form: PefFormat) -> None:
        self._file = file
        self.path = file.path
        self._logits = file.dataset("data/logits", "f", None, None)
        n_examples, n_classes = self._logits.shape
        self._labels = file.dataset("data/labels", "iu", n_examples)
        self._values = file.dataset("data/values", "f", n_examples, None)
        self._indices = file.dataset("data/row_indices", "iu", *self._values.shape)
        self._norms = file.dataset("data/pef_frobenius_norms", "f", n_examples)
        if form == "LRM-PEF":
            if file.number("n_classes", "data") != n_classes:
                raise file.error(f"has logits of {n_classes} classes but another data@n_classes")
            self._columns = file.dataset("data/col_offsets", "iu", n_examples, n_classes + 1)
            self._ranks_N = np.full(n_examples, n_classes, dtype=np.int32)
        else:
            self._ranks_N = file.read(file.dataset("data/ranks", "iu", n_examples), 0, n_examples, np.int32)
            if (self._ranks_N < 0).any():
                raise file.error("has negative data/ranks")
            self._columns = file.dataset("data/col_sizes", "iu", int(self._ranks_N.sum(dtype=np.int64)))
            if (self._ranks_N > n_classes).any():
                raise file.error(f"has data/ranks above the {n_classes} classes of data/logits")
        self._first_column_N = np.concatenate([[0], np.cumsum(self._ranks_N, dtype=np.int64)])
        self.header = PefHeader(
            format=form,
            n_examples=n_examples,
            n_classes=n_classes,
            n_parameters=file.parameters("n_parameters", "data"),
            n_values=self._values.shape[1],
            rank=int(self._ranks_N.max(initial=0)),
            min_prob_class=file.number("min_prob_class", "data") if form == "LVRM-PEF" else None,
        )

    def blocks(self, start: int = 0, stop: int | None = None, block_values: int = BLOCK_VALUES) -> Iterator[PefBlock]:
        """Yield the examples start..stop-1 (all by default) in blocks of about `block_values` values.

        Raises:
            StoreError: The file cannot be read, offsets do not ascend, or the index of a parameter is out of range.
        """
        step = max(1, block_values // max(1, self.header.n_values, self.header.n_classes))
        stop = self.header.n_examples if stop is None else stop
        for first in range(start, stop, step):
            yield self._block(first, min(first + step, stop))

    def _block(self, start: int, stop: int) -> PefBlock:
        file, header = self._file, self.header
        offsets_NR = self._offsets(start, stop)
        wrong_N = (
            (offsets_NR[:, 0] != 0)
            | (np.diff(offsets_NR, axis=1) < 0).any(axis=1)
            | (offsets_NR[:, -1] > header.n_values)
        )
        if wrong_N.any():
            raise file.error(
                f"has column offsets of example {start + int(wrong_N.argmax())} that do not ascend from 0 to at most "
                f"the {header.n_values} values of an example"
            )
        indices_NV = file.read(self._indices, start, stop, np.int64)
        used_NV = np.arange(header.n_values) < offsets_NR[:, -1:]
        file.check_indices(indices_NV[used_NV], header.n_parameters, "data/row_indices")
        return PefBlock(
            start=start,
            labels_N=file.read(self._labels, start, stop, np.int32),
            logits_NC=file.read(self._logits, start, stop, np.float32),
            frobenius_norms_N=file.read(self._norms, start, stop, np.float32),
            ranks_N=self._ranks_N[start:stop],
            offsets_NR=offsets_NR.astype(np.int32),
            values_NV=file.read(self._values, start, stop, np.float32),
            indices_NV=indices_NV.astype(np.int32),
        )

    def _offsets(self, start: int, stop: int) -> np.ndarray:
        """Return the offsets of the rows, (stop - start, R + 1) int64."""
        if self.header.format == "LRM-PEF":
            return self._file.read(self._columns, start, stop, np.int64)
        first, last = self._first_column_N[start], self._first_column_N[stop]
        offsets_NR = np.zeros((stop - start, self.header.rank + 1), dtype=np.int64)
        in_use_NR = np.arange(self.header.rank) < self._ranks_N[start:stop, None]
        offsets_NR[:, 1:][in_use_NR] = self._file.read(self._columns, first, last, np.int64)
        return offsets_NR.cumsum(axis=1)


class DiagonalPefFile:
    """An open D-PEF file; see `open_diagonal_pef`."""

    def __init__(self, file: Hdf5File) -> None:
        self._file = file
        self._logits = file.dataset("data/predicted_logits", "f", None, None)
        n_examples, n_classes = self._logits.shape
        self._labels = file.dataset("data/labels", "iu", n_examples)
        self._norms = file.dataset("data/dense_fisher_norms", "f", n_examples)
        self._values = file.dataset("data/fisher/values", "f", n_examples, None)
        self._indices = file.dataset("data/fisher/indices", "iu", *self._values.shape)
        n_parameters = file.parameters("dense_fisher_size", "data/fisher")
        self.header = DiagonalPefHeader(n_examples, n_classes, n_parameters, self._values.shape[1])

    def blocks(
        self, start: int = 0, stop: int | None = None, block_values: int = 1 << 20
    ) -> Iterator[DiagonalPefBlock]:
        """Yield the examples start..stop-1 (all by default) in blocks of about `block_values` values.

        Raises:
            StoreError: The file cannot be read, a value is negative, or the index of a parameter is out of range.
        """
        file = self._file
        step = max(1, block_values // max(1, self.header.n_values, self.header.n_classes))
        stop = self.header.n_examples if stop is None else stop
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values_NV = file.read(self._values, first, last, np.float32)
            indices_NV = file.read(self._indices, first, last, np.int64)
            if (values_NV < 0).any():
                raise file.error("has negative data/fisher/values")
            file.check_indices(indices_NV, self.header.n_parameters, "data/fisher/indices")
            yield DiagonalPefBlock(
                start=first,
                labels_N=file.read(self._labels, first, last, np.int32),
                logits_NC=file.read(self._logits, first, last, np.float32),
                norms_N=file.read(self._norms, first, last, np.float32),
                values_NV=values_NV,
                indices_NV=indices_NV.astype(np.int32),
            )


class DecompositionFile:
    """An open LRM or D decomposition; see `open_decomposition`."""

    def __init__(self, file: Hdf5File, form: DecompositionFormat) -> None:
        self._file = file
        low_rank = form == "LRM decomposition"
        coefficients = file.dataset("data/W", "f", None, None)
        n_examples, n_components = coefficients.shape
        if not n_examples or not n_components:
            raise file.error("has an empty data/W")
        self._components = file.dataset(COMPONENT_ARRAYS[form], "f", n_components, None)
        column_indices_M = file.dataset(
            "data/new_to_old_col_indices" if low_rank else "data/reduce_kept_indices", "iu", self._components.shape[1]
        )
        indices_M = file.read(column_indices_M, 0, self._components.shape[1], np.int64)
        if low_rank:
            n_parameters = file.parameters("n_parameters", "data")
        else:
            n_parameters = file.parameters("full_dense_size", "data", "data/reduce_kept_indices")
        file.check_indices(indices_M, n_parameters, column_indices_M.name.lstrip("/"))
        if len(np.unique(indices_M)) != len(indices_M):
            raise file.error(f"has {column_indices_M.name.lstrip('/')} that occur twice")
        self.decomposition = Decomposition(
            format=form,
            coefficients_NK=file.read(coefficients, 0, n_examples, np.float32),
            column_indices_M=indices_M,
            n_parameters=n_parameters,
            n_classes=file.classes() if low_rank else None,
            losses_g_only=self._losses("G_only"),
            losses_joint=self._losses("joint"),
            log_loss_frequency=int(file.number("log_loss_frequency", "losses")) if file.has("losses") else None,
        )
        if (self.decomposition.coefficients_NK < 0).any() or not np.isfinite(self.decomposition.coefficients_NK).all():
            raise file.error("has a data/W that is not finite and non-negative everywhere")

    def components(self, start: int, stop: int) -> np.ndarray:
        """Read the components start..stop-1, (stop - start, M) float32, without normalization.

        Raises:
            StoreError: The file cannot be read, or a number is not finite.
        """
        components = self._file.read(self._components, start, stop, np.float32)
        if not np.isfinite(components).all():
            raise self._file.error(f"has a {COMPONENT_ARRAYS[self.decomposition.format]} that is not finite")
        return components

    def _losses(self, name: str) -> np.ndarray | None:
        if not self._file.has(f"losses/{name}"):
            return None
        losses = self._file.dataset(f"losses/{name}", "f", None)
        return self._file.read(losses, 0, losses.shape[0], np.float32)


def file_format(path: str | Path) -> Format:
    """Return the format of a file.

    Raises:
        StoreError: The file cannot be read, or has another format.
    """
    with opened(location(path)) as file:
        return _format(file)


@contextmanager
def open_pef(path: str | Path) -> Iterator[PefFile]:
    """Open an LRM-PEF or LVRM-PEF file for reading. `PefFile.header` has its sizes, and `PefFile.blocks` reads it.

    Raises:
        StoreError: The file cannot be read or has another format, or its arrays and attributes do not agree.
    """
    with opened(location(path)) as file:
        form = _format(file)
        if form != "LRM-PEF" and form != "LVRM-PEF":
            raise StoreError(f"{path} has the format {form}", "give an LRM-PEF or LVRM-PEF file", path=file.path)
        yield PefFile(file, form)


@contextmanager
def open_diagonal_pef(path: str | Path) -> Iterator[DiagonalPefFile]:
    """Open a D-PEF file for reading. Raises StoreError as in `open_pef`."""
    with opened(location(path)) as file:
        form = _format(file)
        if form != "D-PEF":
            raise StoreError(f"{path} has the format {form}", "give a D-PEF file", path=file.path)
        yield DiagonalPefFile(file)


@contextmanager
def open_decomposition(path: str | Path) -> Iterator[DecompositionFile]:
    """Open an LRM or D decomposition for reading. Raises StoreError as in `open_pef`."""
    with opened(location(path)) as file:
        form = _format(file)
        if form != "LRM decomposition" and form != "D decomposition":
            raise StoreError(f"{path} has the format {form}", "give an LRM or D decomposition", path=file.path)
        yield DecompositionFile(file, form)


def _format(file: Hdf5File) -> Format:
    found = [form for name, form in _FORMAT_MARKERS.items() if file.has(f"data/{name}")]
    if len(found) != 1:
        raise StoreError(
            f"{file.path} is not a file of the reference implementation",
            "give an LRM-PEF, LVRM-PEF or D-PEF file or a decomposition",
            path=file.path,
        )
    return found[0]
