"""The codecs of zarrs for local Zarr arrays, which are faster than those of Zarr: the extra `fast`, on request.

The stored bytes, the numbers that are read and the checks of the crc32c are the same. Arrays on an object store use the
codecs of Zarr: their objects are read with one request each, with the errors of `npeff.storage.buckets`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import zarr

from npeff.storage.errors import StoreError

VARIABLE = "NPEFF_ZARRS"
"""Environment variable that requests these codecs if it is 1."""


def accelerated(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return a local array with the codecs of zarrs if they are requested, otherwise the array.

    Raises:
        StoreError: zarrs is requested but not installed.
    """
    if os.environ.get(VARIABLE) != "1":
        return array
    own = array.async_array
    with zarr.config.set({"threading.max_workers": 1}):  # several threads would write the chunks in any order
        pipeline = _pipeline().from_array_metadata_and_store(own.metadata, own.store)
    object.__setattr__(own, "codec_pipeline", pipeline)  # of this array only, whatever other threads open
    return array


@cache
def _pipeline() -> Any:
    if importlib.util.find_spec("zarrs") is None:
        raise StoreError(
            f"{VARIABLE}=1 needs zarrs, which is not installed",
            f"pip install 'npeff-pipeline[fast]', or unset {VARIABLE}",
        )
    from zarrs import ZarrsCodecPipeline

    class Pipeline(ZarrsCodecPipeline):
        """The pipeline of zarrs with Zarr's exceptions: ValueError for corrupt data, OSError for failed writes."""

        async def read(self, batch_info: Iterable[Any], *arguments: Any, **options: Any) -> None:
            batch, zarr_codecs = list(batch_info), self.python_impl
            if zarr_codecs is not None and not all(_whole(chosen, spec.shape) for _, spec, chosen, *_ in batch):
                # zarrs does not verify the crc32c of a file of which it reads a part
                await zarr_codecs.read(batch, *arguments, **options)
                return
            try:
                await super().read(batch, *arguments, **options)
            except RuntimeError as error:
                raise ValueError(str(error)) from error

        async def write(self, batch_info: Iterable[Any], *arguments: Any, **options: Any) -> None:
            batch, zarr_codecs = list(batch_info), self.python_impl
            if zarr_codecs is not None and any(spec.config.write_empty_chunks for _, spec, *_ in batch):
                # zarrs leaves out the empty chunks of a shard all the same
                await zarr_codecs.write(batch, *arguments, **options)
                return
            try:
                await super().write(batch, *arguments, **options)
            except RuntimeError as error:
                raise _os_error(error) from error

    return Pipeline


def _whole(chosen: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Return whether a selection contains everything of a chunk with this shape, also beyond the end of the array."""
    return len(chosen) == len(shape) and all(
        isinstance(part, slice) and part.indices(size) == (0, size, 1) for part, size in zip(chosen, shape, strict=True)
    )


def _os_error(error: RuntimeError) -> OSError:
    """Return the error of the operating system that a failed write of zarrs describes."""
    found = re.search(r"os error ([0-9]+)", str(error))
    return OSError(str(error)) if found is None else OSError(int(found[1]), os.strerror(int(found[1])))
