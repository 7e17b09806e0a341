"""Baseline examples that are matched to the top examples of a component.

A step along a component's direction changes the predictions on examples with large Fishers more than on others, and the
predictions of one class more than of others. A component would therefore pass a comparison with random examples if it
only selected large Fishers, or one class. The matched baseline excludes both: for each top example, it contains the
examples of the same predicted class with the nearest trace of the Fisher, among those that hardly have the component.

Legend: N examples, n top examples, m distinct baseline examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MATCHES = 3
"""Number of baseline examples of a top example."""

MOST_COEFFICIENT = 0.25
"""Largest coefficient of a baseline example, relative to the median of the top examples. Without this limit, a
component that is a whole class would be compared with itself."""


@dataclass(frozen=True)
class Matches:
    """The matched baseline examples of a component. An example may match several top examples."""

    examples_m: NDArray[np.int64]
    """Positions of the distinct examples, ascending."""
    counts_m: NDArray[np.int64]
    """Number of top examples that an example matches."""
    n_by_trace: int
    """Number of top examples that are matched by the trace alone, because their class has too few candidates."""


def matched_examples(
    coefficients_N: NDArray[np.floating],
    traces_N: NDArray[np.floating],
    classes_N: NDArray[np.integer],
    among_N: NDArray[np.bool_],
    top_n: NDArray[np.int64],
) -> Matches:
    """Choose for each top example the `MATCHES` candidates of its class whose log trace is nearest.

    The candidates are the examples of ``among_N`` with a positive trace and a coefficient of at most `MOST_COEFFICIENT`
    times the median coefficient of the top examples. If the class of a top example is unknown or has fewer than
    `MATCHES` candidates, the nearest candidates of all classes are chosen. Ties are ordered by position. Top examples
    without a positive trace have no matches.

    Args:
        coefficients_N: Coefficients of the component. An example with NaN is no candidate.
        traces_N: Traces of the Fishers.
        classes_N: Predicted classes, -1 where unknown. For a match by the trace alone, -1 everywhere.
        among_N: Marks the examples of the split.
        top_n: Positions of the top examples.

    Returns:
        The matches. Fewer than `MATCHES` for a top example if there are not enough candidates.
    """
    most = MOST_COEFFICIENT * float(np.median(coefficients_N[top_n])) if len(top_n) else 0.0
    candidate_N = among_N & (coefficients_N <= most) & (traces_N > 0) & np.isfinite(traces_N)
    candidate_N[top_n] = False
    with np.errstate(divide="ignore", invalid="ignore"):
        log_traces_N = np.log(traces_N)
    everything = np.flatnonzero(candidate_N)
    of_class = {number: everything[classes_N[everything] == number] for number in np.unique(classes_N[top_n]).tolist()}
    found: list[NDArray[np.int64]] = []
    n_by_trace = 0
    for example in top_n[np.isfinite(log_traces_N[top_n])].tolist():
        number = int(classes_N[example])
        alike = everything if number < 0 else of_class[number]
        if number < 0 or len(alike) < MATCHES:
            alike, n_by_trace = everything, n_by_trace + 1
        found.append(_nearest(log_traces_N, alike, log_traces_N[example]))
    examples_m, counts_m = np.unique(np.concatenate([np.empty(0, np.int64), *found]), return_counts=True)
    return Matches(examples_m, counts_m.astype(np.int64), n_by_trace)


def _nearest(values_N: NDArray[np.floating], among: NDArray[np.int64], value: float) -> NDArray[np.int64]:
    """Return the `MATCHES` positions of ``among`` (ascending) with the nearest values. Sorts only a few of them."""
    distances = np.abs(values_N[among] - value)
    if len(among) > MATCHES:
        near = np.flatnonzero(distances <= np.partition(distances, MATCHES - 1)[MATCHES - 1])
        among, distances = among[near], distances[near]
    return among[np.argsort(distances, kind="stable")[:MATCHES]]
