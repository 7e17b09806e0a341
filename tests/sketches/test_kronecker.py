from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import fisher_models as models
from npeff.fisher import PerExampleFishers
from npeff.gradients import GradientCollector, ParameterLayout, select_parameters
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.outer import Outer
from npeff.sketches import SketchSpec, make_sketch
from npeff.sketches.kronecker import Projection
from torch import Tensor

IDENTITY = SketchSpec("identity")


def kronecker(size: int) -> SketchSpec:
    return SketchSpec("kronecker", size=size)


def collected(name: str, dtype: torch.dtype = torch.float64) -> tuple[ParameterLayout, Any]:
    case = models.make(name, dtype)
    layout = select_parameters(case.model)
    collector = GradientCollector(case.model, case.logits_fn, layout)
    return layout, collector.collect(case.batch(range(6))).contributions


def explicit_matrix(layout: ParameterLayout, size: int, seed: int) -> Tensor:
    """Q (D, P): S ⊗ T of one parameter after the other."""
    parts = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        drawn = Projection.draw(seed, name, shape, size)
        parts.append(torch.kron(drawn.left_mo.double(), drawn.right_ni.double()) * drawn.scale)
    return torch.block_diag(*parts)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", models.NAMES)
def test_projected_factors_are_the_explicit_matrix(name: str, size: int) -> None:
    layout, contributions = collected(name)
    rows = make_sketch(IDENTITY, layout, 0).apply(contributions)
    matrix = explicit_matrix(layout, size, seed=5)
    expected = rows @ matrix.T
    sketch = make_sketch(kronecker(size), layout, 5)
    assert sketch.dim == len(matrix) < layout.size
    scale = float(expected.abs().max())
    torch.testing.assert_close(sketch.apply(contributions), expected, rtol=0, atol=1e-14 * scale)
    vectors = {
        parameter: rows[0, :, offset : offset + size].unflatten(1, shape) if shape else rows[0, :, offset]
        for parameter, shape, offset, size in zip(
            layout.names, layout.shapes, layout.offsets, layout.sizes, strict=True
        )
    }
    torch.testing.assert_close(sketch.apply_dense(vectors), expected[0], rtol=0, atol=1e-14 * scale)


@pytest.mark.parametrize("name", models.NAMES)
def test_sides_that_are_short_already_are_left_as_they_are(name: str) -> None:
    layout, contributions = collected(name)
    rows = make_sketch(IDENTITY, layout, 0).apply(contributions)
    sketch = make_sketch(kronecker(1000), layout, 0)
    assert sketch.dim == layout.size
    torch.testing.assert_close(
        sketch.apply(contributions), rows, rtol=0, atol=1e-15 * layout.size * float(rows.abs().max())
    )


def test_coordinates_of_each_shape_of_parameter() -> None:
    shapes = {(300, 20): 256, (10, 20): 160, (10, 3): 30, (300, 2, 3, 3): 16 * 16, (300,): 16, (9,): 9, (): 1}
    for shape, count in shapes.items():
        assert make_sketch(kronecker(16), ParameterLayout(("w",), (shape,)), 0).dim == count


def test_a_layers_rows_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def formed(_: object) -> Tensor:
        raise AssertionError("formed")

    layout, contributions = collected("tied encoder")
    sketch = make_sketch(kronecker(3), layout, 0)
    expected = sketch.apply(contributions)
    for kind in (Outer, Rows):
        monkeypatch.setattr(kind, "dense", formed)
    assert torch.equal(sketch.apply(contributions), expected)


def test_float32_agrees_with_float64() -> None:
    layout, contributions = collected("tied encoder", torch.float32)
    single = make_sketch(kronecker(3), layout, 0).apply(contributions)
    assert single.dtype == torch.float32
    double = make_sketch(kronecker(3), layout, 0).apply(collected("tied encoder")[1])
    assert float((single - double).norm() / double.norm()) < 2e-6


def test_inner_products_are_unbiased_over_seeds() -> None:
    layout, contributions = collected("tied encoder")
    rows = make_sketch(IDENTITY, layout, 0).apply(contributions).flatten(0, 1)
    norms = rows.norm(dim=1, keepdim=True)
    exact = (rows / norms) @ (rows / norms).T
    n_seeds = 500
    errors = []
    for seed in range(n_seeds):
        sketched = make_sketch(kronecker(4), layout, seed).apply(contributions).flatten(0, 1) / norms
        errors.append(sketched @ sketched.T - exact)
    stacked = torch.stack(errors)
    standard_error = stacked.std(0) / n_seeds**0.5
    assert float(stacked.square().mean().sqrt()) > 0.02, "or there would be nothing to be unbiased about"
    assert float((stacked.mean(0).abs() / standard_error).max()) < 5.0
    # their standard error is 0.015; without the factors 1/√m they would be off by more than 1
    assert float(stacked.diagonal(dim1=1, dim2=2).mean().abs()) < 0.05


def test_signs_are_those_of_a_seed_and_a_name() -> None:
    one = Projection.draw(3, "block.layer.weight", (5, 7), 2)
    # pinned: a stored sketch must mean the same with every later version
    assert one.left_mo.tolist() == [[1, -1, 1, -1, -1], [-1, 1, -1, 1, -1]]
    assert one.right_ni.tolist() == [[1, 1, 1, 1, 1, 1, -1], [1, 1, -1, 1, -1, 1, 1]]
    assert one.scale == pytest.approx(0.5, rel=1e-15)
    for seed, name in ((4, "block.layer.weight"), (3, "block.other.weight")):
        other = Projection.draw(seed, name, (50, 70), 2)
        same = Projection.draw(3, "block.layer.weight", (50, 70), 2)
        assert not torch.equal(same.left_mo, other.left_mo)
        assert not torch.equal(same.right_ni, other.right_ni)
    square = Projection.draw(0, "w", (64, 64), 2)
    assert not torch.equal(square.left_mo, square.right_ni)


def test_signs_are_balanced_and_unlike_each_other() -> None:
    left_mo = Projection.draw(0, "w", (1001, 1), 32).left_mo.double()
    assert set(left_mo.unique().tolist()) == {-1.0, 1.0}
    correlations = left_mo @ left_mo.T / 1001 - torch.eye(32, dtype=torch.float64)
    # of 496 pairs, and of 32 means, with standard deviation 0.032
    assert float(correlations.abs().max()) < 0.15
    assert float(left_mo.mean(1).abs().max()) < 0.15


def test_factors_have_the_exact_grams_and_do_not_depend_on_the_batch() -> None:
    case = models.make("cnn")
    layout = select_parameters(case.model)
    fishers = PerExampleFishers(case.model, case.logits_fn, layout, make_sketch(kronecker(3), layout, 0))
    whole = fishers(case.batch(range(6)))
    grams_BRR = whole.factors_BRD @ whole.factors_BRD.mT
    torch.testing.assert_close(grams_BRR, whole.grams_BRR, rtol=0, atol=1e-6 * float(grams_BRR.abs().max()))
    alone = torch.cat([fishers(case.batch([example])).factors_BRD for example in range(6)])
    torch.testing.assert_close(alone, whole.factors_BRD, rtol=0, atol=1e-11 * float(alone.abs().max()))


def test_an_example_that_is_not_finite_disturbs_no_other() -> None:
    case = models.make("cnn")
    layout = select_parameters(case.model)
    fishers = PerExampleFishers(case.model, case.logits_fn, layout, make_sketch(kronecker(3), layout, 0))
    batch = case.batch(range(5))
    clean = fishers(batch).factors_BRD
    batch[2] = torch.nan
    found = fishers(batch)
    others = [0, 1, 3, 4]
    assert found.valid_B.tolist() == [True, True, False, True, True]
    torch.testing.assert_close(found.factors_BRD[others], clean[others], rtol=0, atol=1e-11 * float(clean.abs().max()))
