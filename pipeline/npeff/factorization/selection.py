"""Selection of the number of components: the search, the comparison of fits, and the recommendation.

Two criteria are computed for each number K: the explained variance of held-out examples, with refitted coefficients,
and the number of components that are reproduced by fits with other seeds and on other examples. The rank-1
matrices of two unit components g and h overlap by ⟨ggᵀ, hhᵀ⟩ = cos²(g, h). For the K pairs of the best matching between
two fits,

    balance = Σ_j (2 cos²_j − 1).

The balance is K if all components are reproduced and −K if none is. It increases with K as long as more of the added
components are reproduced than not. With more components than the data support, the added components fit noise, which
differs between the halves of the examples, and the balance decreases.

The components of all fits are clustered such that each cluster has one component of each fit. The silhouettes of the
clusters are those of NMFk (Alexandrov & Stanev), with distance 1 − |cos|.

Shapes: N examples, K components, F fits, D sketch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # imports its subpackages on first use, which takes half a second for scipy.optimize

from npeff.factorization.matching import match_components

REPRODUCED = 0.9
"""A component is reproduced by another fit if its |cos| with the matched component is at least this."""

_IMMATERIAL = 0.2
"""Added components are immaterial if each explains less than this fraction of the mean of the previous ones."""

_CLIFF = 0.4
"""Added components are as good as the previous ones if each explains more than this fraction of their mean."""

_NEARLY_ALL = 0.8
"""Balance per component at which almost all components are reproduced."""

_FINENESS = 32
"""The search ends if the tried neighbors of the recommended K are at most max(1, K over this) away."""

_CLUSTERING_ROUNDS = 20


@dataclass(frozen=True)
class FitComparison:
    """A comparison of the fits with one number of components: a row of the table `selection`."""

    n_components: int
    n_fits: int
    explained: float
    """Explained fraction of the fitted examples: the mean over the fits, as for `explained_held_out`."""
    explained_held_out: float
    """1 − loss / Σ_i ‖F̂_i‖² on examples that are not in the fit, at their optimal coefficients."""
    explained_held_out_sd: float | None
    """Standard deviation over the fits; None for a single fit."""
    cosine_seeds: float | None
    """Mean |cos| of matched components of fits of the same examples with different seeds; None for a single seed."""
    cosine_halves: float
    """Mean |cos| of matched components of the fits of two halves of the examples."""
    n_come_back: float
    """Number of components with a matched |cos| ≥ `REPRODUCED`: the smaller mean over pairs of seeds or of halves."""
    balance: float
    """Σ_j (2 cos²_j − 1): the smaller mean over pairs of seeds or of halves."""
    silhouette_mean: float | None
    silhouette_min: float | None
    """Mean and minimum over the clusters; None for a single component."""


@dataclass(frozen=True)
class Recommendation:
    n_components: int
    sharp: bool
    """Whether the data determine the number clearly; otherwise it is a compromise."""
    reason: str


def split_halves(n_examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two disjoint random halves of 0..N−1, ascending, int64. If N is odd, one index is left out."""
    order = np.random.default_rng([seed, n_examples]).permutation(n_examples).astype(np.int64)
    half = n_examples // 2
    return np.sort(order[:half]), np.sort(order[half : 2 * half])


def compare_fits(
    seeds: Sequence[np.ndarray],
    halves: Sequence[tuple[np.ndarray, np.ndarray]],
    explained: Sequence[float],
    explained_held_out: Sequence[float],
) -> FitComparison:
    """Compare the fits with one number of components.

    Args:
        seeds: components (K, D) of fits of the same examples, at least one.
        halves: pairs of components (K, D), one pair for the two halves of each split, at least one.
        explained: explained fraction of the fitted examples, for each fit.
        explained_held_out: explained fraction of examples that are not in the fit, for each fit.
    """
    of_seeds = [match_components(a, b)[1] for a, b in itertools.combinations(seeds, 2)]
    of_halves = [match_components(a, b)[1] for a, b in halves]
    groups = [np.stack(cosines) for cosines in (of_seeds, of_halves) if cosines]
    fits_FKD = np.stack([*seeds, *itertools.chain.from_iterable(halves)])
    clusters_K = silhouettes(fits_FKD, cluster_components(fits_FKD)) if fits_FKD.shape[1] > 1 else None
    return FitComparison(
        n_components=fits_FKD.shape[1],
        n_fits=len(fits_FKD),
        explained=float(np.mean(explained)),
        explained_held_out=float(np.mean(explained_held_out)),
        explained_held_out_sd=float(np.std(explained_held_out, ddof=1)) if len(explained_held_out) > 1 else None,
        cosine_seeds=float(np.mean(of_seeds)) if of_seeds else None,
        cosine_halves=float(np.mean(of_halves)),
        n_come_back=min(float((cosines >= REPRODUCED).sum(axis=1).mean()) for cosines in groups),
        balance=min(float((2 * cosines**2 - 1).sum(axis=1).mean()) for cosines in groups),
        silhouette_mean=None if clusters_K is None else float(clusters_K.mean()),
        silhouette_min=None if clusters_K is None else float(clusters_K.min()),
    )


def stability(components_KD: np.ndarray, refits: Sequence[np.ndarray]) -> np.ndarray:
    """Return the |cos| (K,) of each component with its match in another fit (K, D), averaged over the other fits."""
    result: np.ndarray = np.mean([match_components(components_KD, refit)[1] for refit in refits], axis=0)
    return result


def cluster_components(fits_FKD: np.ndarray) -> np.ndarray:
    """Cluster the components of several fits.

    The algorithm is k-means with exactly one component of each fit in each cluster. The Hungarian algorithm assigns
    components to centroids. A centroid is the leading eigenvector of Σ hhᵀ of its members, because their signs are
    arbitrary. The initial centroids are the components of the first fit. The algorithm stops when no label changes.

    Returns:
        Labels (F, K), each row a permutation of 0..K−1.
    """
    n_fits, n_components, _ = fits_FKD.shape
    labels_FK = np.tile(np.arange(n_components), (n_fits, 1))
    centroids_KD = fits_FKD[0]
    for _ in range(_CLUSTERING_ROUNDS):
        before_FK = labels_FK.copy()
        for fit, components_KD in enumerate(fits_FKD):
            rows, columns = scipy.optimize.linear_sum_assignment(np.abs(components_KD @ centroids_KD.T), maximize=True)
            labels_FK[fit, rows] = columns
        members_KFD = np.stack([fits_FKD[f, np.argsort(labels_FK[f])] for f in range(n_fits)], axis=1)
        centroids_KD = np.linalg.svd(members_KFD, full_matrices=False)[2][:, 0]
        if (labels_FK == before_FK).all():
            break
    return labels_FK


def silhouettes(fits_FKD: np.ndarray, labels_FK: np.ndarray) -> np.ndarray:
    """Return the mean silhouette (K,) of the members of each cluster, with distance 1 − |cos| (Rousseeuw 1987).

    The value is 1 if the members are equal and orthogonal to all other components, and 0 if another cluster is equally
    near.
    """
    from sklearn.metrics import silhouette_samples  # imported here because the import takes a second

    flat = fits_FKD.reshape(-1, fits_FKD.shape[2])
    distances = np.clip(1 - np.abs(flat @ flat.T), 0, None)
    np.fill_diagonal(distances, 0)
    found = silhouette_samples(distances, labels_FK.ravel(), metric="precomputed")
    return np.bincount(labels_FK.ravel(), weights=found) / len(fits_FKD)


def search(
    tried: Iterable[int], gather: Callable[[list[int]], list[FitComparison]]
) -> tuple[list[FitComparison], Recommendation]:
    """Search for the number of components: try the given numbers, then numbers between the best and its neighbors.

    Args:
        tried: numbers of components to start with.
        gather: returns the comparisons for the given numbers of components.

    Returns:
        rows: the comparisons, sorted by number of components.
        recommendation: the recommended number.
    """
    rows = sorted(gather(sorted(set(tried))), key=lambda row: row.n_components)
    while True:
        recommended = recommend(rows)
        between = next_to_try([row.n_components for row in rows], recommended.n_components)
        if not between:
            return rows, recommended
        rows = sorted([*rows, *gather(between)], key=lambda row: row.n_components)


def next_to_try(tried: Sequence[int], best: int) -> list[int]:
    """Return the midpoints between the best number and its tried neighbors, except for neighbors that are near."""
    near = max(1, best // _FINENESS)
    below = max((k for k in tried if k < best), default=best)
    above = min((k for k in tried if k > best), default=best)
    return [(best + other) // 2 for other in (below, above) if abs(other - best) > near]


def recommend(rows: Sequence[FitComparison]) -> Recommendation:
    """Recommend the number of components with the largest balance, up to the saturation of the explained variance.

    The explained variance is saturated at the smallest K for which, up to every larger number tried, each added
    component explains less than `_IMMATERIAL` of the mean of the first K components. Components beyond that point may
    be reproduced, for example if they are artifacts of the data, but explain little.
    """
    rows = sorted(rows, key=lambda row: row.n_components)
    saturated = next(i for i in range(len(rows)) if _saturated(rows, i))
    best = max(range(saturated + 1), key=lambda i: (rows[i].balance, -i))
    sharp = (
        best == saturated < len(rows) - 1
        and (best == 0 or _gain(rows[best - 1], rows[best]) > _CLIFF)
        and rows[best].balance >= _NEARLY_ALL * rows[best].n_components
    )
    return Recommendation(rows[best].n_components, sharp, _reason(rows, best, saturated, sharp))


def _gain(low: FitComparison, high: FitComparison) -> float:
    """Return what each added component explains, divided by the mean of the components of the smaller number."""
    added = (high.explained_held_out - low.explained_held_out) / (high.n_components - low.n_components)
    average = low.explained_held_out / low.n_components
    return added / average if average > 0 else float(added > 0)


def _saturated(rows: Sequence[FitComparison], i: int) -> bool:
    return all(_gain(rows[i], larger) < _IMMATERIAL for larger in rows[i + 1 :])


def _reason(rows: Sequence[FitComparison], best: int, saturated: int, sharp: bool) -> str:
    chosen, number = rows[best], rows[best].n_components
    found = (
        f"{number} components explain {chosen.explained_held_out:.3f} of held-out examples, and "
        f"{chosen.n_come_back:.1f} of them are reproduced (|cos| ≥ {REPRODUCED}) with other seeds and halves"
    )
    if best == len(rows) - 1:
        return f"{found}; this is the largest number tried: try larger numbers, which may be better"
    above = rows[best + 1]
    if sharp:
        fewer = f"{rows[best - 1].n_components} explain {rows[best - 1].explained_held_out:.3f}, " if best else ""
        return (
            f"{found}; {fewer}{above.n_components} explain {above.explained_held_out:.3f}, and "
            f"{above.n_come_back:.1f} of these are reproduced: the added components fit noise"
        )
    if best < saturated:
        most = rows[saturated]
        return (
            f"{found}; {most.n_components} explain {most.explained_held_out:.3f}, but only "
            f"{most.n_come_back:.1f} of these are reproduced: no number is clearly right, and "
            "this one has the best balance of components that are reproduced"
        )
    return (
        f"{found}; each added component explains less than {_IMMATERIAL:.0%} of the mean of these, but the explained "
        f"variance still increases ({above.explained_held_out:.3f} with {above.n_components}): no number is clearly "
        "right, and this one is a compromise"
    )
