"""A short trial on a worker of what computing Fishers takes: memory, and time."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.fisher import PerExampleFishers
from pipeline.runtime.model import LoadedModel

_LARGEST = {"cpu": 32, "cuda": 512}
"""Beyond these a larger batch is no faster."""
_TIMED_BATCHES = 4


@dataclass(frozen=True)
class Cost:
    """What computing the Fishers of a data set takes one worker."""

    seconds: float
    """For all examples."""
    peak_bytes: int
    """Of the worker's process, or on its GPU."""


def largest_batch_size(loaded: LoadedModel, fishers: PerExampleFishers, limit: int) -> int:
    """The largest power of two of examples whose Fishers need at most `limit` bytes beside the model, tried on the
    largest examples of the data set; at least 1."""
    ordered = _by_length(loaded)
    size, before = 1, _peak_bytes(loaded.device)
    while 2 * size <= min(_LARGEST[loaded.device.type], len(ordered)):
        try:
            _compute(loaded, fishers, ordered[-2 * size :])
        except torch.OutOfMemoryError:
            break
        if _peak_bytes(loaded.device) - before > limit:
            break
        size *= 2
    return size


def cost(loaded: LoadedModel, fishers: PerExampleFishers, batch_size: int) -> Cost:
    """Time a few batches of every size of example, and take the peak of memory on the largest."""
    plan = loaded.batches(_by_length(loaded), batch_size)
    _compute(loaded, fishers, plan[-1])  # the first call learns about the model; the largest batch has the peak
    last = len(plan) - 1
    chosen = sorted({round(last * (place + 0.5) / _TIMED_BATCHES) for place in range(_TIMED_BATCHES)})
    seconds, n_examples = 0.0, 0
    for place in chosen:
        began = time.perf_counter()
        _compute(loaded, fishers, plan[place])
        seconds += time.perf_counter() - began
        n_examples += len(plan[place])
    return Cost(seconds / n_examples * len(loaded.examples), _peak_bytes(loaded.device))


def _by_length(loaded: LoadedModel) -> list[int]:
    return [example for batch in loaded.batches(range(len(loaded.examples)), 1) for example in batch]


def _compute(loaded: LoadedModel, fishers: PerExampleFishers, examples: Sequence[int]) -> None:
    batch = loaded.batch(examples)
    fishers(batch, examples, loaded.targets(batch, examples)).factors_BRD.cpu()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
