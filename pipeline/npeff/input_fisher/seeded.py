"""Random numbers of an example, which depend on nothing but the seed, its number, their use and the number of the draw.

Results therefore do not depend on batches, workers, or the order of the examples.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Use = Literal["noise", "replacement", "ties", "random attribution"]

_USES: dict[Use, int] = {"noise": 1, "replacement": 2, "ties": 3, "random attribution": 4}
"""Last word of the counter. Draws of labels (`npeff.gradients.labels`) have 0."""


def generator(seed: int, example: int, use: Use, draw: int = 0) -> np.random.Generator:
    """Return the generator of the random numbers of an example.

    Args:
        seed: The seed.
        example: The number of the example in the data set.
        use: What the numbers are for.
        draw: The number of the draw.
    """
    bits = np.random.Philox(key=np.array([seed, example], np.uint64), counter=[0, 0, draw, _USES[use]])
    return np.random.Generator(bits)
