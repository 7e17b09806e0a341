"""Open HDF5 files whose content is not trusted: types, shapes, sizes and numbers are checked before they are used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from npeff.errors import as_one_line
from npeff.storage.atomic import local_copy
from npeff.storage.errors import StoreError, os_errors_explained

_MOST_PARAMETERS = 2**31
"""Largest number of parameters, because their indices are int32."""
_MOST_CLASSES = 2**20
"""Largest number of classes of a decomposition, which contains no array with one entry for each class."""
_MOST_COMPRESSED = 1032
"""Largest ratio of the size of an array to that of its compressed form in DEFLATE, the compression of HDF5."""


class Hdf5File:
    """An open file. All its problems raise a `StoreError` with the path."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file

    def error(self, what: str) -> StoreError:
        return StoreError(
            f"{self.path} {what}", "it is damaged or has another format, get or export it again", path=self.path
        )

    def has(self, name: str) -> bool:
        with _damage_explained(self.path):
            return name in self._file

    def dataset(self, name: str, kinds: str, *shape: int | None) -> Any:
        """Return a dataset.

        Args:
            name: Name of the dataset.
            kinds: Allowed kinds of its type (numpy's letters).
            shape: Required shape, with None for any length.

        Raises:
            StoreError: The dataset is missing, has another type or shape, or is larger than the file allows.
        """
        with _damage_explained(self.path):
            found = self._file.get(name)
            if found is None or not hasattr(found, "shape"):
                raise self.error(f"has no {name}")
            if found.file.id != self._file.id or found.is_virtual or found.external:
                raise self.error(f"has a {name} in another file")
            if found.dtype.kind not in kinds:
                raise self.error(f"has a {name} of type {found.dtype}")
            agrees = len(found.shape) == len(shape) and all(
                wanted in (None, length) for wanted, length in zip(shape, found.shape, strict=True)
            )
            if not agrees:
                wanted_shape = " x ".join("any" if length is None else str(length) for length in shape)
                raise self.error(f"has a {name} of shape {found.shape}, not {wanted_shape}")
            self._check_size(found, name)
        return found

    def _check_size(self, dataset: Any, name: str) -> None:
        """Check that the file can contain an array, before memory is allocated for it."""
        n_bytes = math.prod(dataset.shape) * dataset.dtype.itemsize
        stored = min(dataset.id.get_storage_size(), self._file.id.get_filesize())
        if n_bytes > stored * (_MOST_COMPRESSED if dataset.id.get_create_plist().get_nfilters() else 1):
            raise self.error(f"has a {name} of shape {dataset.shape}, of which it contains only {stored:,} bytes")

    def read(self, dataset: Any, start: int, stop: int, dtype: type[np.generic]) -> np.ndarray:
        """Read the rows start..stop-1."""
        with _damage_explained(self.path):
            return np.asarray(dataset[start:stop]).astype(dtype, copy=False)

    def number(self, name: str, *places: str) -> float:
        """Return an attribute that is one number, from the first of `places` that has it."""
        with _damage_explained(self.path):
            holders = [self._file[place] for place in places if place in self._file]
            found = next((holder.attrs[name] for holder in holders if name in holder.attrs), None)
            values = np.asarray(found)
            if values.size != 1 or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
                raise self.error(f"has no number {places[0]}@{name}")
            return float(values.reshape(-1)[0])

    def parameters(self, name: str, *places: str) -> int:
        """Return an attribute that is a number of parameters."""
        return self._count(name, places, _MOST_PARAMETERS, "out of range for int32 indices")

    def classes(self) -> int:
        """Return the number of classes."""
        return self._count("n_classes", ("data",), _MOST_CLASSES, f"not a number of classes from 1 to {_MOST_CLASSES}")

    def _count(self, name: str, places: Sequence[str], most: int, otherwise: str) -> int:
        number = self.number(name, *places)
        if not (number.is_integer() and 1 <= number <= most):
            raise self.error(f"has {places[0]}@{name} = {number:g}, which is {otherwise}")
        return int(number)

    def check_indices(self, indices: np.ndarray, n_parameters: int, name: str) -> None:
        if indices.size and (indices.min() < 0 or indices.max() >= n_parameters):
            raise self.error(f"has {name} that are not all in 0..{n_parameters - 1}")


def load_h5py(path: Path) -> Any:
    """Return the module h5py. Raises StoreError if it is not installed."""
    try:
        import h5py
    except ImportError:
        raise StoreError(f"{path} is an HDF5 file, which needs h5py", "pip install 'npeff-pipeline[hdf5]'") from None
    return h5py


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """Convert the various exceptions of HDF5 to a StoreError."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        problem = f"{path} is damaged ({as_one_line(error, 200)})"
        raise StoreError(problem, "get or export it again", path=path) from error


@contextmanager
def opened(path: Path) -> Iterator[Hdf5File]:
    """Open a file for reading. Raises StoreError if it is not an HDF5 file, or h5py is not installed."""
    h5py = load_h5py(path)
    with local_copy(path) as copy:
        with os_errors_explained("read", path), copy.open("rb"):
            pass
        if not h5py.is_hdf5(copy):
            remedy = "give a file of the reference implementation, or get it again"
            raise StoreError(f"{path} is not an HDF5 file", remedy, path=path)
        with _damage_explained(path):
            file = h5py.File(copy, "r")
        with file:
            yield Hdf5File(path, file)
