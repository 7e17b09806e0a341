from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from npeff.reports import contrast
from npeff.reports.contrast import contrast_examples


@pytest.fixture
def coefficients() -> np.ndarray:
    rng = np.random.default_rng(0)
    found = np.where(rng.random((60, 5)) < 0.5, rng.random((60, 5)), 0.0).astype(np.float32)
    found[7] = np.nan
    return found


CLASSES = np.arange(60) % 3


def test_contrast_examples_are_the_nearest_of_the_same_class_that_do_not_use_the_component(coefficients) -> None:
    top = [i for i in np.argsort(-np.nan_to_num(coefficients[:, 2])) if CLASSES[i] == 1][:6]
    top.append(next(i for i in range(60) if CLASSES[i] == 0 and coefficients[i, 2] > 0))
    found = contrast_examples(coefficients, {2: top}, CLASSES, 4)[2]

    rows = np.nan_to_num(coefficients).astype(float)
    units = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    profile = units[top].mean(0)
    profile[2] = 0
    cosines = units @ profile / np.linalg.norm(profile)
    inactive = rows[:, 2] <= 0.01 * rows[top, 2].max()
    allowed = [i for i in range(60) if CLASSES[i] == 1 and inactive[i] and cosines[i] > 0]
    assert [c.example for c in found] == sorted(allowed, key=lambda i: -cosines[i])[:4]
    assert [c.cosine for c in found] == pytest.approx([cosines[c.example] for c in found], abs=1e-5)
    assert not {c.example for c in found} & set(top)


def test_invalid_examples_are_no_contrast_and_blocks_change_nothing(coefficients, monkeypatch) -> None:
    tops = {j: np.argsort(-np.nan_to_num(coefficients[:, j]))[:6].tolist() for j in range(5)}
    unknown = np.full(60, -1)
    whole = contrast_examples(coefficients, tops, unknown, 10)
    assert all(7 not in [c.example for c in found] for found in whole.values())
    monkeypatch.setattr(contrast, "_BLOCK", 7)
    cut = contrast_examples(da.from_array(coefficients, chunks=(9, 5)), tops, unknown, 10)
    for component, found in whole.items():
        assert [c.example for c in cut[component]] == [c.example for c in found]
        assert [c.cosine for c in cut[component]] == pytest.approx([c.cosine for c in found], abs=1e-5)


def test_a_component_that_every_example_of_its_class_uses_has_no_contrast() -> None:
    coefficients = np.ones((8, 2), np.float32)
    assert contrast_examples(coefficients, {0: [0, 1]}, np.zeros(8, int), 3) == {0: []}
    assert contrast_examples(coefficients, {}, np.zeros(8, int), 3) == {}
