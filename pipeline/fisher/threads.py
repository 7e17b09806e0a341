"""Many small pieces of work on several cores: a thread for each core, with whole pieces, one operation at a time.

What follows a backward pass is hundreds of operations too small to be worth splitting. The pieces are always the same
ones, whatever the number of threads, so that results are too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(piece: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """``[piece(item) for item in items]``, without gradients, on as many threads as torch uses on the CPU."""
    n_threads = torch.get_num_threads()

    def without_gradients(item: Item) -> Result:
        with torch.no_grad():
            return piece(item)

    if device.type != "cpu" or n_threads == 1 or len(items) < 2:
        return [without_gradients(item) for item in items]
    return list(_threads(n_threads).map(without_gradients, items))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(count, "fisher", initializer=torch.set_num_threads, initargs=(1,))
    # Each sets its own number, and with it the one that further threads of the process would begin with.
    for started in [pool.submit(int) for _ in range(count)]:
        started.result()
    torch.set_num_threads(count)
    return pool
