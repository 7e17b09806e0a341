"""Scores of the name of a component, and of the component itself, from embeddings of texts.

Both questions are usually put to people or to a language model. Here, an embedding model answers them, which is cheap
and repeatable, and knows only what its cosines know.

n texts, d dimension of the embeddings. All embeddings have length 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npeff.statistics.auc import area_under_curve

MEMBERS = 4
"""Number of examples of the component in a draw of `intruder`, beside the intruder. A guess finds one in five."""


def detection(
    name_d: NDArray[np.floating], top_nd: NDArray[np.floating], others_nd: NDArray[np.floating]
) -> float | None:
    """Compute how well a name tells the examples of its component from other examples.

    The score is the probability that a random top example is nearer to the name than a random other example, by the
    cosine of their embeddings; equal cosines count half. It is 1 for a name that fits and 0.5 for a name that says
    nothing. It is the detection score of the package delphi (Paulo et al., 2024, https://arxiv.org/abs/2410.13928,
    section 3.2), which asks a language model, with the embeddings of its section 3.3. The idea to score explanations on
    held-out examples is that of Bills et al. (2023, "Language models can explain neurons in language models").

    Args:
        name_d: Embedding of the name.
        top_nd: Embeddings of top examples of the component.
        others_nd: Embeddings of other examples.

    Returns:
        The score; None without top examples or without other examples.
    """
    if not len(top_nd) or not len(others_nd):
        return None
    cosines_n = np.concatenate([top_nd, others_nd]).astype(np.float64) @ name_d.astype(np.float64)
    marked_n = np.arange(len(cosines_n)) < len(top_nd)
    order = np.argsort(-cosines_n, kind="stable")
    values_n = np.maximum(cosines_n[order] + 1.0, 0.0)
    return area_under_curve(values_n, marked_n[order], len(top_nd), len(others_nd))


def intruder(
    top_nd: NDArray[np.floating], others_nd: NDArray[np.floating], n_draws: int, rng: np.random.Generator
) -> float | None:
    """Compute how often an intruder is found among the top examples of a component.

    A draw has `MEMBERS` top examples of the component and one intruder, an example of another component. The example
    with the smallest mean cosine to the others is taken for the intruder. This is the word intrusion of Chang et al.
    (2009, "Reading Tea Leaves: How Humans Interpret Topic Models", section 3.1), with examples in place of words.

    Args:
        top_nd: Embeddings of top examples of the component.
        others_nd: Embeddings of top examples of other components, which are not among those of this component.
        n_draws: Number of draws.
        rng: Source of the draws.

    Returns:
        The fraction of the draws in which the intruder is found; None with too few examples. If several examples are
        equally far from the others, the intruder is not found.
    """
    if len(top_nd) < MEMBERS or not len(others_nd):
        return None
    n_found = 0
    for _ in range(n_draws):
        members = rng.choice(len(top_nd), MEMBERS, replace=False)
        drawn = np.concatenate([top_nd[members], others_nd[[rng.integers(len(others_nd))]]]).astype(np.float64)
        cosines = drawn @ drawn.T
        np.fill_diagonal(cosines, 0.0)
        n_found += int(np.argmin(cosines.sum(1)) == MEMBERS)
    return n_found / n_draws
