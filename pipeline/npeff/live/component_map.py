"""Maps of the components: places in a plane at which similar components are near each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.reports.cards import Card

WIDTH, HEIGHT = 820.0, 440.0
"""Largest width, and height, of a map in SVG user units. A map is as wide as its points need."""
_MARGIN = 26.0
_DIGIT, _UP = 7.0, 4.5
"""Width of a digit, and half of its height."""
_BLOCK = 16_384
_LEAST = 3
"""Least number of components of a map."""

_Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a rectangle."""


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
class Number:
    """Where the number of a component is written, in SVG user units."""

    x: float
    y: float
    anchor: str


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
    number: Number | None
    """Where its number is written; None if every place would cover another number or point."""


@dataclass(frozen=True)
class ComponentMap:
    """A map to draw."""

    width: float
    height: float
    points: list[Point]


def component_map(places_K2: NDArray[np.float64], cards: list[Card], labels: list[str]) -> ComponentMap:
    """Return the map of some components.

    Args:
        places_K2: Places of all components.
        cards: The components to draw.
        labels: What is said about each of them.
    """
    size_2 = np.array([WIDTH, HEIGHT])
    low, high = places_K2.min(axis=0), places_K2.max(axis=0)
    unit = float(((size_2 - 2 * _MARGIN) / np.maximum(high - low, 1e-12)).min())  # distances have one scale
    width = float(np.round(np.clip(unit * (high - low)[0] + 2 * _MARGIN, HEIGHT, WIDTH)))
    middle, centre_2 = (low + high) / 2, np.array([width, HEIGHT]) / 2
    most = max((card.row["mass"] for card in cards), default=0.0) or 1.0
    points = []
    for card, label in zip(cards, labels, strict=True):
        x, y = (centre_2 + unit * (places_K2[card.component] - middle)).round(1).tolist()
        radius = round(4 + 9 * (card.row["mass"] / most) ** 0.5, 1)
        points.append(Point(card.component, x, y, radius, _verdict(card), label, None))
    return ComponentMap(width, HEIGHT, _numbered(sorted(points, key=lambda point: -point.radius)))


def _numbered(points: list[Point]) -> list[Point]:
    """Return the points with places of their numbers, beside the points and clear of each other and of other points.

    Args:
        points: The points, those that are more important first.
    """
    found, n_points = [], len(points)
    boxes = np.full((2 * n_points, 4), np.nan)  # of the points and of their numbers; NaN overlaps nothing
    for k, point in enumerate(points):
        boxes[k] = _box(point.x, point.y, point.radius, point.radius)
    for k, point in enumerate(points):
        others = np.delete(boxes, k, axis=0)
        free = ((box, place) for box, place in _beside(point) if not _overlap(box, others))
        box, number = next(free, (boxes[n_points + k], None))
        boxes[n_points + k] = box
        found.append(replace(point, number=number))
    return found


def _beside(point: Point) -> list[tuple[_Box, Number]]:
    """Return the places for the number of a point, the preferred one first: above, below, right and left of it."""
    half, away = _DIGIT * len(str(point.component)) / 2, point.radius + 3
    x, y = point.x, point.y
    places = [(x, y - away - _UP, "middle"), (x, y + away + _UP, "middle")]
    places += [(x + away + half, y, "start"), (x - away - half, y, "end")]
    found = []
    for centre_x, centre_y, anchor in places:
        at = {"middle": centre_x, "start": centre_x - half, "end": centre_x + half}[anchor]
        box = _box(centre_x, centre_y, half, _UP)
        found.append((box, Number(round(at, 1), round(centre_y + _UP, 1), anchor)))
    return found


def _box(x: float, y: float, half_width: float, half_height: float) -> _Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlap(box: _Box, others: NDArray[np.float64]) -> bool:
    left, top, right, bottom = others.T
    return bool(((box[0] < right) & (left < box[2]) & (box[1] < bottom) & (top < box[3])).any())


def can_be_drawn(n_components: int) -> bool:
    """Return whether a map of this many components can be drawn."""
    return n_components >= _LEAST


def _verdict(card: Card) -> str:
    passed, judged = card.passed
    if not judged:
        return "unknown"
    return "good" if passed == judged else "mixed" if passed else "poor"
