"""Maps of the components: places in a plane at which similar components are near each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.reports.cards import Card

SIDE = 460.0
_MARGIN = 26.0
_BLOCK = 16_384
_LEAST = 3
"""Least number of components of a map."""


def examples_similarity(coefficients_NK: Any) -> NDArray[np.float64]:
    """Return the cosines (K, K) of the coefficients of the components over all examples.

    Args:
        coefficients_NK: Array-like, which is read once in blocks. Rows with NaN are invalid examples.
    """
    n_examples, n_components = coefficients_NK.shape
    products_KK = np.zeros((n_components, n_components))
    for start in range(0, n_examples, _BLOCK):
        block_BK = np.nan_to_num(np.asarray(coefficients_NK[start : start + _BLOCK], np.float32))
        products_KK += block_BK.T @ block_BK
    lengths_K = np.sqrt(products_KK.diagonal())
    scale_KK = np.outer(lengths_K, lengths_K)
    cosines_KK: NDArray[np.float64] = np.zeros_like(products_KK)
    np.divide(products_KK, scale_KK, out=cosines_KK, where=scale_KK > 0)
    return cosines_KK


def _pca(similarity_KK: NDArray[np.float64]) -> NDArray[np.float64]:
    centred_KK = similarity_KK - similarity_KK.mean(axis=0)
    left_KK, values_K, _ = np.linalg.svd(centred_KK)
    places: NDArray[np.float64] = left_KK[:, :2] * values_K[:2]
    return places


def _t_sne(similarity_KK: NDArray[np.float64]) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE  # importing it takes a second

    distances_KK = np.clip(1 - similarity_KK, 0, 1)
    np.fill_diagonal(distances_KK, 0)
    perplexity = min(15.0, (len(distances_KK) - 1) / 3)
    # scikit-learn's own rate is at least 50, with which few points fly apart
    rate = max(5.0, len(distances_KK) / 12)
    made = TSNE(metric="precomputed", init="random", perplexity=perplexity, learning_rate=rate, random_state=0)
    places: NDArray[np.float64] = made.fit_transform(distances_KK).astype(np.float64)
    return places


METHODS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {"pca": _pca, "tsne": _t_sne}


def placed(similarity_KK: NDArray[np.float64], method: str) -> NDArray[np.float64]:
    """Return the places (K, 2) of the components by principal components, or by t-SNE of scikit-learn.

    Args:
        similarity_KK: Similarities of at least three components, between 0 and 1.
        method: One of `METHODS`.
    """
    return METHODS[method](similarity_KK)


@dataclass(frozen=True)
class Point:
    """A component on the map, in SVG user units."""

    component: int
    x: float
    y: float
    radius: float
    verdict: str
    """Class of the style: whether the component is above the controls."""
    label: str


@dataclass(frozen=True)
class ComponentMap:
    """A map to draw."""

    side: float
    points: list[Point]


def component_map(places_K2: NDArray[np.float64], cards: list[Card], labels: list[str]) -> ComponentMap:
    """Return the map of some components.

    Args:
        places_K2: Places of all components.
        cards: The components to draw.
        labels: What is said about each of them.
    """
    low, high = places_K2.min(axis=0), places_K2.max(axis=0)
    unit = (SIDE - 2 * _MARGIN) / max(float((high - low).max()), 1e-12)
    middle = (low + high) / 2
    most = max((card.row["mass"] for card in cards), default=0.0) or 1.0
    points = []
    for card, label in zip(cards, labels, strict=True):
        x, y = (SIDE / 2 + unit * (places_K2[card.component] - middle)).round(1).tolist()
        points.append(
            Point(card.component, x, y, round(4 + 9 * (card.row["mass"] / most) ** 0.5, 1), _verdict(card), label)
        )
    return ComponentMap(SIDE, sorted(points, key=lambda point: -point.radius))


def can_be_drawn(n_components: int) -> bool:
    """Return whether a map of this many components can be drawn."""
    return n_components >= _LEAST


def _verdict(card: Card) -> str:
    passed, judged = card.passed
    if not judged:
        return "unknown"
    return "good" if passed == judged else "mixed" if passed else "poor"
