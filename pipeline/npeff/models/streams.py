"""Batches of Fishers, several at a time on a worker with several cores.

Most operations of a pass over a batch are too small to be worth splitting, and Python runs between them: whole batches
on a share of the cores each, beside one another, beat one batch after the other on all of them. Every stream of batches
is a thread with modules of its own, because a watched module can be in one pass only; only their parameters are shared.
A GPU computes one batch at a time.
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

_MOST = 4
"""Each stream holds what a batch needs; with more of them Python is what they would wait for."""
_EQUAL = 1e-4
"""Relative to the factors' norm: above rounding, far below the share of any layer that was missed."""


def n_streams(device: torch.device) -> int:
    """How many batches a worker computes at a time."""
    return min(_MOST, torch.get_num_threads()) if device.type == "cpu" else 1


class Streams:
    """The streams of a worker, to be used on the thread that made it."""

    def __init__(self, loaded: LoadedModel, fishers: PerExampleFishers) -> None:
        self._loaded, self._first = loaded, fishers
        self._all: list[PerExampleFishers] | None = None

    def map(
        self, compute: Callable[[PerExampleFishers, Any, list[int]], Result], plan: Sequence[list[int]]
    ) -> Iterator[Result]:
        """``compute(fishers, batch, examples)`` for every batch of the plan, in its order.

        The batch after those that are computed is tokenized, collated and sent to the device meanwhile.
        """
        with frozen(self._first.collector.model):
            yield from self._mapped(compute, plan)

    def _mapped(
        self, compute: Callable[[PerExampleFishers, Any, list[int]], Result], plan: Sequence[list[int]]
    ) -> Iterator[Result]:
        self._all = self._all or self._found(plan)
        batches = ready_ahead(self._loaded, plan)
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
            torch.set_num_threads(n_threads)  # what a thread sets is also what further threads begin with

    def _found(self, plan: Sequence[list[int]]) -> list[PerExampleFishers] | None:
        """As many streams as there may be; None if all examples that were tried are invalid.

        The first is alone where a layer has no rule of its own, and where a copy of the modules does not give the same
        results: it may hold a function that calls the modules it was copied from, or refuse to be made. The model is
        learnt here, from two examples, which costs less than from a batch.
        """
        for batch_examples in plan:
            examples = [batch_examples[-1], *batch_examples[:1]][: len(batch_examples)]
            batch = self._loaded.batch(examples)
            targets = self._loaded.targets(batch, examples)
            if n_streams(self._loaded.device) == 1:
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
            replicas = [self._first.replica() for _ in range(n_streams(self._loaded.device) - 1)]
            found = replicas[0].collector.collect(batch, examples, targets) if replicas else expected
            found_BRD = self._first.factors(found).factors_BRD
        except Exception:
            return [self._first]
        if found.contributions.keys() != expected.contributions.keys():
            return [self._first]
        same = torch.linalg.norm(found_BRD - expected_BRD) <= _EQUAL * torch.linalg.norm(expected_BRD)
        return [self._first, *replicas] if same else [self._first]


def ready_ahead(loaded: LoadedModel, plan: Sequence[list[int]]) -> Iterator[tuple[list[int], Any]]:
    """Every batch of the plan, the next one being tokenized, collated and sent to the device meanwhile."""
    with ThreadPoolExecutor(1, "loader") as loader:
        waiting = loader.submit(loaded.batch, plan[0]) if plan else None
        for place, examples in enumerate(plan):
            assert waiting is not None
            batch = waiting.result()
            if place + 1 < len(plan):
                waiting = loader.submit(loaded.batch, plan[place + 1])
            yield examples, batch
