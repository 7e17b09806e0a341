"""How many components: which numbers are tried, what their fits say, and which of them is recommended.

Two things are asked of every number K. Do its components explain examples that they were not fitted on, the
coefficients of these refitted? And do the same components come back from other seeds and from other examples? Two unit
components g and h, as the rank-1 matrices that they are, overlap by ⟨ggᵀ, hhᵀ⟩ = cos²(g, h). Summed over the K pairs of
the best matching, K components of two fits have

    balance = Σ_j (2 cos²_j − 1):

K if all come back, −K if none does, and it rises with K as long as more of the components added come back than not.
Beyond what the data support, further components fit noise, which no other half of the examples shares, and it falls.

Silhouettes of the components of all fits, clustered so that each cluster has one component of every fit, are those of
NMFk (Alexandrov & Stanev), with distance 1 − |cos|.

Shapes: N examples, K components, F fits, D sketch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from npeff.factorization.matching import match_components

COMES_BACK = 0.9
"""|cos| of a component with its match in another fit, from which on it counts as the same."""

_IMMATERIAL = 0.2
"""A further component that explains less than this fraction of what those so far do on average adds nothing much."""

_CLIFF = 0.4
"""... and one that explains more than this fraction of it is as good as they are."""

_ALL_COME_BACK = 0.8
"""Balance per component at which all of them, but for the odd one, come back."""

_FINENESS = 32
"""The neighbours tried of the recommended K are nearer than K over this, or next to it."""

_CLUSTERING_ROUNDS = 20


@dataclass(frozen=True)
class Evidence:
    """What the fits with one number of components say of it: a row of the table `selection`."""

    n_components: int
    n_fits: int
    explained: float
    """Mean over the fits of all examples; as `explained_held_out`."""
    explained_held_out: float
    """1 − loss / Σ_i ‖F̂_i‖² on examples that took no part, with the coefficients that are optimal for them."""
    explained_held_out_sd: float | None
    """Standard deviation over the fits; None of a single one."""
    cosine_seeds: float | None
    """Mean matched |cos| of fits of the same examples from different seeds; None with a single seed."""
    cosine_halves: float
    """Mean matched |cos| of the fits of two halves of the examples."""
    n_come_back: float
    """Components with a matched |cos| ≥ `COMES_BACK`: the mean over pairs of seeds, or of halves, the less."""
    balance: float
    """Σ_j (2 cos²_j − 1): the mean over pairs of seeds, or of halves, the less."""
    silhouette_mean: float | None
    silhouette_min: float | None
    """Over the clusters; None of a single component."""


@dataclass(frozen=True)
class Recommendation:
    n_components: int
    sharp: bool
    """Whether the data say so clearly, or it is a compromise."""
    reason: str


def split_halves(n_examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint random halves of 0..N−1, ascending, int64; of an odd number one is left out."""
    order = np.random.default_rng([seed, n_examples]).permutation(n_examples).astype(np.int64)
    half = n_examples // 2
    return np.sort(order[:half]), np.sort(order[half : 2 * half])


def evidence(
    seeds: Sequence[np.ndarray],
    halves: Sequence[tuple[np.ndarray, np.ndarray]],
    explained: Sequence[float],
    explained_held_out: Sequence[float],
) -> Evidence:
    """Compare the fits with one number of components.

    Args:
        seeds: components (K, D) of fits of the same examples, at least one.
        halves: pairs of components (K, D), each of the two halves of one split, at least one.
        explained: of the fits that this speaks of.
        explained_held_out: of examples that they were not fitted on.
    """
    of_seeds = [match_components(a, b)[1] for a, b in itertools.combinations(seeds, 2)]
    of_halves = [match_components(a, b)[1] for a, b in halves]
    groups = [np.stack(cosines) for cosines in (of_seeds, of_halves) if cosines]
    fits_FKD = np.stack([*seeds, *itertools.chain.from_iterable(halves)])
    clusters_K = silhouettes(fits_FKD, cluster_components(fits_FKD)) if fits_FKD.shape[1] > 1 else None
    return Evidence(
        n_components=fits_FKD.shape[1],
        n_fits=len(fits_FKD),
        explained=float(np.mean(explained)),
        explained_held_out=float(np.mean(explained_held_out)),
        explained_held_out_sd=float(np.std(explained_held_out, ddof=1)) if len(explained_held_out) > 1 else None,
        cosine_seeds=float(np.mean(of_seeds)) if of_seeds else None,
        cosine_halves=float(np.mean(of_halves)),
        n_come_back=min(float((cosines >= COMES_BACK).sum(axis=1).mean()) for cosines in groups),
        balance=min(float((2 * cosines**2 - 1).sum(axis=1).mean()) for cosines in groups),
        silhouette_mean=None if clusters_K is None else float(clusters_K.mean()),
        silhouette_min=None if clusters_K is None else float(clusters_K.min()),
    )


def stability(components_KD: np.ndarray, refits: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over other fits (K, D) of the |cos| of each component with its match there (K,)."""
    result: np.ndarray = np.mean([match_components(components_KD, refit)[1] for refit in refits], axis=0)
    return result


def cluster_components(fits_FKD: np.ndarray) -> np.ndarray:
    """Clusters of the components of several fits: labels (F, K), each row a permutation of 0..K−1.

    As k-means, but that every cluster takes exactly one component of every fit: components are assigned to the
    centroids by the Hungarian algorithm, and a centroid is the leading eigenvector of Σ hhᵀ of its members, as their
    signs mean nothing. It begins at the first fit and stops when nothing changes.
    """
    n_fits, n_components, _ = fits_FKD.shape
    labels_FK = np.tile(np.arange(n_components), (n_fits, 1))
    centroids_KD = fits_FKD[0]
    for _ in range(_CLUSTERING_ROUNDS):
        before_FK = labels_FK.copy()
        for fit, components_KD in enumerate(fits_FKD):
            rows, columns = linear_sum_assignment(np.abs(components_KD @ centroids_KD.T), maximize=True)
            labels_FK[fit, rows] = columns
        members_KFD = np.stack([fits_FKD[f, np.argsort(labels_FK[f])] for f in range(n_fits)], axis=1)
        centroids_KD = np.linalg.svd(members_KFD, full_matrices=False)[2][:, 0]
        if (labels_FK == before_FK).all():
            break
    return labels_FK


def silhouettes(fits_FKD: np.ndarray, labels_FK: np.ndarray) -> np.ndarray:
    """Mean silhouette (K,) of each cluster's members, with distance 1 − |cos| (Rousseeuw 1987).

    1: the members agree and are unlike all others; 0: another cluster is as near.
    """
    from sklearn.metrics import silhouette_samples  # imported here, as it takes a second

    flat = fits_FKD.reshape(-1, fits_FKD.shape[2])
    distances = np.clip(1 - np.abs(flat @ flat.T), 0, None)
    np.fill_diagonal(distances, 0)
    found = silhouette_samples(distances, labels_FK.ravel(), metric="precomputed")
    return np.bincount(labels_FK.ravel(), weights=found) / len(fits_FKD)


def search(
    tried: Iterable[int], gather: Callable[[list[int]], list[Evidence]]
) -> tuple[list[Evidence], Recommendation]:
    """Try a range of numbers of components, then, again and again, those between the best one and its neighbours.

    Args:
        tried: the first ones.
        gather: the evidence of the numbers that it is given.

    Returns:
        rows: by number of components.
        recommendation: of one of them.
    """
    rows = sorted(gather(sorted(set(tried))), key=lambda row: row.n_components)
    while True:
        recommended = recommend(rows)
        between = next_to_try([row.n_components for row in rows], recommended.n_components)
        if not between:
            return rows, recommended
        rows = sorted([*rows, *gather(between)], key=lambda row: row.n_components)


def next_to_try(tried: Sequence[int], best: int) -> list[int]:
    """Numbers halfway to the neighbours of the best one, unless these are near already."""
    near = max(1, best // _FINENESS)
    below = max((k for k in tried if k < best), default=best)
    above = min((k for k in tried if k > best), default=best)
    return [(best + other) // 2 for other in (below, above) if abs(other - best) > near]


def recommend(rows: Sequence[Evidence]) -> Recommendation:
    """The number of components with the largest balance, of those up to where explained variance stops to rise.

    It has stopped at the first K from which on to every larger one tried, a further component explains less than
    `_IMMATERIAL` of what those up to K do on average. Beyond that point components may still come back, as artefacts
    of the data do, but are not worth having.
    """
    rows = sorted(rows, key=lambda row: row.n_components)
    saturated = next(i for i in range(len(rows)) if _saturated(rows, i))
    best = max(range(saturated + 1), key=lambda i: (rows[i].balance, -i))
    sharp = (
        best == saturated < len(rows) - 1
        and (best == 0 or _gain(rows[best - 1], rows[best]) > _CLIFF)
        and rows[best].balance >= _ALL_COME_BACK * rows[best].n_components
    )
    return Recommendation(rows[best].n_components, sharp, _reason(rows, best, saturated, sharp))


def _gain(low: Evidence, high: Evidence) -> float:
    """What a component between two numbers of them explains, over what one of the fewer does on average."""
    added = (high.explained_held_out - low.explained_held_out) / (high.n_components - low.n_components)
    average = low.explained_held_out / low.n_components
    return added / average if average > 0 else float(added > 0)


def _saturated(rows: Sequence[Evidence], i: int) -> bool:
    return all(_gain(rows[i], larger) < _IMMATERIAL for larger in rows[i + 1 :])


def _reason(rows: Sequence[Evidence], best: int, saturated: int, sharp: bool) -> str:
    chosen, number = rows[best], rows[best].n_components
    found = (
        f"{number} components explain {chosen.explained_held_out:.3f} of held-out examples, and "
        f"{chosen.n_come_back:.1f} of them come back (|cos| ≥ {COMES_BACK}) from other seeds and halves"
    )
    if best == len(rows) - 1:
        return f"{found}; that is the largest number tried, and more may be better: try a range that goes further"
    above = rows[best + 1]
    if sharp:
        fewer = f"{rows[best - 1].n_components} explain {rows[best - 1].explained_held_out:.3f}, " if best else ""
        return (
            f"{found}; {fewer}{above.n_components} explain {above.explained_held_out:.3f}, and of them "
            f"{above.n_come_back:.1f} come back: the further ones fit noise"
        )
    if best < saturated:
        most = rows[saturated]
        return (
            f"{found}; {most.n_components} would explain {most.explained_held_out:.3f}, but of them only "
            f"{most.n_come_back:.1f} come back: no number is clearly right, this one has most that can be relied on"
        )
    return (
        f"{found}; a further one adds less than {_IMMATERIAL:.0%} of what these do on average, yet explained variance "
        f"rises on ({above.explained_held_out:.3f} with {above.n_components}): no number is clearly right, this one is "
        "a compromise"
    )
