"""Directions of components in parameter space: one array (K, *shape), float32 or float16, for each parameter.

A chunk is the part of one component in one parameter. Any process may therefore write its own components, and a
direction is read without the others. K x P numbers need not fit in memory. The writers must record which components are
written. A chunk that was not written reads as NaN, and `DirectionStore.read` then raises an error.

The sketches of the directions are in a further array (K, D), float32. Stores of earlier versions do not have it.

Legend: K components, P parameters, D sketch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr
from safetensors.numpy import save
from zarr.codecs import Crc32cCodec

from npeff.storage.atomic import replacing_directory, write_file_atomically
from npeff.storage.checksums import checksum
from npeff.storage.commands import run_argument
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote, location
from npeff.storage.objects import read_range
from npeff.storage.zarr_groups import Part, create_group, open_array, open_group, restore_metadata, write_durably

SCHEMA_VERSION = 1
_KIND = "a store of directions"
_SKETCHES = ".sketches"
"""Name of the array of sketches. The name of a parameter does not begin with a dot."""


class DirectionStore:
    """The Zarr group ``<run>/directions.zarr``. Use `create` or `open`."""

    def __init__(
        self,
        path: Path,
        arrays: Mapping[str, zarr.Array[Any]],
        attrs: Mapping[str, Any],
        checksums: Mapping[int, str] | None = None,
        sketches: zarr.Array[Any] | None = None,
    ) -> None:
        self._sketches = sketches
        self.path = path
        self.arrays = dict(arrays)
        self.attrs = dict(attrs)
        self._checksums = dict(checksums or {})
        self.n_components: int = attrs["n_components"]
        self.dtype = str(next(iter(self.arrays.values())).dtype)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        n_components: int,
        shapes: Mapping[str, tuple[int, ...]],
        attrs: Mapping[str, Any],
        dtype: str = "float32",
        sketch_dim: int | None = None,
    ) -> DirectionStore:
        """Create a store without directions, and replace an existing store at `path`.

        Args:
            path: The store.
            n_components: Number of components K.
            shapes: Shapes of the parameters by name, in order.
            attrs: Attributes of the caller (JSON).
            dtype: Type of the arrays, "float32" or "float16". Half precision suffices for the entries of a unit vector:
                the rounding error is at most 3e-8 or 0.05% of an entry, and 0.2% of the norm for 7 billion entries.
            sketch_dim: Number of coordinates D of the sketches; None for a store without sketches.

        Raises:
            StoreError: The store cannot be written.
        """
        path = location(path)
        own = {"n_components": n_components, "parameters": list(shapes), "sketch_dim": sketch_dim}
        arrays = {name: (shape, dtype) for name, shape in shapes.items()}
        if sketch_dim is not None:
            arrays[_SKETCHES] = (sketch_dim,), "float32"
        with replacing_directory(path) as partial:
            group = create_group(partial, _KIND, SCHEMA_VERSION, own, attrs)
            for name, (shape, kind) in arrays.items():
                group.create_array(
                    name,
                    shape=(n_components, *shape),
                    dtype=kind,
                    chunks=(1, *shape),
                    compressors=Crc32cCodec(),
                    fill_value=np.nan,
                )
        return cls.open(path)

    @classmethod
    def restore(cls, path: str | Path, **layout: Any) -> DirectionStore:
        """Restore the missing metadata of the store at `path`, and open it. Its directions stay.

        Args:
            path: The store.
            layout: The arguments with which the store was created.

        Raises:
            StoreError: The store is damaged in another way, or cannot be written.
        """
        path = location(path)
        restore_metadata(path, lambda fresh: cls.create(fresh, **layout))
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, checksums: Mapping[int, str] | None = None) -> DirectionStore:
        """Open the store at `path`.

        Args:
            path: The store.
            checksums: The checksums (see `write`) that the directions of some components must have when they are read.

        Raises:
            StoreError: The store is missing or damaged.
        """
        path = location(path)
        group, attrs = open_group(path, _KIND, SCHEMA_VERSION, "lift")
        arrays = {name: open_array(group, path, name, "lift") for name in attrs["parameters"]}
        with_sketches = attrs.get("sketch_dim") is not None
        sketches = open_array(group, path, _SKETCHES, "lift") if with_sketches else None
        return cls(path, arrays, attrs, checksums, sketches)

    def write(self, component: int, direction: Mapping[str, np.ndarray], sketch_D: np.ndarray | None = None) -> str:
        """Write the direction of a component durably.

        Args:
            component: Number of the component.
            direction: The arrays of all parameters, by name.
            sketch_D: The sketch of the direction, for a store with sketches.

        Returns:
            The checksum of the stored arrays.

        Raises:
            ValueError: A parameter is missing, is unknown, has another shape, or is not finite.
            StoreError: The direction cannot be written.
        """
        self._check(component)
        if direction.keys() != self.arrays.keys():
            raise ValueError(f"a direction has the parameters {list(self.arrays)}, not {list(direction)}")
        for name, values in direction.items():
            array = self.arrays[name]
            if values.shape != array.shape[1:]:
                raise ValueError(f"{name} must have shape {array.shape[1:]}, not {values.shape}")
            if not np.isfinite(values).all():
                raise ValueError(f"the direction in {name} is not finite")
        stored = {name: values.astype(self.dtype) for name, values in direction.items()}
        arrays = self.arrays
        if self._sketches is not None:
            if sketch_D is None or sketch_D.shape != self._sketches.shape[1:] or not np.isfinite(sketch_D).all():
                raise ValueError(f"a sketch must have {self._sketches.shape[1]} finite coordinates")
            stored[_SKETCHES] = sketch_D.astype(np.float32)
            arrays = arrays | {_SKETCHES: self._sketches}
        parts = (Part(name, arrays[name], component, component, values) for name, values in stored.items())
        write_durably(self.path, parts)
        return checksum(stored)

    def read(self, component: int) -> dict[str, np.ndarray]:
        """Return the direction of a component by parameter name, in float32.

        Raises:
            IndexError: There is no such component.
            StoreError: A chunk is missing or corrupt, or the direction does not have its checksum.
        """
        self._check(component)
        stored = {name: self._read(name, array, component) for name, array in self.arrays.items()}
        if self._sketches is not None and component in self._checksums:
            stored[_SKETCHES] = self._read(_SKETCHES, self._sketches, component)
        if self._checksums.get(component) not in (None, checksum(stored)):
            raise StoreError(
                f"direction {component} in {self.path} does not match its checksum",
                f"run `npeff check --recompute {run_argument(self.path)}`",
                path=self.path,
            )
        return {name: stored[name].astype(np.float32, copy=False) for name in self.arrays}

    def read_sketches(self) -> np.ndarray | None:
        """Return the sketches of the directions (K, D), float32; None for a store without sketches.

        The rows of components without a direction are NaN.

        Raises:
            StoreError: A chunk is corrupt.
        """
        if self._sketches is None:
            return None
        try:
            return np.asarray(self._sketches[:])
        except (ValueError, OSError) as error:
            raise self._damage(_SKETCHES, "an array of sketches") from error

    def export(self, component: int, file: str | Path, texts: Mapping[str, str] | None = None) -> None:
        """Write the unit direction of a component as a safetensors file with one tensor per parameter.

        The metadata of the file are the component, the kind of direction and, if given, ``texts``.

        Raises:
            IndexError: There is no such component.
            StoreError: A chunk is missing or corrupt, or `file` cannot be written. An existing `file` is unchanged.
        """
        # numpy operations turn 0-d arrays into scalars, and safetensors ignores strides
        tensors = {name: np.require(values, requirements="C") for name, values in self.read(component).items()}
        kind = self.attrs.get("direction", "own")
        content = save(tensors, {**(texts or {}), "component": str(component), "direction": kind})
        write_file_atomically(location(file), lambda stream: stream.write(content))

    def _check(self, component: int) -> None:
        if not 0 <= component < self.n_components:
            raise IndexError(f"component {component} is outside 0..{self.n_components - 1}")

    def _read(self, name: str, array: zarr.Array[Any], component: int) -> np.ndarray:
        damage = self._damage(name, f"{name} of direction {component}")
        try:
            values = np.asarray(array[component])
        except (ValueError, OSError) as error:
            raise damage from error
        if not np.isfinite(values).all():  # a missing chunk reads as NaN
            raise damage
        return values

    def _damage(self, name: str, what: str) -> StoreError:
        return StoreError(
            f"{what} in {self.path} is corrupt",
            f"run `npeff check --recompute {run_argument(self.path)}` or delete {self.path} and run "
            f"`npeff lift {run_argument(self.path)}` again",
            path=self.path / name,
        )


def write_sums(path: Path, vectors: Iterable[Iterable[np.ndarray]]) -> None:
    """Write partial sums of directions over a part of the examples: consecutive vectors in float32.

    Args:
        path: The file.
        vectors: The vectors, each in consecutive pieces, one per parameter.

    Raises:
        StoreError: The file cannot be written.
    """

    def write(stream: BinaryIO) -> None:
        for vector in vectors:
            for piece in vector:
                stream.write(np.ascontiguousarray(piece, dtype="<f4").data)

    write_file_atomically(path, write)


def read_sums(path: Path, index: int, size: int) -> np.ndarray:
    """Read the `index`-th vector of `size` numbers from a file of `write_sums`.

    Raises:
        StoreError: The file does not contain the vector.
    """
    start, stop = 4 * size * index, 4 * size * (index + 1)
    with os_errors_explained("read", path):
        if is_remote(path):
            content = read_range(path, start, stop)
        else:
            with path.open("rb") as stream:
                stream.seek(start)
                content = stream.read(stop - start)
    if len(content) != stop - start:
        raise StoreError(f"{path} is truncated", "delete it and run the same command again", path=path)
    return np.frombuffer(content, dtype="<f4")
