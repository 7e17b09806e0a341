"""What a KL ratio must be compared with before it means anything.

(a) the ratio of mean Fisher norms: examples with large Fishers move whatever the direction; a component says more than
its examples' norms only if its KL ratio is larger than theirs. (b) `random_direction`: a direction drawn at random with
the same norm in every tensor, so that neither the layer nor the size of the step explains the ratio. (c)
`another_component`: its direction on these examples; any component's would do if it were not this one that they share.
(d) held-out examples are chosen by the caller, with `baseline_examples` for both sides of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def top_examples(coefficients_N: NDArray[np.floating], among: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Positions of the ``count`` largest positive coefficients of marked examples, descending; ties by position."""
    candidates = np.flatnonzero(among & (np.nan_to_num(coefficients_N) > 0))
    order = np.argsort(-coefficients_N[candidates], kind="stable")
    return candidates[order[:count]]


def baseline_examples(among: NDArray[np.bool_], without: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """``count`` marked examples drawn at random, none of them in ``without``; all there are where they are fewer."""
    candidates = np.setdiff1d(np.flatnonzero(among), without)
    return np.sort(np.random.default_rng(seed).permutation(candidates)[:count])


def another_component(component: int, among: Sequence[int], seed: int) -> int | None:
    """Control (c): one of the other components, at random, of those named; None where there is no other."""
    others = [other for other in among if other != component]
    return others[int(np.random.default_rng(seed).integers(len(others)))] if others else None


def random_direction(direction: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Control (b): a Gaussian direction with the norm that ``direction`` has in every tensor."""
    drawn = {}
    for name, tensor in direction.items():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        norm = tensor.double().norm()
        drawn[name] = (noise * (norm.cpu() / noise.norm().clamp_min(1e-300))).to(tensor)
    return drawn
