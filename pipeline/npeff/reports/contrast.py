"""Contrast examples of a component: examples that are similar to its top examples, but do not have the component.

A contrast example has the most common prediction of the component's top examples (or label, if there are no
predictions). Its coefficient for the component is at most 1% of the largest. Its other coefficients have a large cosine
with their mean over the top examples, so the example shares the other components of the top examples.

Shapes: N examples, K components, B a block of examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.query.tables import RunTables

INACTIVE_BELOW = 0.01
_BLOCK = 8192


@dataclass(frozen=True)
class Contrast:
    """An example on which a component is not active."""

    example: int
    coefficient: float
    cosine: float
    """Cosine between its coefficients and the mean of the top examples' coefficients, without this component."""


def classes_of(tables: RunTables) -> NDArray[np.int64]:
    """Return the prediction of every example (N,), or its label if no example has a prediction; -1 if unknown."""
    table = tables.read("examples", ["example", "label", "prediction"])
    column = "label" if table["prediction"].null_count == len(table) else "prediction"
    classes_N = np.full(len(table), -1, np.int64)
    classes_N[table["example"].to_numpy()] = pc.fill_null(table[column], -1).to_numpy()
    return classes_N


def contrast_examples(
    coefficients_NK: Any, tops: Mapping[int, Sequence[int]], classes_N: NDArray[np.int64], n: int
) -> dict[int, list[Contrast]]:
    """Return the `n` contrast examples of every component with top examples, the most similar first.

    Args:
        coefficients_NK: Array-like (numpy, dask), which is read twice in blocks. Rows with NaN are invalid examples.
        tops: Top examples of each component.
        classes_N: Prediction or label of each example; -1 if unknown. If the classes of a component's top examples are
            unknown, any example can be a contrast example.
        n: Number of contrast examples of a component.
    """
    n_examples, n_components = coefficients_NK.shape
    wanted_K = np.full(n_components, -1, np.int64)
    for component, top in tops.items():
        known = [int(c) for c in classes_N[list(top)] if c >= 0]
        wanted_K[component] = Counter(known).most_common(1)[0][0] if known else -1
    profiles_KK, largest_K = _profiles(coefficients_NK, tops)
    cosines_nK = np.full((n, n_components), -1.0, np.float32)
    values_nK = np.zeros((n, n_components), np.float32)
    examples_nK = np.zeros((n, n_components), np.int64)
    for start in range(0, n_examples, _BLOCK):
        block_BK, norms_B = _block(coefficients_NK, start)
        cosines_BK = (block_BK / np.maximum(norms_B, 1e-30)[:, None]) @ profiles_KK.T
        classes_B = classes_N[start : start + _BLOCK]
        allowed_BK = (classes_B[:, None] == wanted_K) | (wanted_K < 0)
        allowed_BK &= (block_BK <= INACTIVE_BELOW * largest_K) & (norms_B > 0)[:, None]
        cosines_BK[~allowed_BK] = -1.0
        indices_BK = np.broadcast_to(np.arange(start, start + len(block_BK))[:, None], block_BK.shape)
        found = np.concatenate([cosines_nK, cosines_BK])
        best_nK = np.argsort(-found, axis=0, kind="stable")[:n]
        cosines_nK = np.take_along_axis(found, best_nK, axis=0)
        values_nK = np.take_along_axis(np.concatenate([values_nK, block_BK]), best_nK, axis=0)
        examples_nK = np.take_along_axis(np.concatenate([examples_nK, indices_BK]), best_nK, axis=0)
    return {
        component: [
            Contrast(int(example), float(value), float(cosine))
            for example, value, cosine in zip(
                examples_nK[:, component], values_nK[:, component], cosines_nK[:, component], strict=True
            )
            if cosine > 0
        ]
        for component in tops
    }


def _profiles(
    coefficients_NK: Any, tops: Mapping[int, Sequence[int]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the normalized mean (K, K) of the top examples' unit rows, and the largest coefficient (K,).

    Row k is that of component k. The coefficient of component k itself is set to 0.
    """
    n_examples, n_components = coefficients_NK.shape
    profiles_KK = np.zeros((n_components, n_components), np.float32)
    largest_K = np.zeros(n_components, np.float32)
    pairs = np.array([(e, j) for j, top in tops.items() for e in top], np.int64).reshape(-1, 2)
    for start in range(0, n_examples, _BLOCK):
        chosen = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + _BLOCK)]
        if not len(chosen):
            continue
        block_BK, norms_B = _block(coefficients_NK, start)
        rows, components = chosen[:, 0] - start, chosen[:, 1]
        np.add.at(profiles_KK, components, block_BK[rows] / np.maximum(norms_B[rows], 1e-30)[:, None])
        np.maximum.at(largest_K, components, block_BK[rows, components])
    np.fill_diagonal(profiles_KK, 0.0)
    return profiles_KK / np.maximum(np.linalg.norm(profiles_KK, axis=1, keepdims=True), 1e-30), largest_K


def _block(coefficients_NK: Any, start: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    block_BK = np.nan_to_num(np.asarray(coefficients_NK[start : start + _BLOCK], np.float32))
    return block_BK, np.linalg.norm(block_BK, axis=1)
