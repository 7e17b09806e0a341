"""The area under the ROC curve against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from npeff.statistics.auc import area_under_curve
from sklearn.metrics import roc_auc_score


@pytest.mark.parametrize("seed", range(4))
def test_the_area_is_that_of_scikit_learn_with_ties_and_zeros(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 6, 200) * (rng.random(200) < 0.7)
    marked = rng.random(200) < 0.2 + 0.1 * values
    listed = np.flatnonzero(values)
    listed = listed[np.argsort(-values[listed], kind="stable")]
    found = area_under_curve(values[listed].astype(float), marked[listed], int(marked.sum()), int((~marked).sum()))
    assert found == pytest.approx(roc_auc_score(marked, values), abs=1e-12)


def test_without_values_it_is_a_half_and_without_a_group_unknown() -> None:
    none = np.empty(0), np.empty(0, dtype=bool)
    assert area_under_curve(*none, 3, 4) == 0.5
    assert np.isnan(area_under_curve(*none, 0, 4))
    assert np.isnan(area_under_curve(np.ones(2), np.ones(2, dtype=bool), 2, 0))
