from __future__ import annotations

import pytest
import torch
from gradients import fisher_models as models
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.sketches import SketchSpec, make_sketch
from npeff.sketches.calibration import LARGEST_RANK, calibrated


def rows(rank: int, width: int = 50, n: int = 6) -> torch.Tensor:
    return torch.randn(n, rank, width, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def gram(values: torch.Tensor) -> torch.Tensor:
    return values @ values.mT


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_gram_is_the_exact_one_and_the_recombination_near_the_identity(rank: int) -> None:
    sketched, exact = rows(rank), gram(rows(rank) + 0.2 * rows(rank + 50)[:, :rank])
    result = calibrated(sketched, exact)
    torch.testing.assert_close(gram(result), exact, rtol=1e-5, atol=2e-5)
    recombination = result @ torch.linalg.pinv(sketched)
    assert float((recombination - torch.eye(rank, dtype=torch.float64)).abs().max()) < 1


def test_rows_that_are_exact_already_stay_as_they_are() -> None:
    sketched = rows(3)
    torch.testing.assert_close(calibrated(sketched, gram(sketched)), sketched, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_and_equal_rows_stay_what_they_are(dtype: torch.dtype) -> None:
    """Examples of lower rank, labels that were drawn twice, and examples without any gradient."""
    sketched = rows(4)
    sketched[0, 2:] = 0
    sketched[1, 3] = sketched[1, 1]
    sketched[2] = 0
    exact = 1.1 * gram(sketched)
    exact[2] = 0
    result = calibrated(sketched.to(dtype), exact)
    assert not result[0, 2:].abs().gt(1e-5).any()
    assert not result[2].any()
    torch.testing.assert_close(result[1, 3], result[1, 1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gram(result.double()), exact, rtol=1e-4, atol=1e-4)


def test_an_example_that_is_not_finite_stays_so_and_disturbs_no_other() -> None:
    sketched = rows(2)
    clean = calibrated(sketched, gram(sketched))
    sketched[3, 0, 0] = torch.nan
    result = calibrated(sketched, gram(sketched))
    assert result[3].isnan().all()
    assert torch.equal(result[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]])


def test_many_rows_are_left_alone() -> None:
    sketched = rows(LARGEST_RANK + 1, 80, 2)
    assert calibrated(sketched, gram(rows(LARGEST_RANK + 1, 70, 2))) is sketched


def test_fishers_sketched_are_nearer_to_the_exact_ones_than_without() -> None:
    case = models.make("cnn")
    layout = select_parameters(case.model)
    batch = case.batch(range(12))

    def inner(factors: torch.Tensor) -> torch.Tensor:
        flat = factors.flatten(0, 1)
        return (flat @ flat.T).unflatten(0, (12, -1)).unflatten(2, (12, -1)).square().sum((1, 3))

    off_diagonal = ~torch.eye(12, dtype=torch.bool)
    fishers = PerExampleFishers(case.model, case.logits_fn, layout, make_sketch(SketchSpec("identity"), layout, 0))
    exact = inner(fishers(batch).factors_BRD)[off_diagonal]
    errors = []
    for seed in range(10):
        sketch = make_sketch(SketchSpec("tensorsketch", 64), layout, seed)
        stored = PerExampleFishers(case.model, case.logits_fn, layout, sketch)(batch)
        raw = sketch.apply(fishers.collector.collect(batch).contributions)
        scales = fishers.collector.collect(batch).labels.scales_B[:, None, None]
        torch.testing.assert_close(gram(stored.factors_BRD), stored.grams_BRR, rtol=1e-6, atol=1e-6)
        found = [inner(value)[off_diagonal] for value in (stored.factors_BRD, raw * scales)]
        errors.append([float((value - exact).norm() / exact.norm()) for value in found])
    with_it, without = torch.tensor(errors).mean(0)
    assert with_it < 0.9 * without
