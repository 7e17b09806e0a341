from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from gradients import dense_definition
from gradients import fisher_models as models
from gradients.routed_rows import routed
from npeff.fisher import GroupLayout, diagonal_norms, diagonal_sum, grouped_sums, top_entries
from npeff.gradients import GradientCollector, LabelSpec, ParameterLayout, select_parameters
from npeff.gradients import contribution as contributions
from npeff.gradients.contribution import Contribution, Dense
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.outer import Outer
from npeff.gradients.sums import Sum
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = LabelSpec()


@pytest.fixture(params=[1 << 25, 16], ids=["one block", "many blocks"])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "MEMORY_ELEMENTS", request.param)
    monkeypatch.setattr(contributions, "CACHE_ELEMENTS", request.param)
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def outer(positions: int, groups: int = 1, inputs_first: bool = False, live: int | None = None) -> Outer:
    """5 examples of rank 2; only `live` positions of each and of each group, not the same ones, have gradients."""
    dead_BGT = torch.zeros(5, groups, positions, dtype=torch.bool)
    if live is not None:
        dead_BGT = torch.rand(5, groups, positions).argsort(2) >= live
    rows = [draw(5, groups, positions, 4).masked_fill(dead_BGT[..., None], 0) for _ in range(2)]
    shape = (3, 4) if inputs_first else (4 * groups, 3)
    return Outer(tuple(rows), draw(5, groups, positions, 3), shape, inputs_first)


def embedding() -> Rows:
    return Rows(draw(5, 9, 2, 3), torch.randint(0, 4, (5, 9)), (4, 3))


FORMS: dict[str, Callable[[], Contribution]] = {
    "one position": lambda: outer(1),
    "one live position of each example": lambda: outer(6, live=1),
    "one live position, transposed": lambda: outer(6, inputs_first=True, live=1),
    "one live position, groups": lambda: outer(6, groups=3, live=1),
    "no live position": lambda: outer(6, live=0),
    "no position": lambda: outer(0),
    "few live positions": lambda: outer(6, live=2),
    "few live positions, groups": lambda: outer(6, groups=3, live=2),
    "few positions": lambda: outer(2),
    "many positions": lambda: outer(60),
    "groups": lambda: outer(2, groups=3),
    "many positions, groups": lambda: outer(60, groups=3),
    "transposed": lambda: outer(2, inputs_first=True),
    "embedding": embedding,
    "experts": routed,
    "experts of few tokens": lambda: routed(2),
    "experts of no token": lambda: routed(0),
    "experts, transposed": lambda: routed(inputs_first=True),
    "bias": lambda: Dense(draw(5, 2, 7)),
    "scalar": lambda: Dense(draw(5, 2)),
    "tied": lambda: Sum((outer(2), embedding())),
}


def expected_groups(diagonals_BP: Tensor, layout: ParameterLayout, groups: GroupLayout) -> Tensor:
    """One entry of one parameter at a time."""
    sums_BQ = torch.zeros(len(diagonals_BP), groups.n_groups, dtype=torch.float64)
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        axis, first = groups.parts[name]
        for place, index in enumerate(itertools.product(*map(range, shape))):
            sums_BQ[:, first + (0 if axis is None else index[axis])] += diagonals_BP[:, offset + place]
    return sums_BQ


def check(
    values: Mapping[str, Contribution],
    scales_B: Tensor,
    layout: ParameterLayout,
    group_layouts: Sequence[GroupLayout],
    diagonals_BP: Tensor,
    tolerance: float = 1e-12,
) -> None:
    """All functions against the diagonals of the definition; errors are relative to each example's largest entry."""

    def close(value: Tensor, expected: Tensor, size_B: Tensor) -> None:
        assert value.dtype == torch.float64
        size = size_B.where(size_B > 0, 1).reshape(-1, *[1] * (expected.dim() - 1))
        torch.testing.assert_close(value / size, expected / size, rtol=tolerance, atol=tolerance)

    largest_B = diagonals_BP.amax(1)
    norms_B = diagonals_BP.norm(dim=1)
    close(diagonal_norms(values, scales_B), norms_B, largest_B)
    for groups in group_layouts:
        sums_BQ = grouped_sums(values, scales_B, groups)
        assert (sums_BQ >= 0).all()
        close(sums_BQ, expected_groups(diagonals_BP, layout, groups), diagonals_BP.sum(1))
    for k in sorted({1, 2, layout.size // 3 or 1, layout.size}):
        top = top_entries(values, scales_B, layout, k)
        close(top.values_Bk, diagonals_BP.topk(k).values, largest_B)
        close(top.norms_B, norms_B, largest_B)
        assert top.indices_Bk.dtype == torch.int64
        # the values are found where the indices say, each entry once
        used = top.values_Bk > 0
        close(top.values_Bk, diagonals_BP.gather(1, top.indices_Bk).where(used, 0), largest_B)
        for used_k, indices_k in zip(used, top.indices_Bk, strict=True):
            assert indices_k[used_k].unique().numel() == used_k.sum()
            assert not indices_k[~used_k].any()
    weights_KB = torch.randn(3, len(scales_B), dtype=torch.float64)
    weights_KB[:, 1::3] = 0
    weights_KB[1, 0] = 0
    total = diagonal_sum(values, scales_B, weights_KB)
    again = diagonal_sum(values, scales_B, weights_KB, total)
    assert again is total
    assert list(total) == list(values)
    sizes_1 = diagonals_BP.max()[None]
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        expected = 2 * weights_KB @ diagonals_BP[:, offset : offset + math.prod(shape)].double()
        close(total.get(name, torch.zeros(3, *shape).double()), expected.reshape(3, *shape), sizes_1.expand(3))


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_the_squares_of_its_formed_rows(form: str) -> None:
    values = {"before": Dense(draw(5, 2, 3)), "value": FORMS[form]()}
    shapes = tuple(value.shape for value in values.values())
    layout = ParameterLayout(tuple(values), shapes)
    diagonals_BP = torch.cat([value.dense().square().sum(1).reshape(5, -1) for value in values.values()], dim=1)
    scales_B = torch.tensor([1.0, 0.5, 2.0, 2.0**-200, 1.0], dtype=torch.float64)
    axes: Sequence[int | None] = range(len(shapes[1])) if shapes[1] else [None]
    group_layouts = []
    for axis in axes:
        count = 1 if axis is None else shapes[1][axis]
        group_layouts.append(GroupLayout((("value", count), ("before", 3)), {"value": (axis, 0), "before": (0, count)}))
    check(values, scales_B, layout, group_layouts, diagonals_BP * scales_B.square()[:, None])


def collector_of(case: models.Case, labels: LabelSpec = EXACT) -> GradientCollector:
    return GradientCollector(case.model, case.logits_fn, select_parameters(case.model), labels)


def in_batches(case: models.Case, size: int, n_examples: int) -> Iterator[tuple[Mapping[str, Contribution], Tensor]]:
    """Contributions and scales of the first examples of a case."""
    collector = collector_of(case)
    for start in range(0, n_examples, size):
        found = collector.collect(case.batch(range(start, min(start + size, n_examples))))
        yield found.contributions, found.labels.scales_B


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("name", models.NAMES)
def test_diagonals_are_those_of_the_dense_definition(name: str) -> None:
    case = models.make(name)
    found = collector_of(case).collect(case.batch(range(5)))
    layout = select_parameters(case.model)
    examples = [case.batch([i]) for i in range(5)]
    fishers_BPP = dense_definition.dense_fishers(case.model, case.logits_fn, layout, examples)
    diagonals_BP = fishers_BPP.diagonal(dim1=1, dim2=2)
    check(found.contributions, found.labels.scales_B, layout, [GroupLayout.of(case.model, layout)], diagonals_BP)


@pytest.mark.parametrize("labels", [LabelSpec("truncated", 2), LabelSpec("sampled", 3), LabelSpec("empirical")])
def test_diagonals_follow_the_labels(labels: LabelSpec) -> None:
    """The rows are those that the labels give, by the definition of the directions in the logits."""
    case = models.make("mlp")
    layout = select_parameters(case.model)
    found = collector_of(case, labels).collect(case.batch(range(5)), range(5), torch.arange(5) % 4)
    scales_B = found.labels.scales_B
    diagonals_BP = torch.zeros(5, layout.size, dtype=torch.float64)
    for b in range(5):
        _, jacobian_CP = dense_definition.dense_jacobian(case.model, case.logits_fn, layout, case.batch([b]))
        for direction_BC in found.labels.directions:
            diagonals_BP[b] += (scales_B[b] * direction_BC[b] @ jacobian_CP).square()
    check(found.contributions, scales_B, layout, [GroupLayout.of(case.model, layout)], diagonals_BP)


@pytest.mark.parametrize("name", models.NAMES)
def test_the_mean_over_a_data_set_is_the_diagonal_of_its_fisher_whatever_the_batches(name: str) -> None:
    case = models.make(name)
    layout = select_parameters(case.model)
    examples = [case.batch([i]) for i in range(case.n_examples)]
    fisher_PP = dense_definition.dense_fishers(case.model, case.logits_fn, layout, examples).mean(0)
    expected_P = fisher_PP.diagonal()
    for size in (7, 32):
        total: dict[str, Tensor] = {}
        for values, scales_B in in_batches(case, size, case.n_examples):
            diagonal_sum(values, scales_B, torch.full_like(scales_B, 1 / case.n_examples)[None], total)
        parameters = zip(layout.names, layout.shapes, strict=True)
        parts = [total.get(each, torch.zeros(1, *shape)).double().flatten() for each, shape in parameters]
        assert [total[each].shape[1:] for each in total] == [case.model.get_parameter(each).shape for each in total]
        assert (torch.cat(parts) - expected_P).abs().max() < 1e-12 * expected_P.max()


@pytest.mark.parametrize("name", models.NAMES)
def test_results_of_an_example_do_not_depend_on_the_batch(name: str) -> None:
    case = models.make(name)
    layout = select_parameters(case.model)
    groups = GroupLayout.of(case.model, layout)
    results = []
    for size in (1, 5, 12):
        parts = []
        for values, scales_B in in_batches(case, size, 12):
            top = top_entries(values, scales_B, layout, 20)
            norms_B, sums_BQ = diagonal_norms(values, scales_B), grouped_sums(values, scales_B, groups)
            parts.append((top.values_Bk, top.norms_B, norms_B, sums_BQ))
        results.append([torch.cat(column) for column in zip(*parts, strict=True)])
    for result in results[:2]:
        for value, expected in zip(result, results[2], strict=True):
            assert (value - expected).abs().max() < 1e-12 * expected.max()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["mlp", "cnn", "convolutions", "custom", "transposed linear", "recurrent"])
def test_an_example_that_is_not_finite_disturbs_no_other(name: str, bad: float) -> None:
    case = models.make(name)
    layout = select_parameters(case.model)
    groups = GroupLayout.of(case.model, layout)
    others = [0, 1, 3, 4]
    weights_1B = torch.ones(1, 5, dtype=torch.float64)
    weights_1B[0, 2] = 0
    batch = case.batch(range(5))
    broken = batch.clone()
    broken[2] = bad
    results = []
    for values in (batch, broken):
        found = collector_of(case).collect(values)
        parts, scales_B = found.contributions, found.labels.scales_B
        top = top_entries(parts, scales_B, layout, 9)
        per_example = [
            top.values_Bk,
            top.norms_B,
            diagonal_norms(parts, scales_B),
            grouped_sums(parts, scales_B, groups),
        ]
        sums = diagonal_sum(parts, scales_B, weights_1B)
        results.append([*(value[others] for value in per_example), *sums.values()])
    clean, disturbed = results
    for value, expected in zip(disturbed, clean, strict=True):
        assert (value - expected).abs().max() <= 1e-12 * expected.max()
    nothing = diagonal_sum(parts, scales_B, torch.zeros(2, 5))
    assert {name: tuple(value.shape) for name, value in nothing.items()} == {
        name: (2, *shape) for name, shape in zip(layout.names, layout.shapes, strict=True)
    }
    assert not any(value.any() for value in nothing.values())


@pytest.mark.parametrize("gap", [60.0, 140.0, 300.0])
def test_saturated_predictions_keep_their_diagonals_in_float32(gap: float) -> None:
    """At a gap of 140 between logits the diagonal is 1e-60: zero in float32."""
    results = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        with torch.no_grad():
            model[2].bias.copy_(torch.tensor([gap, 0.0, 0.0]))
        layout = select_parameters(model)
        torch.manual_seed(1)
        batch = torch.randn(5, 4, dtype=torch.float64).to(dtype)
        found = GradientCollector(model, models.call, layout).collect(batch)
        parts, scales_B = found.contributions, found.labels.scales_B
        top = top_entries(parts, scales_B, layout, 12)
        sums = diagonal_sum(parts, scales_B, torch.ones(1, 5)).values()
        groups = grouped_sums(parts, scales_B, GroupLayout.of(model, layout))
        results.append([top.values_Bk, top.norms_B, diagonal_norms(parts, scales_B), groups, *sums])
    for value, expected in zip(results[1], results[0], strict=True):
        assert 0 < expected.max() < 1e-20
        torch.testing.assert_close(value / expected.max(), expected / expected.max(), rtol=3e-5, atol=1e-6)


def test_norms_of_small_gradients_do_not_underflow() -> None:
    """The norm is of fourth powers of the rows: 1e-48 here, zero in float32."""
    looked_up = Rows(torch.full((1, 1, 1, 5), 1e-12), torch.ones(1, 1, dtype=torch.int64), (3, 5))
    values: dict[str, Contribution] = {"a": Dense(torch.full((1, 1, 4), 1e-12)), "b": looked_up}
    layout = ParameterLayout(("a", "b"), ((4,), (3, 5)))
    scales_B = torch.ones(1, dtype=torch.float64)
    for norms_B in (diagonal_norms(values, scales_B), top_entries(values, scales_B, layout, 2).norms_B):
        assert norms_B.item() == pytest.approx(3e-24, rel=1e-6)


def test_units_whose_positions_cancel_do_not_come_out_below_zero() -> None:
    torch.manual_seed(0)
    deltas = draw(1, 1, 3, 200)
    deltas[:, :, 2] = -deltas[:, :, :2].sum(2)
    value = Outer((deltas,), draw(1, 1, 1, 50).expand(1, 1, 3, 50), (200, 50))
    groups = GroupLayout((("a", 200),), {"a": (0, 0)})
    sums_BQ = grouped_sums({"a": value}, torch.ones(1, dtype=torch.float64), groups)
    assert (sums_BQ >= 0).all()
    assert sums_BQ.max() < 1e-12


def group_counts(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, int]:
    return dict(GroupLayout.of(model, select_parameters(model, exclude=exclude)).counts)


def test_groups_are_output_units_that_weight_and_bias_share() -> None:
    assert group_counts(models.mlp()) == {"0.weight": 8, "3.weight": 5, "5.weight": 4}
    assert group_counts(models.mlp(), exclude=["0.weight"]) == {"0.bias": 8, "3.weight": 5, "5.weight": 4}
    assert group_counts(models.Cnn()) == {
        "first.weight": 4,
        "group_norm.weight": 4,
        "grouped.weight": 4,
        "batch_norm.weight": 4,
        "deep.weight": 6,
        "layer_norm.weight": 2,
        "head.weight": 3,
    }
    assert group_counts(models.Convolutions()) == {
        "one.weight": 4,
        "transposed.weight": 2,
        "three.weight": 2,
        "head.weight": 3,
    }
    columns = {"inner.weight": 7, "head.weight": 3}
    assert group_counts(models.Transposed()) == columns
    assert group_counts(models.Custom()) == {
        "first_token": 1,
        "flat.weight": 5,
        "scaled.scale": 5,
        "scaled.power": 1,
        "scaled.inner.weight": 5,
        "head.weight": 3,
    }
    tied = group_counts(models.TiedEncoder())
    assert (tied["tokens.weight"], tied["positions.weight"], "head.weight" in tied) == (6, 6, False)
    lstm = group_counts(models.Recurrent())
    assert lstm.pop("head.weight") == 3
    assert len(lstm) == 4
    assert set(lstm.values()) == {16}
    groups = GroupLayout.of(models.mlp(), select_parameters(models.mlp()))
    assert groups.names()[7:9] == [("0.weight", 7), ("3.weight", 0)]
    assert len(groups.names()) == groups.n_groups == 17


@pytest.mark.parametrize("k", [0, 13])
def test_more_entries_than_there_are_parameters_are_refused(k: int) -> None:
    value = Dense(torch.ones(2, 1, 12))
    with pytest.raises(ValueError, match="from 1 to 12"):
        top_entries({"a": value}, torch.ones(2, dtype=torch.float64), ParameterLayout(("a",), ((12,),)), k)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize("positions", [1, 3])
def test_the_diagonals_are_never_formed_for_the_whole_batch(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "CACHE_ELEMENTS", 4000)
    deltas = (draw(16, 1, positions, 40), draw(16, 1, positions, 40))
    values: dict[str, Contribution] = {
        "linear": Outer(deltas, draw(16, 1, positions, 40), (40, 40)),
        "embedding": Rows(draw(16, 4, 2, 8), torch.randint(0, 1000, (16, 4)), (1000, 8)),
    }
    layout = ParameterLayout(("linear", "embedding"), ((40, 40), (1000, 8)))
    groups = GroupLayout((("linear", 40), ("embedding", 8)), {"linear": (0, 0), "embedding": (1, 40)})
    scales_B = torch.ones(16, dtype=torch.float64)
    with LargestTensor() as largest:
        top_entries(values, scales_B, layout, 50)
        diagonal_norms(values, scales_B)
        grouped_sums(values, scales_B, groups)
    assert 1600 <= largest.numbers <= 4000
    with LargestTensor() as largest:
        diagonal_sum(values, scales_B, scales_B[None])
    assert largest.numbers == 8000  # the table itself
