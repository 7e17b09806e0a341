from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gradients.routed_rows import routed
from npeff.gradients import contribution as contributions
from npeff.gradients.contribution import Contribution, Dense
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.outer import Outer, live_positions
from npeff.gradients.routed import Routed
from npeff.gradients.sums import Sum, add, direction_products, total_gram, with_same_inputs
from torch import Tensor


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def deltas(*shape: int) -> tuple[Tensor, ...]:
    return draw(*shape), draw(*shape)


def outer(positions: int, groups: int = 1, inputs_first: bool = False) -> Outer:
    shape = (3, 4) if inputs_first else (4 * groups, 3)
    return Outer(deltas(5, groups, positions, 4), draw(5, groups, positions, 3), shape, inputs_first)


FORMS: dict[str, Callable[[], Contribution]] = {
    "one position": lambda: outer(1),
    "few positions": lambda: outer(2),
    "many positions": lambda: outer(30),
    "groups": lambda: outer(2, groups=3),
    "transposed": lambda: outer(2, inputs_first=True),
    "embedding": lambda: Rows(draw(5, 9, 2, 3), torch.randint(0, 4, (5, 9)), (4, 3)),
    "experts": routed,
    "experts of few tokens": lambda: routed(2),
    "experts of no token": lambda: routed(0),
    "experts, transposed": lambda: routed(inputs_first=True),
    "bias": lambda: Dense(draw(5, 2, 7)),
    "scalar": lambda: Dense(draw(5, 2)),
    "tied": lambda: Sum((outer(2), Rows(draw(5, 9, 2, 3), torch.randint(0, 4, (5, 9)), (4, 3)))),
}


@pytest.fixture(params=[1 << 25, 16], ids=["one block", "many blocks"], autouse=True)
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "MEMORY_ELEMENTS", request.param)
    monkeypatch.setattr(contributions, "CACHE_ELEMENTS", request.param)
    torch.manual_seed(0)


def dense_definition(value: Contribution) -> Tensor:
    """Rows, one position of one row of one example at a time."""
    rows = torch.zeros(value.n_examples, value.rank, *value.shape, dtype=torch.float64)
    for b in range(value.n_examples):
        for r in range(value.rank):
            if isinstance(value, Outer):
                _, groups, positions, o = value.deltas[r].shape
                for g in range(groups):
                    for t in range(positions):
                        product = torch.outer(value.deltas[r][b, g, t], value.inputs_BGTi[b, g, t])
                        if value.inputs_first:
                            rows[b, r] += product.T
                        else:
                            rows[b, r, g * o : (g + 1) * o] += product
            elif isinstance(value, Rows):
                for t, place in enumerate(value.indices_BT[b]):
                    rows[b, r, place] += value.deltas_BTRi[b, t, r]
            elif isinstance(value, Routed):
                for n in (value.examples_n == b).nonzero().flatten():
                    product = torch.outer(value.deltas[r][n], value.inputs_ni[n])
                    rows[b, r, value.experts_n[n]] += product.T if value.inputs_first else product
            elif isinstance(value, Dense):
                rows[b, r] = value.rows[b, r]
    if isinstance(value, Sum):
        return sum((dense_definition(part) for part in value.parts), rows)
    return rows


@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_its_formed_rows(form: str) -> None:
    value = FORMS[form]()
    rows = dense_definition(value)
    torch.testing.assert_close(value.dense(), rows, rtol=1e-12, atol=1e-12)
    flat = rows.reshape(5, 2, -1)
    torch.testing.assert_close(value.gram(), flat @ flat.transpose(1, 2), rtol=1e-12, atol=1e-12)
    for n_components in (1, 40):
        weights = draw(n_components, 5, 2)
        expected = torch.einsum("kbr,brp->kp", weights, flat).reshape(n_components, *value.shape)
        total = draw(*expected.shape)
        before = total.clone()
        value.add_weighted_sum(weights, total)
        torch.testing.assert_close(total, before + expected, rtol=1e-12, atol=1e-12)
    mask = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(value.examples(mask).dense(), rows[mask], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value.examples(slice(1, 3)).dense(), rows[1:3], rtol=1e-12, atol=1e-12)


def test_uses_of_one_form_are_merged_and_the_sum_is_that_of_the_uses() -> None:
    def rows() -> Rows:
        return Rows(draw(5, 9, 2, 3), torch.randint(0, 4, (5, 9)), (4, 3))

    cases: list[tuple[list[Contribution], type]] = [
        ([outer(2), outer(3)], Outer),
        ([rows(), rows()], Rows),
        ([Dense(draw(5, 2, 4, 3)), Dense(draw(5, 2, 4, 3))], Dense),
        ([routed(), routed(9), routed(0)], Routed),
        ([outer(1), rows(), outer(2), Dense(draw(5, 2, 4, 3)), Sum((outer(1), rows()))], Sum),
        (
            [
                Outer(deltas(5, 1, 2, 4), draw(5, 1, 2, 3), (4, 3)),
                Outer(deltas(5, 1, 2, 3), draw(5, 1, 2, 4), (4, 3), True),
            ],
            Sum,
        ),
    ]
    for uses, form in cases:
        total = add(uses)
        assert isinstance(total, form)
        expected = torch.stack([dense_definition(use) for use in uses]).sum(dim=0)
        torch.testing.assert_close(total.dense(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [2, 30])
def test_the_gram_of_all_parameters_is_the_sum_of_theirs_also_where_they_read_the_same_inputs(positions: int) -> None:
    inputs = draw(5, 1, positions, 3)
    parts: list[Contribution] = [Outer(deltas(5, 1, positions, o), inputs, (o, 3)) for o in (4, 2)]
    parts += [outer(positions), Dense(draw(5, 2, 7))]
    groups, others = with_same_inputs(parts)
    assert [len(group) for group in groups] == [2, 1]
    assert others == parts[3:]
    flat = [dense_definition(part).flatten(2) for part in parts]
    expected = sum((rows @ rows.transpose(1, 2) for rows in flat), torch.zeros(5, 2, 2))
    torch.testing.assert_close(total_gram(parts), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 31, 32, 33, 70])
def test_the_gram_of_one_row_is_its_squared_norm_whatever_the_strips(positions: int) -> None:
    inputs_BGTi = draw(3, 2, positions, 200)
    parts = [Outer((draw(3, 2, positions, o),), inputs_BGTi, (2 * o, 200)) for o in (150, 90)]
    expected_B = sum(part.dense().flatten(1).square().sum(1) for part in parts)
    torch.testing.assert_close(total_gram(parts)[:, 0, 0], expected_B, rtol=1e-12, atol=0)


def test_a_position_is_live_wherever_its_gradient_is_not_zero() -> None:
    deltas_RBTo = torch.zeros(2, 3, 5, 40)
    deltas_RBTo[0, 0, 1, 3], deltas_RBTo[1, 1, 2, 39], deltas_RBTo[0, 2, 4, 17] = 1e-44, -1.0, torch.nan
    expected_BT = deltas_RBTo.ne(0).any(0).any(-1)
    assert expected_BT.sum() == 3
    assert torch.equal(live_positions(list(deltas_RBTo)), expected_BT)


@pytest.mark.parametrize("form", FORMS)
def test_products_with_directions_are_those_of_the_rows(form: str) -> None:
    value = FORMS[form]()
    directions = draw(3, *value.shape)
    rows = dense_definition(value).reshape(5, 2, -1)
    expected = torch.einsum("brx,kx->brk", rows, directions.reshape(3, -1))
    torch.testing.assert_close(direction_products(value, directions), expected)
