"""Own directions of a repair, as combinations of the stored directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from npeff.stages.repair.directions import RepairDirections, nearest_combinations
from npeff.store.direction_store import DirectionStore
from npeff.verification import Edit

K, D = 5, 40


def test_the_nearest_combinations_are_projections_of_unit_length() -> None:
    generator = np.random.default_rng(0)
    sketches_KD, components_KD = generator.standard_normal((2, K, D))
    found = nearest_combinations(sketches_KD, components_KD)
    basis_DK, _ = np.linalg.qr(sketches_KD.T)
    projected_KD = components_KD @ basis_DK @ basis_DK.T
    lengths_K1 = np.linalg.norm(projected_KD, axis=1, keepdims=True)
    np.testing.assert_allclose(found.coefficients_KK @ sketches_KD, projected_KD / lengths_K1, atol=1e-12)
    cosines_K = (projected_KD * components_KD).sum(1) / (lengths_K1[:, 0] * np.linalg.norm(components_KD, axis=1))
    np.testing.assert_allclose(found.cosines_K, cosines_K)


def test_duplicated_and_unused_components_have_own_directions_too() -> None:
    """The directions of components 0 and 3 are equal up to rounding to float32, and component 4 is unused."""
    generator = np.random.default_rng(1)
    components_KD = generator.standard_normal((K, D))
    components_KD[3], components_KD[4] = components_KD[0], 0.0
    mixing_KK = np.eye(K) - 0.3 * (np.ones((K, K)) - np.eye(K))
    mixing_KK[3] = mixing_KK[0]
    sketches_KD = (mixing_KK @ components_KD).astype(np.float32).astype(np.float64)
    sketches_KD[4] = 0.0
    sketches_KD[3] += 1e-7 * generator.standard_normal(D)
    found = nearest_combinations(sketches_KD, components_KD)
    np.testing.assert_array_equal(found.coefficients_KK[4], 0)
    np.testing.assert_allclose(found.cosines_K, 1, atol=1e-6)
    assert np.abs(found.coefficients_KK).max() < 1, "rounding is not amplified"


@pytest.mark.parametrize("own", [False, True])
def test_sums_and_products_are_those_of_the_directions(tmp_path: Path, own: bool) -> None:
    generator, shapes = np.random.default_rng(2), {"weight": (3, 4), "bias": (3,)}
    coefficients_KK = generator.standard_normal((K, K))
    coefficients_KK[1] = 0.0
    store = DirectionStore.create(tmp_path / "directions.zarr", n_components=K, shapes=shapes, attrs={})
    stored = [{name: generator.standard_normal(shape) for name, shape in shapes.items()} for _ in range(K)]
    for component, direction in enumerate(stored):
        store.write(component, {name: value.astype(np.float32) for name, value in direction.items()})
    directions = RepairDirections(store, coefficients_KK if own else None)
    of_KK = coefficients_KK if own else np.eye(K)
    edits, gradient = [Edit(3, 0.5), Edit(0, -1.5), Edit(3, 1.0), Edit(1, 2.0)], torch.ones(3, 4)
    steps_K = np.array([-1.5, 2.0, 0.0, 1.5, 0.0]) @ of_KK
    for name in shapes:
        expected = sum(step * direction[name] for step, direction in zip(steps_K, stored, strict=True))
        np.testing.assert_allclose(directions.sum(edits)[name].numpy(), expected, atol=1e-5)
    products_K = of_KK @ [direction["weight"].sum() for direction in stored]
    found = directions.products({"weight": gradient, "bias": torch.zeros(3)}, [4, 1, 0])
    np.testing.assert_allclose(found, products_K[[4, 1, 0]], atol=1e-5)
    assert directions.sum([]) == {}
