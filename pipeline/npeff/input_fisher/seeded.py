"""Random numbers of an example, which depend on nothing but the seed, its number, their use and the number of the draw.

Results therefore do not depend on batches, workers, or the order of the examples.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Use = Literal["noise", "replacement", "ties", "random attribution"]

_USES: dict[Use, int] = {"noise": 1, "replacement": 2, "ties": 3, "random attribution": 4}
"""Last word of the counter. Draws of labels have 0."""


class SeededNumbers:
    """Generators of the random numbers of examples.

    They are those of ``Philox(key=[seed, example], counter=[0, 0, draw, use])``. A new Philox takes 10 µs, which is as
    long as the passes of a small network. Setting the state of one takes 1 µs.

    Args:
        seed: The seed.
        use: What the numbers are for.
    """

    def __init__(self, seed: int, use: Use) -> None:
        self._key = np.array([seed, 0], np.uint64)
        self._counter = np.array([0, 0, 0, _USES[use]], np.uint64)
        self._bits = np.random.Philox(key=self._key, counter=self._counter)
        self._fresh = self._bits.state | {"state": {"counter": self._counter, "key": self._key}}
        self._generator = np.random.Generator(self._bits)

    def at(self, example: int, draw: int = 0) -> np.random.Generator:
        """Return the generator of an example and draw. It is valid until the next call.

        Args:
            example: The number of the example in the data set.
            draw: The number of the draw.
        """
        self._key[1], self._counter[2] = example, draw
        self._bits.state = self._fresh
        return self._generator
