from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from gradients import dense_definition
from gradients import fisher_models as models
from npeff.fisher import FisherBatch, PerExampleFishers
from npeff.gradients import UnsupportedModelError, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn

IDENTITY = SketchSpec("identity")
SKETCH = SketchSpec("tensorsketch", 64)


def fishers_of(case: models.Case, spec: SketchSpec = IDENTITY) -> PerExampleFishers:
    layout = select_parameters(case.model)
    return PerExampleFishers(case.model, case.logits_fn, layout, make_sketch(spec, layout, 0))


def in_batches(fishers: PerExampleFishers, case: models.Case, size: int) -> list[FisherBatch]:
    indices = range(case.n_examples)
    return [fishers(case.batch(indices[start : start + size])) for start in range(0, case.n_examples, size)]


def factors(batches: Sequence[FisherBatch]) -> Tensor:
    return torch.cat([batch.factors_BRD for batch in batches])


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("name", models.NAMES)
def test_fishers_norms_and_grams_equal_the_dense_definition(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = models.make(name, dtype)
    double = copy.deepcopy(case.model).double()
    examples = [case.batch([i]) for i in range(7)]
    examples = [value.double() if value.is_floating_point() else value for value in examples]
    layout = select_parameters(case.model)
    expected = dense_definition.dense_fishers(double, case.logits_fn, layout, examples)
    result = fishers_of(case)(case.batch(range(7)))
    assert result.factors_BRD.dtype == dtype
    assert result.valid_B.all()
    a = result.factors_BRD.double()
    assert relative_error(a.transpose(1, 2) @ a, expected) < tolerance
    assert relative_error(result.grams_BRR, a @ a.transpose(1, 2)) < tolerance
    assert relative_error(result.frobenius_norms_B[:, None], expected.flatten(1).norm(dim=1)[:, None]) < tolerance
    assert result.ranks_B.tolist() == [a.shape[1]] * 7 == [result.logits.shape[1] - 1] * 7


@pytest.mark.parametrize("spec", [IDENTITY, SKETCH], ids=["identity", "tensorsketch"])
@pytest.mark.parametrize("name", models.NAMES)
def test_factors_do_not_depend_on_the_batch_size(name: str, spec: SketchSpec) -> None:
    case = models.make(name)
    reference = factors(in_batches(fishers_of(case, spec), case, 32))
    for size in (1, 7):
        # rows that nearly depend on each other lose some digits when a sketch is calibrated
        tolerance = 1e-12 if spec == IDENTITY else 1e-11
        assert relative_error(factors(in_batches(fishers_of(case, spec), case, size)), reference) < tolerance


def test_factors_do_not_depend_on_which_batch_came_first() -> None:
    case = models.make("tied encoder")
    started_small = fishers_of(case)
    started_small(case.batch([0]))
    whole = case.batch(range(8))
    assert torch.equal(started_small(whole).factors_BRD, fishers_of(case)(whole).factors_BRD)


@pytest.mark.parametrize("name", ["tied encoder", "torch encoder"])
def test_padding_changes_nothing(name: str) -> None:
    case = models.make(name)
    padded = models.token_case(case.model, extra_padding=5)
    for spec in (IDENTITY, SKETCH):
        plain, longer = (factors(in_batches(fishers_of(each, spec), each, 7)) for each in (case, padded))
        assert relative_error(longer, plain) < (1e-12 if spec == IDENTITY else 1e-11)


@pytest.mark.parametrize("name", models.NAMES)
def test_what_is_learnt_from_two_examples_serves_every_batch(name: str) -> None:
    case = models.make(name)
    plain, learnt = fishers_of(case), fishers_of(case)
    expected = plain(case.batch(range(4)))
    learnt(case.batch([6, 2]), [6, 2])
    passes = []

    def counted(model: nn.Module, batch: Tensor) -> Tensor:
        passes.append(batch)
        return case.logits_fn(model, batch)

    learnt.collector.logits_fn = counted
    found = learnt(case.batch(range(4)))  # five examples would be as many as a text has positions
    assert len(passes) == 1, "nothing is left to be learnt and to be checked"
    assert torch.equal(found.factors_BRD, expected.factors_BRD)


def test_positions_shared_by_all_examples_are_told_from_a_batch_even_at_equal_length() -> None:
    torch.manual_seed(0)
    shared, batched = (models.TiedEncoder(batched_positions=each).double() for each in (False, True))
    batched.load_state_dict(shared.state_dict())
    ids = torch.randint(1, 9, (6, 6), generator=torch.Generator().manual_seed(0))
    results = [fishers_of(models.Case(each, models.call, list, 6))(ids).factors_BRD for each in (shared, batched)]
    assert relative_error(results[0], results[1]) < 1e-13


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["mlp", "cnn", "convolutions", "custom", "transposed linear", "recurrent"])
def test_an_example_that_is_not_finite_is_marked_and_disturbs_no_other(name: str, bad: float) -> None:
    case = models.make(name)
    for spec in (IDENTITY, SKETCH):
        batch = case.batch(range(5))
        clean = fishers_of(case, spec)(batch)
        batch = batch.clone()
        batch[2] = bad
        result = fishers_of(case, spec)(batch)
        others = [0, 1, 3, 4]
        assert result.valid_B.tolist() == [True, True, False, True, True]
        assert relative_error(result.factors_BRD[others], clean.factors_BRD[others]) < 1e-12
        assert relative_error(result.grams_BRR[others], clean.grams_BRR[others]) < 1e-12
        for value in (result.factors_BRD, result.grams_BRR, result.frobenius_norms_B, result.ranks_B):
            assert not value[2].any()


def test_a_gradient_that_overflows_marks_the_example() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, values: Tensor) -> Tensor:
            out: Tensor = self.layer(values).abs().sqrt()
            return out

    model = Steep()
    with torch.no_grad():
        model.layer.bias.zero_()
    case = models.Case(model, models.call, list, 3)
    result = fishers_of(case)(torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]]))
    assert result.logits.isfinite().all()
    assert result.valid_B.tolist() == [True, False, True]


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, values: Tensor) -> Tensor:
        self.layer(values)
        raise KeyError("broken")


def test_the_model_is_left_as_it_was_also_after_an_exception() -> None:
    for model, works in ((models.mlp(), True), (Failing(), False)):
        model.train()
        next(iter(model.children())).eval()
        frozen = next(model.parameters()).requires_grad_(False)
        before = [(module.training, len(module._forward_hooks)) for module in model.modules()]
        fishers = fishers_of(models.Case(model, models.call, list, 2))
        if works:
            with torch.no_grad():
                fishers(torch.randn(2, 6))
        else:
            with pytest.raises(KeyError):
                fishers(torch.randn(2, 2))
        assert before == [(module.training, len(module._forward_hooks)) for module in model.modules()]
        assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())
        assert torch.backends.mha.get_fastpath_enabled()


def test_half_precision_models_are_summed_in_float32() -> None:
    case = models.make("mlp", torch.bfloat16)
    reference = models.make("mlp", torch.float32)
    result = fishers_of(case)(case.batch(range(8)))
    assert result.factors_BRD.dtype == torch.float32
    assert relative_error(result.factors_BRD, fishers_of(reference)(reference.batch(range(8))).factors_BRD) < 0.1


@pytest.mark.parametrize(
    ("logits_fn", "message"),
    [
        (lambda model, batch: model(batch)[:, 0], "classes"),
        (lambda model, batch: model(batch)[:, :1], "at least 2 classes"),
        (lambda model, batch: model(batch)[:1], "3 examples"),
        (lambda model, batch: model(batch)[None], "classes"),
        (lambda model, batch: {"logits": model(batch)}, "dict"),
        (lambda model, batch: model(batch).detach(), "depend"),
    ],
)
def test_logits_that_are_not_examples_by_classes_are_refused(logits_fn: object, message: str) -> None:
    model = nn.Linear(4, 3)
    layout = select_parameters(model)
    fishers = PerExampleFishers(model, logits_fn, layout, make_sketch(IDENTITY, layout, 0))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=message):
        fishers(torch.randn(3, 4))


def test_a_batch_of_any_type_is_accepted() -> None:
    class Sentences:
        def __init__(self, ids: Tensor) -> None:
            self.ids = ids

    case = models.make("tied encoder")
    ids = case.batch(range(5))
    opaque = models.Case(case.model, lambda model, batch: model(batch.ids), list, 5)
    assert torch.equal(fishers_of(opaque)(Sentences(ids)).factors_BRD, fishers_of(case)(ids).factors_BRD)


@pytest.mark.parametrize("gap", [60.0, 100.0, 140.0])
def test_saturated_predictions_keep_their_norms_and_directions_in_float32(gap: float) -> None:
    """At a gap of 140 between logits ‖F‖ is 1e-60: the squares of the rows are zero in float32."""
    results = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        with torch.no_grad():
            model[2].bias.copy_(torch.tensor([gap, 0.0, 0.0]))
        layout = select_parameters(model)
        sketch = make_sketch(SketchSpec("identity"), layout, 0)
        fishers = PerExampleFishers(model, lambda model, batch: model(batch), layout, sketch)
        torch.manual_seed(1)
        results.append(fishers(torch.randn(5, 4, dtype=torch.float64).to(dtype)))
    double, single = results
    assert double.frobenius_norms_B.max() < 1e-20
    torch.testing.assert_close(single.frobenius_norms_B, double.frobenius_norms_B, rtol=3e-5, atol=0)
    normalised = [r.factors_BRD.double() / r.frobenius_norms_B.sqrt()[:, None, None] for r in results]
    torch.testing.assert_close(normalised[1], normalised[0], rtol=0, atol=1e-5)
