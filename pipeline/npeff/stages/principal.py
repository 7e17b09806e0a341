"""Principal directions of a component's top examples in the sketch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.directions import principal_direction
from npeff.store.fisher_store import FisherStore
from npeff.verification import top_examples


def stored_principal_direction(
    store: FisherStore, coefficients_N: NDArray[np.floating], among_N: NDArray[np.bool_], count: int
) -> Tensor:
    """Return the principal direction (D,), float64, of Σ_i w_i F̂_i over the examples with the largest coefficients.

    Args:
        store: The Fisher store.
        coefficients_N: Coefficients w of one component.
        among_N: Marks the examples to choose from.
        count: Largest number of examples.

    Raises:
        StoreError: A factor is missing or damaged.
    """
    top_M = top_examples(coefficients_N, among_N, count)
    factors_MRD = store.read_rows(top_M, ("factors",))["factors"]
    return principal_direction(torch.from_numpy(factors_MRD), torch.from_numpy(coefficients_N[top_M]))
