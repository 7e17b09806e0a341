"""What the factorization leaves behind, in a Zarr folder that is replaced whole.

    factorization.zarr   components (K, D) float64, coefficients (N, K) float32, NaN rows for examples left out;
                         columns (D,) int64 where the coordinates are single entries of the flat parameter vector

Legend: N examples, K components, D sketch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from pipeline.store.atomic import replacing_directory
from pipeline.store.errors import StoreError
from pipeline.store.groups import create_group, open_array, open_group
from pipeline.store.layout import MIN_CHUNK_BYTES
from pipeline.store.manifest import checksum

SCHEMA_VERSION = 1
_KIND = "a factorization"


@dataclass(frozen=True)
class StoredFactorization:
    """Lazy arrays, and `read_*`, which verify what they read."""

    path: Path
    components: zarr.Array
    """(K, D) float64, unit rows."""
    coefficients: zarr.Array
    """(N, K) float32; NaN rows for examples that were left out."""
    attrs: dict[str, Any]
    columns: zarr.Array | None = None
    """(D,) int64, the parameters that the components' coordinates are; None where they are no single parameters."""

    def read_components(self) -> np.ndarray:
        """(K, D) float64. Raises StoreError when a chunk is missing or corrupt."""
        return self._read("components", self.components)

    def read_coefficients(self) -> np.ndarray:
        """(N, K) float32. Raises StoreError when a chunk is missing or corrupt."""
        return self._read("coefficients", self.coefficients)

    def read_columns(self) -> np.ndarray | None:
        """(D,) int64, or None. Raises StoreError when a chunk is missing or corrupt."""
        return None if self.columns is None else self._read("columns", self.columns)

    def _read(self, name: str, array: zarr.Array) -> np.ndarray:
        damage = f"{name} of {self.path} are corrupt: delete it and run `npeff factorize {self.path.parent}` again"
        try:
            values = np.asarray(array[...])
        except (ValueError, OSError) as error:
            raise StoreError(damage) from error
        # a missing chunk reads as NaN, which in the coefficients would pass for an example left out
        if checksum({name: values}) != self.attrs["checksums"][name]:
            raise StoreError(damage)
        return values


def write_factorization(
    path: str | Path,
    components_KD: np.ndarray,
    coefficients_NK: np.ndarray,
    attrs: Mapping[str, Any],
    columns_D: np.ndarray | None = None,
) -> None:
    """Create or replace ``factorization.zarr``; `attrs` (JSON: loss, explained, why it stopped, ...) are kept.

    Raises:
        ValueError: the shapes are empty or do not agree, or a number is not finite, but for coefficient rows all NaN.
        StoreError: it cannot be written. The former content is untouched.
    """
    shapes_agree = components_KD.ndim == coefficients_NK.ndim == 2 and coefficients_NK.shape[1] == len(components_KD)
    if not shapes_agree or not components_KD.size or not coefficients_NK.size:
        raise ValueError(
            f"components {components_KD.shape} and coefficients {coefficients_NK.shape} are empty or do not agree"
        )
    if not np.isfinite(components_KD).all():
        raise ValueError("components are not finite")
    left_out = np.isnan(coefficients_NK).all(axis=1)
    if not np.isfinite(coefficients_NK[~left_out]).all():
        raise ValueError("coefficients are not finite in rows that are not all NaN")
    if columns_D is not None and columns_D.shape != components_KD.shape[1:]:
        raise ValueError(f"columns {columns_D.shape} and components {components_KD.shape} do not agree")
    arrays = _stored(components_KD, coefficients_NK, columns_D)
    checksums = {name: checksum({name: values}) for name, values in arrays.items()}
    with replacing_directory(Path(path)) as partial:
        group = create_group(partial, _KIND, SCHEMA_VERSION, {"checksums": checksums}, attrs)
        for name, values in arrays.items():
            chunk_rows = min(len(values), -(-MIN_CHUNK_BYTES // values[0].nbytes))
            empty = np.nan if values.dtype.kind == "f" else -1
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(chunk_rows, *values.shape[1:]),
                compressors=Crc32cCodec(),
                fill_value=empty,
            )
            array[...] = values


def factorization_checksums(
    components_KD: np.ndarray, coefficients_NK: np.ndarray, columns_D: np.ndarray | None = None
) -> dict[str, str]:
    """The attribute ``checksums`` of a factorization that is stored: equal where what is stored is."""
    stored = _stored(components_KD, coefficients_NK, columns_D)
    return {name: checksum({name: values}) for name, values in stored.items()}


def _stored(
    components_KD: np.ndarray, coefficients_NK: np.ndarray, columns_D: np.ndarray | None
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "components": components_KD.astype(np.float64),
        "coefficients": coefficients_NK.astype(np.float32),
    }
    return arrays if columns_D is None else arrays | {"columns": columns_D.astype(np.int64)}


def open_factorization(path: str | Path) -> StoredFactorization:
    """The content of ``factorization.zarr``.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    path = Path(path)
    group, attrs = open_group(path, _KIND, SCHEMA_VERSION, "factorize")
    components, coefficients = (open_array(group, path, name, "factorize") for name in ("components", "coefficients"))
    columns = open_array(group, path, "columns", "factorize") if "columns" in attrs["checksums"] else None
    return StoredFactorization(path, components, coefficients, attrs, columns)
