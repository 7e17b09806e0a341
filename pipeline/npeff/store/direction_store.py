"""Components as directions in parameter space: one array (K, *shape) float32 or float16 for each parameter.

One chunk is one component's part in one parameter, so that any process may write the components that are its own, and
a direction is read alone. K x P numbers need not fit in memory. Which components are written is for the writers to
record: a chunk that nobody wrote reads as NaN, which `DirectionStore.read` refuses.

Legend: K components, P parameters.
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
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote, location
from npeff.storage.objects import read_range
from npeff.storage.zarr_groups import Part, create_group, open_array, open_group, restore_metadata, write_durably

SCHEMA_VERSION = 1
_KIND = "a store of directions"


class DirectionStore:
    """The Zarr group ``<run>/directions.zarr``. Use `create` or `open`."""

    def __init__(self, path: Path, arrays: Mapping[str, zarr.Array], attrs: Mapping[str, Any]) -> None:
        self.path = path
        self.arrays = dict(arrays)
        self.attrs = dict(attrs)
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
    ) -> DirectionStore:
        """A store without any direction, in place of what is at `path`; `attrs` (JSON) are kept.

        Args:
            shapes: of the parameters, by name, in order.
            dtype: of the arrays, "float32" or "float16". Half precision is fine enough for the entries of a unit
                vector: rounding adds at most 3e-8 to each or 0.05% of it, 0.2% of the length of 7 billion of them.

        Raises:
            StoreError: it cannot be written.
        """
        path = location(path)
        own = {"n_components": n_components, "parameters": list(shapes)}
        with replacing_directory(path) as partial:
            group = create_group(partial, _KIND, SCHEMA_VERSION, own, attrs)
            for name, shape in shapes.items():
                group.create_array(
                    name,
                    shape=(n_components, *shape),
                    dtype=dtype,
                    chunks=(1, *shape),
                    compressors=Crc32cCodec(),
                    fill_value=np.nan,
                )
        return cls.open(path)

    @classmethod
    def restore(cls, path: str | Path, **layout: Any) -> DirectionStore:
        """The store at `path`, whose metadata are made again where they are missing; its directions stay.

        Args:
            layout: what it was created with.

        Raises:
            StoreError: it is damaged otherwise, or cannot be written.
        """
        path = location(path)
        restore_metadata(path, lambda fresh: cls.create(fresh, **layout))
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> DirectionStore:
        """The store at `path`.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        path = location(path)
        group, attrs = open_group(path, _KIND, SCHEMA_VERSION, "lift")
        return cls(path, {name: open_array(group, path, name, "lift") for name in attrs["parameters"]}, attrs)

    def write(self, component: int, direction: Mapping[str, np.ndarray]) -> None:
        """Write one component's direction, all parameters of it, durably.

        Raises:
            ValueError: a parameter is missing, unknown, of another shape, or not finite.
            StoreError: it cannot be written.
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
        parts = (
            Part(name, self.arrays[name], component, component, values.astype(self.dtype))
            for name, values in direction.items()
        )
        write_durably(self.path, parts)

    def read(self, component: int) -> dict[str, np.ndarray]:
        """One component's direction, by parameter name, float32.

        Raises:
            IndexError: there is no such component.
            StoreError: a chunk is missing or corrupt.
        """
        self._check(component)
        return {name: self._read(name, component) for name in self.arrays}

    def export(self, component: int, file: str | Path) -> None:
        """Write one component's unit direction as a safetensors file under the parameters' names.

        Raises:
            IndexError, StoreError: as `read` does, or it cannot be written; a former `file` is then untouched.
        """
        # what numpy makes of a scalar is no array, and safetensors takes strides for granted
        tensors = {name: np.require(values, requirements="C") for name, values in self.read(component).items()}
        content = save(tensors, {"component": str(component)})
        write_file_atomically(location(file), lambda stream: stream.write(content))

    def _check(self, component: int) -> None:
        if not 0 <= component < self.n_components:
            raise IndexError(f"component {component} is outside 0..{self.n_components - 1}")

    def _read(self, name: str, component: int) -> np.ndarray:
        damage = StoreError(
            f"{name} of direction {component} in {self.path} is corrupt",
            f"run `npeff check --recompute {self.path.parent}` or delete {self.path} and run "
            f"`npeff lift {self.path.parent}` again",
            path=self.path / name,
        )
        try:
            values = np.asarray(self.arrays[name][component], np.float32)
        except (ValueError, OSError) as error:
            raise damage from error
        if not np.isfinite(values).all():  # a missing chunk reads as NaN
            raise damage
        return values


def write_sums(path: Path, vectors: Iterable[Iterable[np.ndarray]]) -> None:
    """Sums over a part of the examples on their way into directions: vectors one after the other, float32, each in
    pieces, parameter after parameter.

    Raises:
        StoreError: they cannot be written.
    """

    def write(stream: BinaryIO) -> None:
        for vector in vectors:
            for piece in vector:
                stream.write(np.ascontiguousarray(piece, dtype="<f4").data)

    write_file_atomically(path, write)


def read_sums(path: Path, index: int, size: int) -> np.ndarray:
    """The `index`-th vector, of `size` numbers, that `write_sums` wrote.

    Raises:
        StoreError: it is not there.
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
