"""Matched baseline examples against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from npeff.verification import matched_examples
from npeff.verification.matching import MATCHES, MOST_COEFFICIENT


def by_definition(w, traces, classes, among, top):
    """Sorted lists of (distance, position), one for each top example."""
    most = MOST_COEFFICIENT * np.median(w[top])
    candidates = [i for i in range(len(w)) if among[i] and i not in top and w[i] <= most and 0 < traces[i] < np.inf]
    found, n_by_trace = [], 0
    for example in top:
        if not traces[example] > 0:
            continue
        alike = [i for i in candidates if classes[i] == classes[example]] if classes[example] >= 0 else []
        if len(alike) < MATCHES:
            alike, n_by_trace = candidates, n_by_trace + 1
        distances = [(abs(np.log(traces[i]) - np.log(traces[example])), i) for i in alike]
        found += [i for _, i in sorted(distances)[:MATCHES]]
    return sorted((i, found.count(i)) for i in set(found)), n_by_trace


@pytest.mark.parametrize("seed", range(20))
def test_matches_are_the_nearest_candidates_of_the_class(seed: int) -> None:
    """With ties, missing values, classes of one and two candidates, and unknown classes."""
    rng = np.random.default_rng(seed)
    n = 80
    w = rng.integers(0, 12, n).astype(float)
    traces = np.exp(rng.integers(-3, 3, n).astype(float))
    classes = rng.choice([-1, 0, 1, 2, 3], n, p=[0.1, 0.5, 0.3, 0.06, 0.04])
    w[rng.integers(0, n, 3)], traces[rng.integers(0, n, 3)] = np.nan, np.nan
    traces[rng.integers(0, n, 2)] = 0
    among = rng.random(n) < 0.8
    usable = np.flatnonzero(among & (np.nan_to_num(w) > 0))
    top = usable[np.argsort(-w[usable], kind="stable")][:12]
    found = matched_examples(w, traces, classes, among, top)
    expected, n_by_trace = by_definition(w, traces, classes, among, top.tolist())
    assert list(zip(found.examples_m.tolist(), found.counts_m.tolist(), strict=True)) == expected
    assert found.n_by_trace == n_by_trace


def test_a_class_with_too_few_candidates_is_matched_by_the_trace_alone() -> None:
    w = np.array([9.0, 9.0, 0, 0, 0, 0, 0, 0])
    classes, traces = np.array([0, 1, 0, 0, 0, 1, 1, 0]), np.array([1.0, 1.0, 8, 9, 7, 1, 2, 6])
    found = matched_examples(w, traces, classes, np.ones(8, bool), np.arange(2))
    assert found.n_by_trace == 1
    assert found.examples_m.tolist() == [2, 4, 5, 6, 7], "8, 7 and 6 of class 0; 1, 2 and 6 of all classes"
    assert found.counts_m.tolist() == [1, 1, 1, 1, 2]


def test_an_example_with_much_of_the_component_is_no_baseline() -> None:
    w = np.array([8.0, 8.0, 8.0, 2.1, 2.0, 0.0, 1.0])
    found = matched_examples(w, np.ones(7), np.zeros(7, int), np.ones(7, bool), np.arange(3))
    assert found.examples_m.tolist() == [4, 5, 6]
    assert found.counts_m.tolist() == [3, 3, 3]


def test_without_candidates_or_top_examples_there_are_no_matches() -> None:
    everything = np.ones(5, bool)
    for top, among in ([np.arange(5), everything], [np.empty(0, int), everything], [np.arange(2), np.arange(5) < 2]):
        found = matched_examples(np.ones(5), np.ones(5), np.zeros(5, int), among, top)
        assert (len(found.examples_m), len(found.counts_m)) == (0, 0)
