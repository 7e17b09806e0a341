"""Normalized Fisher factors of N examples in a Zarr group, which is written and read by whole shards.

`npeff.store.fisher_arrays` describes the arrays.

The fill values (NaN, -1, not valid) do not occur in a written shard, so that a shard that was not written cannot be
mistaken for data, even if the completion records are ignored. Every chunk and shard index has a crc32c. The arrays are
not compressed, because gradients compress badly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from npeff.storage.atomic import is_committed, replacing_directory
from npeff.storage.bfloat16 import decode_bfloat16, encode_bfloat16
from npeff.storage.checksums import checksum as checksum_of
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote, location
from npeff.storage.zarr_groups import (
    Part,
    create_group,
    damaged_metadata,
    decoded,
    open_array,
    open_group,
    read_objects,
    restore_metadata,
    stored_bytes,
    stored_path,
    write_durably,
)
from npeff.store.fisher_arrays import StoreDtype, specs_of
from npeff.store.layout import ShardPlan, inner_chunk_examples
from npeff.store.shard_records import ShardChecksums, record_path

SCHEMA_VERSION = 3
_KIND = "a Fisher store"

_DENSE = 4
"""All rows between the first and the last are read where at least one of so many is wanted."""

_SMALL_OBJECT = 2**20
"""Size in bytes up to which an object is read as a whole for some of its rows: a second request would take longer."""

_SHARDS_AT_ONCE = 8
"""Number of shards that are read at a time from an object store."""


class FisherStore:
    """The Zarr group ``<run>/fishers.zarr``.

    Use `create` or `open`. After the store is created, any number of processes may open it, and each process may write
    its own shards.
    """

    def __init__(self, path: Path, attrs: Mapping[str, Any], arrays: Mapping[str, zarr.Array[Any]]) -> None:
        self.path = path
        self.attrs = dict(attrs)
        self.plan = ShardPlan(attrs["n_examples"], attrs["shard_size"])
        self.rank: int = attrs["rank"]
        self.dim: int = attrs["dim"]
        self.n_classes: int = attrs["n_classes"]
        self.store_dtype: StoreDtype = attrs["store_dtype"]
        self.top_entries: int | None = attrs.get("top_entries")
        self.n_groups: int | None = attrs.get("n_groups")
        self._specs = specs_of(attrs)
        self.array_names = tuple(self._specs)
        self._arrays = dict(arrays)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        n_examples: int,
        rank: int,
        dim: int,
        n_classes: int,
        shard_size: int,
        store_dtype: StoreDtype,
        attrs: Mapping[str, Any],
        with_logits: bool = True,
        top_entries: int | None = None,
        n_groups: int | None = None,
    ) -> FisherStore:
        """Create a store without shards.

        Args:
            path: The store.
            n_examples: Number of examples N.
            rank: Largest number of rows R of a factor.
            dim: Sketch dimension D.
            n_classes: Number of classes C.
            shard_size: Examples per shard.
            store_dtype: Precision of the stored factors.
            attrs: Attributes of the caller (JSON): parameter layout, sketch, model fingerprint, ...
            with_logits: Whether to store logits. They are not stored if an example is a sequence of predictions or if
                the classes are a vocabulary.
            top_entries: Number k of largest entries of the diagonals to store.
            n_groups: Number Q of groups whose diagonal sums are stored.

        Raises:
            StoreError: `path` exists, a size is impossible, or the store cannot be written.
        """
        path = location(path)
        with os_errors_explained("write", path):
            exists = is_committed(path)
        if exists:
            raise StoreError(f"{path} exists already", "open it to resume, or choose another run_dir", path=path)
        if n_examples < 1:
            raise StoreError(f"there are no examples to store in {path}", "give a data set with at least one")
        sizes = {"rank": rank, "dim": dim, "n_classes": n_classes, "shard_size": shard_size}
        diagonals = {"top_entries": top_entries, "n_groups": n_groups}
        sizes |= {name: size for name, size in diagonals.items() if size is not None}
        if impossible := [f"{name} = {size}" for name, size in sizes.items() if size < 1]:
            raise StoreError(f"{path} cannot have {', '.join(impossible)}", "each must be at least 1")
        if store_dtype not in get_args(StoreDtype):
            raise StoreError(f"store_dtype {store_dtype!r} is unknown", f"choose {', '.join(get_args(StoreDtype))}")
        own = {"normalised": True, "n_examples": n_examples, **sizes, "store_dtype": store_dtype}
        own["with_logits"] = with_logits
        with replacing_directory(path) as partial:
            group = create_group(partial, _KIND, SCHEMA_VERSION, own, attrs)
            rows = min(shard_size, n_examples)
            for name, spec in specs_of(own).items():
                group.create_array(
                    name,
                    shape=(n_examples, *spec.tail),
                    dtype=spec.dtype,
                    shards=(rows, *spec.tail),
                    chunks=(inner_chunk_examples(rows, spec.example_bytes), *spec.tail),
                    compressors=Crc32cCodec(),
                    fill_value=spec.fill,
                )
        return cls.open(path)

    @classmethod
    def restore(cls, path: str | Path, **layout: Any) -> FisherStore:
        """Restore the missing metadata of the store at `path`, and open it. Its shards stay.

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
    def open(cls, path: str | Path) -> FisherStore:
        """Open the store at `path` for reading, and for writing the caller's own shards.

        Raises:
            StoreError: The store is missing or damaged, or has another schema version.
        """
        path = location(path)
        group, attrs = open_group(path, _KIND, SCHEMA_VERSION, "fishers")
        specs = specs_of(attrs)
        # By default, Zarr does not write chunks that equal the fill value, which a shard without valid examples may.
        # They are written, so that a missing file always means damage. Factors never equal their fill value, and
        # skipping their padding saves space.
        arrays = {name: open_array(group, path, name, "fishers", empty_chunks=name != "factors") for name in specs}
        for name, spec in specs.items():
            if (arrays[name].shape, str(arrays[name].dtype)) != ((attrs["n_examples"], *spec.tail), spec.dtype):
                raise damaged_metadata(path, name, "fishers")
        return cls(path, attrs, arrays)

    @staticmethod
    def read_attributes(path: str | Path) -> dict[str, Any]:
        """Return the attributes of the store at `path`, without opening its arrays.

        Raises:
            StoreError: The store is missing or damaged, or has another schema version.
        """
        return open_group(location(path), _KIND, SCHEMA_VERSION, "fishers")[1]

    def write_shard(self, shard: int, arrays: Mapping[str, np.ndarray]) -> str:
        """Write every array of a shard as `write`, and return the checksum of all arrays together."""
        return self.write(shard, arrays)[0]

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> tuple[str, dict[str, str]]:
        """Write every array of a shard durably.

        The shard is not complete until the caller writes the completion record with the checksums.

        Args:
            shard: Number of the shard.
            arrays: Arrays with the names and shapes of this module's table, for the examples of the shard; `factors`
                in floating point.

        Returns:
            The checksum of all stored arrays together, and the checksum of each array.

        Raises:
            StoreError: A name, shape or type is wrong, a number is not finite or overflows, or the shard cannot be
                written.
        """
        start, stop = self.plan.bounds(shard)
        stored = self._encode(shard, arrays)
        rows = slice(start, stop)
        parts = (Part(name, self._arrays[name], shard, rows, values) for name, values in stored.items())
        write_durably(self.path, parts)
        return checksum_of(stored), {name: checksum_of({name: values}) for name, values in stored.items()}

    def read_shard(
        self, shard: int, checksum: ShardChecksums | None = None, names: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Read arrays of a shard, with `factors` in float32.

        Args:
            shard: Number of the shard.
            checksum: Checksums to verify; if None, only the crc32c of Zarr are verified. A checksum of all arrays
                together requires that all arrays are read.
            names: Names of the arrays; all arrays by default.

        Raises:
            StoreError: The shard is missing, truncated or corrupt, or does not match the checksum.
        """
        stored = self._read_stored(shard, checksum, names)
        return {name: self._decode(name, values) for name, values in stored.items()}

    def read_factors(self, shard: int, checksum: ShardChecksums | None = None) -> np.ndarray:
        """Read the factors of a shard in the stored precision, bfloat16 as uint16, and verify them as `read_shard`.

        Raises:
            StoreError: As in `read_shard`.
        """
        return self._read_stored(shard, checksum, ["factors"])["factors"]

    def decoded_factors(self, stored: np.ndarray) -> np.ndarray:
        """Convert factors from the stored precision, as `read_factors` returns them, to float32."""
        return self._decode("factors", stored)

    def read_rows(
        self, indices: Sequence[int] | np.ndarray, names: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Read given examples, in the given order, with `factors` in float32.

        Args:
            indices: Indices of the examples.
            names: Names of the arrays; all arrays by default.

        Raises:
            IndexError: An index is outside 0..N-1.
            StoreError: A shard of these examples is missing, truncated or corrupt.
        """
        rows, inverse = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if rows.size and (rows[0] < 0 or rows[-1] >= self.plan.n_examples):
            raise IndexError(f"examples {rows[0]}..{rows[-1]} are not all in 0..{self.plan.n_examples - 1}")
        shards, firsts = np.unique(rows // self.plan.shard_size, return_index=True)
        rows_by_shard = np.split(rows, firsts[1:])
        wanted = list(self.array_names if names is None else names)
        read = partial(self._read_some, wanted)
        if is_remote(self.path):
            with ThreadPoolExecutor(_SHARDS_AT_ONCE, "shards") as threads:
                parts = list(threads.map(read, shards.tolist(), rows_by_shard))
        else:
            parts = list(map(read, shards.tolist(), rows_by_shard))
        result = {}
        for name in wanted:
            spec = self._specs[name]
            stored = np.concatenate([np.empty((0, *spec.tail), spec.dtype), *(part[name] for part in parts)])
            result[name] = self._decode(name, stored[inverse])
        return result

    def _read_stored(
        self, shard: int, checksum: ShardChecksums | None, names: Iterable[str] | None
    ) -> dict[str, np.ndarray]:
        wanted = list(self.array_names if names is None else names)
        stored = self._read_whole(shard, self.array_names if isinstance(checksum, str) else wanted)
        if isinstance(checksum, str):
            intact = checksum_of(stored) == checksum
        else:
            intact = checksum is None or all(checksum_of({name: stored[name]}) == checksum.get(name) for name in wanted)
        if not intact:
            raise self._shard_error(shard, "does not match its checksum", self.path)
        return {name: stored[name] for name in wanted}

    def _read_whole(self, shard: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Read all rows of stored arrays. On an object store, this takes one request for each array."""
        rows = slice(*self.plan.bounds(shard))
        if not is_remote(self.path):
            return {name: self._read(name, shard, rows) for name in names}
        contents = read_objects(self.path, {name: self._arrays[name] for name in names}, shard)
        found = {}
        for name, content in contents.items():
            path = stored_path(self.path, name, self._arrays[name], shard)
            if not content:
                raise self._shard_error(shard, f"has no {name}", path)
            try:
                found[name] = decoded(self._arrays[name], shard, content, rows)
            except ValueError as error:
                raise self._shard_error(shard, f"is corrupt in {name}", path) from error
        return found

    def _read_some(self, names: Sequence[str], shard: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Read rows of stored arrays, ascending and all in `shard`."""
        start, stop = self.plan.bounds(shard)
        whole: dict[str, np.ndarray] = {}
        if is_remote(self.path):
            dense = _DENSE * len(rows) >= stop - start
            sizes = {name: self._specs[name].example_bytes * (stop - start) for name in names}
            whole = self._read_whole(shard, [name for name in names if dense or sizes[name] <= _SMALL_OBJECT])
        return {name: whole[name][rows - start] if name in whole else self._read(name, shard, rows) for name in names}

    def _encode(self, shard: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Check the arrays and convert them to the stored types. Raises StoreError."""
        start, stop = self.plan.bounds(shard)
        where = f"shard {shard} of {self.path}"
        if set(arrays) != set(self.array_names):
            raise StoreError(f"{where} needs the arrays {sorted(self.array_names)}, not {sorted(arrays)}")
        stored = {}
        for name, spec in self._specs.items():
            values, shape = arrays[name], (stop - start, *spec.tail)
            if values.shape != shape:
                raise StoreError(f"{name} of {where} must have shape {shape}, not {values.shape}")
            bfloat16 = name == "factors" and self.store_dtype == "bfloat16"
            dtype = np.dtype(np.float32 if bfloat16 else spec.dtype)
            if not np.can_cast(values.dtype, dtype, casting="same_kind"):
                raise StoreError(f"{name} of {where} must be {dtype}, not {values.dtype}")
            with np.errstate(over="ignore"):  # overflow gives infinity, which _check detects
                cast_values = values.astype(dtype, copy=False)
            stored[name] = encode_bfloat16(cast_values) if bfloat16 else cast_values
        self._check(where, arrays["factors"], stored)
        return stored

    def _check(self, where: str, factors: np.ndarray, stored: Mapping[str, np.ndarray]) -> None:
        remedy = "mark such examples as not valid and set them to zero"
        if not np.isfinite(factors).all():
            raise StoreError(f"factors of {where} are not finite", remedy)
        if not np.isfinite(self._decode("factors", stored["factors"])).all():
            raise StoreError(f"factors of {where} do not fit {self.store_dtype}", "set fishers.store_dtype to float32")
        for name in ("frobenius_norms", "grams", "diagonal_norms", "diagonal_values", "grouped_diagonal"):
            if name in stored and not np.isfinite(stored[name]).all():
                raise StoreError(f"{name} of {where} are not finite", remedy)
        if "logits" in stored and not np.isfinite(stored["logits"][stored["valid"]]).all():
            raise StoreError(f"logits of {where} are not finite", "mark such examples as not valid")
        if ((stored["ranks"] < 0) | (stored["ranks"] > self.rank)).any():
            raise StoreError(f"ranks of {where} are not all in 0..{self.rank}")

    def _decode(self, name: str, stored: np.ndarray) -> np.ndarray:
        if name != "factors":
            return stored
        return decode_bfloat16(stored) if self.store_dtype == "bfloat16" else stored.astype(np.float32, copy=False)

    def _read(self, name: str, shard: int, rows: slice | np.ndarray) -> np.ndarray:
        """Read rows of one stored array, ascending and all in `shard`."""
        path = stored_path(self.path, name, self._arrays[name], shard)
        if not stored_bytes(path):  # Zarr reads a missing or empty file as fill values
            raise self._shard_error(shard, f"has no {name}", path)
        try:
            if isinstance(rows, np.ndarray) and rows[-1] - rows[0] < _DENSE * len(rows):
                # Zarr takes ten times as long to pick rows as to read all of them.
                block: np.ndarray = np.asarray(self._arrays[name][rows[0] : rows[-1] + 1])
                chosen: np.ndarray = block[rows - rows[0]]
                return chosen
            return np.asarray(self._arrays[name].oindex[rows])
        except (ValueError, OSError) as error:
            raise self._shard_error(shard, f"is corrupt in {name}", path) from error

    def _shard_error(self, shard: int, what: str, path: Path) -> StoreError:
        record = record_path(self.path.parent / "shards", shard)
        remedy = f"delete {record} and run the same command again to recompute it"
        return StoreError(f"shard {shard} of {self.path} {what}", remedy, path=path)
