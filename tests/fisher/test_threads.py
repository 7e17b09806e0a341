from __future__ import annotations

from collections.abc import Iterator

import fisher_models as models
import pytest
import torch

from pipeline.fisher import PerExampleFishers, SketchSpec, make_sketch, select_parameters
from pipeline.fisher.threads import in_threads


@pytest.fixture(params=[1, 2])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items_without_gradients(n_threads: int) -> None:
    weight = torch.ones(3, requires_grad=True)
    results = in_threads(lambda item: weight * item, range(20), torch.device("cpu"))
    assert [int(result[0]) for result in results] == list(range(20))
    assert not any(result.requires_grad for result in results)
    assert torch.get_num_threads() == n_threads


def test_what_a_piece_raises_is_raised(n_threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda item: 1 // item, [2, 1, 0, 1], torch.device("cpu"))


@pytest.mark.parametrize("name", ["cnn", "tied encoder", "custom"])
def test_threads_change_nothing_beyond_rounding(name: str) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            case = models.make(name)
            layout = select_parameters(case.model)
            sketch = make_sketch(SketchSpec("tensorsketch", 1024, 0), layout)
            found.append(PerExampleFishers(case.model, case.logits_fn, layout, sketch)(case.batch(range(8))))
    finally:
        torch.set_num_threads(before)
    one, two = found
    scale = float(one.factors_BRD.abs().max())
    torch.testing.assert_close(two.factors_BRD, one.factors_BRD, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(two.grams_BRR, one.grams_BRR, rtol=1e-12, atol=1e-12 * float(one.grams_BRR.abs().max()))
