"""Controls for the KL ratio of a component.

(a) The ratio of the mean traces of the Fishers. Predictions on examples with large Fishers change under any step, so
    the KL ratio is informative only if it exceeds the ratio of the traces. With a matched baseline
    (`npeff.verification.matching`), this ratio is near 1.
(b) `random_direction`: a random direction with the same norm in every tensor. It excludes the layer and the size of the
    step as explanations of the ratio.
(c) `another_component`: the direction of another component on the same examples. It excludes that the direction of any
    component would give the ratio.
(d) Held-out examples. The caller chooses them, and compares within each split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def top_examples(coefficients_N: NDArray[np.floating], among: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Select the examples with the largest positive coefficients.

    Args:
        coefficients_N: Coefficients of one component. NaN counts as 0.
        among: Marks the examples to choose from.
        count: Maximum number of examples.

    Returns:
        Positions of the examples by descending coefficient. Ties are ordered by position.
    """
    candidates = np.flatnonzero(among & (np.nan_to_num(coefficients_N) > 0))
    order = np.argsort(-coefficients_N[candidates], kind="stable")
    return candidates[order[:count]]


def baseline_examples(among: NDArray[np.bool_], without: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Draw at most ``count`` random examples that are marked in ``among`` and are not in ``without``.

    Returns:
        Positions of the examples in ascending order; fewer than ``count`` if there are not enough examples.
    """
    candidates = np.setdiff1d(np.flatnonzero(among), without)
    return np.sort(np.random.default_rng(seed).permutation(candidates)[:count])


def another_component(component: int, among: Sequence[int], seed: int) -> int | None:
    """Draw control (c): a random component of ``among`` other than ``component``; None if there is no other."""
    others = [other for other in among if other != component]
    return others[int(np.random.default_rng(seed).integers(len(others)))] if others else None


def random_direction(direction: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw control (b): a Gaussian direction with the same norm as ``direction`` in every tensor."""
    drawn = {}
    for name, tensor in direction.items():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        norm = tensor.double().norm()
        drawn[name] = (noise * (norm.cpu() / noise.norm().clamp_min(1e-300))).to(tensor)
    return drawn
