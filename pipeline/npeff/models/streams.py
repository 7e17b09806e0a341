"""Streams: concurrent batches of Fishers on a worker with several cores.

Most operations of a pass over a batch are too small to be split efficiently, and Python code runs between them. It is
therefore faster to compute several batches concurrently, each on a part of the cores, than one batch after another on
all cores. Each stream is a thread with a copy of the modules, because a watched module can take part in only one pass
at a time. The copies share the parameters. A GPU computes one batch at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from npeff.fisher import PerExampleFishers
from npeff.gradients import frozen
from npeff.models.loaded import LoadedModel

Result = TypeVar("Result")

_MAX_STREAMS = 4
"""Each stream needs the memory of a batch. More streams would wait for the Python interpreter."""
_TOLERANCE = 1e-4
"""Tolerance relative to the norm of the factors. It is above rounding and far below the contribution of any layer."""


def n_streams(loaded: LoadedModel) -> int:
    """Return the number of batches that a worker computes concurrently.

    There is one for a divided model, whose copies would not share the parameters in memory.
    """
    several = loaded.device.type == "cpu" and loaded.shards is None
    return min(_MAX_STREAMS, torch.get_num_threads()) if several else 1


class Streams:
    """The streams of a worker. Use them only on the thread that created them."""

    def __init__(self, loaded: LoadedModel, fishers: PerExampleFishers) -> None:
        self._loaded, self._first = loaded, fishers
        self._all: list[PerExampleFishers] | None = None

    def map(
        self, compute: Callable[[PerExampleFishers, Any, list[int]], Result], plan: Sequence[list[int]]
    ) -> Iterator[Result]:
        """Yield ``compute(fishers, batch, examples)`` for every batch of the plan, in the order of the plan.

        While batches are computed, the next batch is tokenized, collated and moved to the device.
        """
        with frozen(self._first.collector.model):
            yield from self._mapped(compute, plan)

    def _mapped(
        self, compute: Callable[[PerExampleFishers, Any, list[int]], Result], plan: Sequence[list[int]]
    ) -> Iterator[Result]:
        self._all = self._all or self._created(plan)
        batches = prefetched(self._loaded, plan)
        if not self._all or len(self._all) == 1:
            for examples, batch in batches:
                yield compute(self._first, batch, examples)
            return
        n_threads = torch.get_num_threads()
        free: SimpleQueue[PerExampleFishers] = SimpleQueue()
        for stream in self._all:
            free.put(stream)

        def computed(batch: Any, examples: list[int]) -> Result:
            stream = free.get()
            try:
                return compute(stream, batch, examples)
            finally:
                free.put(stream)

        running: deque[Future[Result]] = deque()
        each = -(-n_threads // len(self._all))
        try:
            with ThreadPoolExecutor(len(self._all), "stream", torch.set_num_threads, (each,)) as pool:
                for examples, batch in batches:
                    if len(running) == len(self._all):
                        yield running.popleft().result()
                    running.append(pool.submit(computed, batch, examples))
                while running:
                    yield running.popleft().result()
        finally:
            torch.set_num_threads(n_threads)  # new threads inherit the number that any thread has set

    def _created(self, plan: Sequence[list[int]]) -> list[PerExampleFishers] | None:
        """Create the streams. Return None if all tested examples are invalid.

        There is only one stream if a module has no layer rule, or if a copy of the modules fails or gives other
        results (a copy may hold a function that calls the original modules). The first stream's collector inspects the
        model here with two examples, which is cheaper than with a batch.
        """
        for batch_examples in plan:
            examples = [batch_examples[-1], *batch_examples[:1]][: len(batch_examples)]
            batch, targets = self._loaded.with_targets(examples)
            if n_streams(self._loaded) == 1:
                self._first.collector.inspect(batch, examples, targets)
                return [self._first]
            expected = self._first.collector.collect(batch, examples, targets)
            expected_BRD = self._first.factors(expected).factors_BRD
            if bool(expected_BRD.any()):
                break
        else:
            return None
        if not self._first.collector.has_rules:
            return [self._first]
        try:
            replicas = [self._first.replica() for _ in range(n_streams(self._loaded) - 1)]
            found = replicas[0].collector.collect(batch, examples, targets) if replicas else expected
            found_BRD = self._first.factors(found).factors_BRD
        except Exception:
            return [self._first]
        if found.contributions.keys() != expected.contributions.keys():
            return [self._first]
        same = torch.linalg.norm(found_BRD - expected_BRD) <= _TOLERANCE * torch.linalg.norm(expected_BRD)
        return [self._first, *replicas] if same else [self._first]


def prefetched(loaded: LoadedModel, plan: Sequence[list[int]]) -> Iterator[tuple[list[int], Any]]:
    """Yield every batch of the plan. A thread tokenizes, collates and moves the next batch to the device meanwhile."""
    with ThreadPoolExecutor(1, "loader") as loader:
        waiting = loader.submit(loaded.batch, plan[0]) if plan else None
        for place, examples in enumerate(plan):
            assert waiting is not None
            batch = waiting.result()
            if place + 1 < len(plan):
                waiting = loader.submit(loaded.batch, plan[place + 1])
            yield examples, batch
