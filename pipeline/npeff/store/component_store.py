"""The factorization, in a Zarr folder that is replaced as a whole.

    factorization.zarr   components (K, D) float64; coefficients (N, K) float32, with NaN rows for left-out examples;
                         coefficient_norms (N,) float64, the norms of these rows;
                         evidence (N, K) float32, ‖Â_i h_j‖², with NaN rows for left-out examples, if the components are
                         in the sketch;
                         columns (D,) int64, if the coordinates are single entries of the flat parameter vector

A chunk of the coefficients is a few hundred examples with all their components, so reading one example is cheap. A file
has many chunks. Most coefficients are zero, and zstd compresses them well.

Legend: N examples, K components, D sketch dimension.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from npeff.storage.atomic import replacing_directory
from npeff.storage.checksums import ChecksumInBlocks, checksum
from npeff.storage.commands import run_argument
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import location
from npeff.storage.zarr_groups import create_group, open_array, open_group
from npeff.store.coefficient_rows import BLOCK_BYTES, Coefficients, blocks_of_rows
from npeff.store.layout import MIN_CHUNK_BYTES

SCHEMA_VERSION = 1
_KIND = "a factorization"


@dataclass(frozen=True)
class StoredFactorization:
    """A factorization on disk: lazy arrays, and `read_*` methods that verify checksums."""

    path: Path
    components: zarr.Array[Any]
    """(K, D) float64, unit rows."""
    coefficients: zarr.Array[Any]
    """(N, K) float32, with NaN rows for left-out examples."""
    attrs: dict[str, Any]
    columns: zarr.Array[Any] | None = None
    """(D,) int64, the parameter of each coordinate; None if the coordinates are not single parameters."""
    coefficient_norms: zarr.Array[Any] | None = None
    """(N,) float64, norms of the rows of the coefficients; None in stores of an earlier version."""
    evidence: zarr.Array[Any] | None = None
    """(N, K) float32, with NaN rows for left-out examples; None for diagonals and in stores of an earlier version."""

    def read_components(self) -> np.ndarray:
        """Return the components, (K, D) float64. Raises StoreError if a chunk is missing or corrupt."""
        return self._read("components", self.components)

    def read_coefficients(self) -> np.ndarray:
        """Return the coefficients, (N, K) float32. Raises StoreError if a chunk is missing or corrupt."""
        return self._read("coefficients", self.coefficients)

    def map_coefficients(self) -> np.ndarray:
        """Return the coefficients as `read_coefficients`, in a file without a name whose columns are contiguous.

        The file is mapped, so that the process needs no memory for the coefficients, and ends with it.
        """
        return self._map("coefficients", self.coefficients)

    def map_evidence(self) -> np.ndarray | None:
        """Return the evidence as `read_evidence`, mapped as by `map_coefficients`, or None."""
        return None if self.evidence is None else self._map("evidence", self.evidence)

    def read_columns(self) -> np.ndarray | None:
        """Return the columns, (D,) int64, or None. Raises StoreError if a chunk is missing or corrupt."""
        return None if self.columns is None else self._read("columns", self.columns)

    def read_evidence(self) -> np.ndarray | None:
        """Return the evidence, (N, K) float32, or None. Raises StoreError if a chunk is missing or corrupt."""
        return None if self.evidence is None else self._read("evidence", self.evidence)

    def _map(self, name: str, array: zarr.Array[Any]) -> np.ndarray:
        n_examples, n_components = array.shape
        digest = ChecksumInBlocks(name, array.dtype, array.shape)
        with tempfile.TemporaryFile(prefix="npeff-") as file, os_errors_explained("write", Path(tempfile.gettempdir())):
            mapped_KN = np.memmap(file, array.dtype, "w+", shape=(n_components, n_examples))
            size = (array.shards or array.chunks)[0]
            for start in range(0, n_examples, size):
                rows = slice(start, min(start + size, n_examples))
                block = self._block(name, array, rows)
                digest.update(block)
                mapped_KN[:, rows] = block.T
        if digest.hexdigest() != self.attrs["checksums"][name]:
            raise self._damage(name)
        return np.asarray(mapped_KN).T

    def _read(self, name: str, array: zarr.Array[Any]) -> np.ndarray:
        values = self._block(name, array, slice(None))
        # a missing chunk reads as NaN, which in the coefficients would look like left-out examples
        if checksum({name: values}) != self.attrs["checksums"][name]:
            raise self._damage(name)
        return values

    def _block(self, name: str, array: zarr.Array[Any], rows: slice) -> np.ndarray:
        try:
            return np.asarray(array[rows])
        except (ValueError, OSError) as error:
            raise self._damage(name) from error

    def _damage(self, name: str) -> StoreError:
        remedy = f"delete this store and run `npeff factorize {run_argument(self.path)}` again"
        return StoreError(f"{name} of {self.path} are corrupt", remedy, path=self.path / name)


def write_factorization(
    path: str | Path,
    components_KD: np.ndarray,
    coefficients_NK: Coefficients,
    attrs: Mapping[str, Any],
    columns_D: np.ndarray | None = None,
    evidence_NK: Coefficients | None = None,
) -> dict[str, str]:
    """Create or replace ``factorization.zarr``.

    The coefficients and the evidence are read twice, in blocks of rows.

    Args:
        path: The folder.
        components_KD: Components (K, D).
        coefficients_NK: Coefficients (N, K), with NaN rows for left-out examples.
        attrs: Attributes (JSON): loss, explained, the reason for stopping, ...
        columns_D: The parameter of each coordinate (D,), if the coordinates are single parameters.
        evidence_NK: Evidence (N, K), with NaN rows for left-out examples, if the components are in the sketch.

    Returns:
        The checksums of the arrays, by name.

    Raises:
        ValueError: The shapes are empty or do not agree, or a number outside the NaN rows is not finite.
        StoreError: The folder cannot be written. Its previous content is unchanged.
    """
    shape = tuple(coefficients_NK.shape)
    if (
        components_KD.ndim != 2
        or len(shape) != 2
        or shape[1] != len(components_KD)
        or 0 in (*shape, components_KD.size)
    ):
        raise ValueError(f"components {components_KD.shape} and coefficients {shape} are empty or do not agree")
    if not np.isfinite(components_KD).all():
        raise ValueError("components are not finite")
    arrays, checksums = _stored(components_KD, coefficients_NK, columns_D)
    in_rows = {"coefficients": coefficients_NK}
    if evidence_NK is not None:
        if tuple(evidence_NK.shape) != shape:
            raise ValueError(f"evidence {tuple(evidence_NK.shape)} and coefficients {shape} do not agree")
        in_rows["evidence"] = evidence_NK
        checksums["evidence"] = _norms_and_checksum("evidence", evidence_NK)[1]
    with replacing_directory(location(path)) as partial:
        group = create_group(partial, _KIND, SCHEMA_VERSION, {"checksums": checksums}, attrs)
        for name, values in arrays.items():
            _create_array(group, name, values.shape, values.dtype)[...] = values
        for name, values_NK in in_rows.items():
            stored = _create_array(group, name, shape, np.dtype(np.float32), compressed=True)
            for rows, block in blocks_of_rows(values_NK, (stored.shards or stored.chunks)[0]):
                stored[rows] = block
    return checksums


def _norms_and_checksum(name: str, coefficients_NK: Coefficients) -> tuple[NDArray[np.float64], str]:
    n_examples, n_components = coefficients_NK.shape
    norms_N = np.empty(n_examples)
    digest = ChecksumInBlocks(name, np.dtype(np.float32), (n_examples, n_components))
    for rows, block in blocks_of_rows(coefficients_NK, max(1, BLOCK_BYTES // (4 * n_components))):
        if not np.isfinite(block[~np.isnan(block).all(axis=1)]).all():
            raise ValueError(f"{name} are not finite in rows that are not all NaN")
        norms_N[rows] = np.sqrt(np.einsum("nk,nk->n", block, block, dtype=np.float64))
        digest.update(block)
    return norms_N, digest.hexdigest()


def _create_array(
    group: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype, compressed: bool = False
) -> zarr.Array[Any]:
    """Create an array that is chunked along its first axis. If `compressed`, several chunks share a file."""
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    chunk_rows = min(shape[0], -(-MIN_CHUNK_BYTES // row_bytes))
    chunks_per_shard = min(-(-shape[0] // chunk_rows), max(1, BLOCK_BYTES // (chunk_rows * row_bytes)))
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk_rows, *shape[1:]),
        shards=(chunk_rows * chunks_per_shard, *shape[1:]) if compressed and chunks_per_shard > 1 else None,
        compressors=[ZstdCodec(level=1), Crc32cCodec()] if compressed else Crc32cCodec(),
        fill_value=np.nan if dtype.kind == "f" else -1,
    )


def factorization_checksums(
    components_KD: np.ndarray, coefficients_NK: Coefficients, columns_D: np.ndarray | None = None
) -> dict[str, str]:
    """Return the attribute ``checksums`` that the stored factorization has, without that of the evidence."""
    return _stored(components_KD, coefficients_NK, columns_D)[1]


def _stored(
    components_KD: np.ndarray, coefficients_NK: Coefficients, columns_D: np.ndarray | None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays other than the coefficients in their stored types, and the checksums of all arrays."""
    norms_N, coefficients_checksum = _norms_and_checksum("coefficients", coefficients_NK)
    arrays: dict[str, np.ndarray] = {
        "components": components_KD.astype(np.float64),
        "coefficient_norms": norms_N,
    }
    if columns_D is not None:
        if columns_D.shape != components_KD.shape[1:]:
            raise ValueError(f"columns {columns_D.shape} and components {components_KD.shape} do not agree")
        arrays["columns"] = columns_D.astype(np.int64)
    checksums = {name: checksum({name: values}) for name, values in arrays.items()}
    return arrays, checksums | {"coefficients": coefficients_checksum}


def open_factorization(path: str | Path) -> StoredFactorization:
    """Open ``factorization.zarr``.

    Raises:
        StoreError: The folder is missing or damaged.
    """
    path = location(path)
    group, attrs = open_group(path, _KIND, SCHEMA_VERSION, "factorize")
    components, coefficients = (open_array(group, path, name, "factorize") for name in ("components", "coefficients"))
    columns, norms, evidence = (
        open_array(group, path, name, "factorize") if name in attrs["checksums"] else None
        for name in ("columns", "coefficient_norms", "evidence")
    )
    return StoredFactorization(path, components, coefficients, attrs, columns, norms, evidence)
