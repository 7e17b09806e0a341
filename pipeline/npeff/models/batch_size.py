"""The batch size for Fishers, chosen by measuring the memory of trial batches on a worker."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from npeff.errors import NpeffError
from npeff.fisher import PerExampleFishers
from npeff.models.loaded import LoadedModel
from npeff.models.streams import n_streams

_LARGEST = {"cpu": 32, "cuda": 512}
"""Maximum batch size for each type of device. Larger batches are not faster."""


def largest_batch_size(loaded: LoadedModel, fishers: PerExampleFishers, limit: int) -> int:
    """Find the largest batch size, a power of two, whose Fishers need at most `limit` bytes in addition to the model.

    Each trial computes a batch of the largest examples of the data set. The limit applies to as many concurrent batches
    as there are streams.

    Args:
        loaded: The model and the examples.
        fishers: Computes the Fishers of a batch.
        limit: Memory in bytes.

    Returns:
        The batch size, at least 1.

    Raises:
        NpeffError: A batch of one example needs more than the limit.
    """
    ordered = [example for batch in loaded.batches(range(len(loaded.examples)), 1) for example in batch]
    tried, before = 1, _held_bytes(loaded.device)
    while tried <= min(_LARGEST[loaded.device.type], len(ordered)):
        examples, former_peak = ordered[-tried:], peak_bytes(loaded.device)
        try:
            if loaded.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(loaded.device)
            batch, targets = loaded.with_targets(examples)
            fishers(batch, examples, targets)
        except torch.OutOfMemoryError:
            break
        peak = peak_bytes(loaded.device)
        needed = n_streams(loaded) * (peak - before)
        if needed > limit:
            # a lower peak of a process is not known: the memory of the trial may be less
            is_known = loaded.device.type == "cuda" or peak > former_peak
            if tried == 1 and is_known:
                raise _limit_too_low(needed)
            break
        tried *= 2
    return max(1, tried // 2)


def _limit_too_low(needed: int) -> NpeffError:
    return NpeffError(
        f"a batch of one example takes {-(-needed // 2**20):,} MiB, which is more than fishers.memory_limit_mb",
        "set fishers.memory_limit_mb to this or more, or lower executor.cpus_per_worker, which is the number of "
        "concurrent batches up to four",
    )


def _held_bytes(device: torch.device) -> int:
    """Return the memory that this process holds now, in bytes, or its peak if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process on `device`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
