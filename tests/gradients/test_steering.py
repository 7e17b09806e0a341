"""Models that give rows to other examples in other batches: by numbers that they read, by index tensors of every kind,
by matrices, and by the sizes of flattened inputs."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gradients.irregular import LENGTHS, Experts, Text, errors, texts
from npeff.fisher import PerExampleFishers
from npeff.gradients import UnsupportedModelError, select_parameters
from npeff.gradients import collector as collectors
from npeff.gradients.steering import Kind, decided, given
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn
from torch.nn import functional as F

Reorder = Callable[[Tensor, Tensor], Tensor]
"""(values (B, …), order (B,)) -> the values in this order."""


def _rolled(values: Tensor, order: Tensor) -> Tensor:
    """Undone by rolling as often as there are examples: an order that is not a permutation by `order`."""
    return values.roll(int(order[0]), 0)


def _taken(values: Tensor, order: Tensor) -> Tensor:
    return values.take(torch.arange(values.numel()).view(values.shape)[order])


def _assigned(values: Tensor, order: Tensor) -> Tensor:
    found = torch.zeros_like(values)
    found[order.argsort()] = values
    return found


def _scattered(values: Tensor, order: Tensor) -> Tensor:
    places = order.argsort()[:, None, None].expand_as(values)
    return torch.zeros_like(values).scatter(0, places, values)


REORDERS: Mapping[str, Reorder] = {
    "[]": lambda values, order: values[order],
    "list": lambda values, order: values[order.tolist()],
    "stack": lambda values, order: torch.stack([values[number] for number in order.tolist()]),
    "unbind": lambda values, order: torch.stack([values.unbind(0)[int(number)] for number in order]),
    "numpy": lambda values, order: torch.cat([values[number : number + 1] for number in order.numpy()]),
    "embedding": lambda values, order: F.embedding(order, values.flatten(1)).view_as(values),
    "take": _taken,
    "gather": lambda values, order: values.gather(0, order[:, None, None].expand_as(values)),
    "along axis 1": lambda values, order: values.transpose(0, 1).index_select(1, order).transpose(0, 1),
    "[] of axis 1": lambda values, order: values.transpose(0, 1)[:, order].transpose(0, 1),
    "index_add": lambda values, order: torch.zeros_like(values).index_add(0, order.argsort(), values),
    "index_copy": lambda values, order: torch.zeros_like(values).index_copy(0, order.argsort(), values),
    "assignment": _assigned,
    "scatter": _scattered,
    "einsum": lambda values, order: torch.einsum("pb,btd->ptd", F.one_hot(order, len(order)).to(values), values),
    "matmul": lambda values, order: (F.one_hot(order, len(order)).to(values) @ values.flatten(1)).view_as(values),
    "transposed matmul": lambda values, order: (
        (values.flatten(1).t() @ F.one_hot(order.argsort(), len(order)).to(values)).t().view_as(values)
    ),
}  # fmt: skip


class Sorted(Text):
    """Examples are sorted by length before a layer, and put back after it."""

    def __init__(self, reorder: Reorder) -> None:
        super().__init__()
        self.reorder = reorder

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True, stable=True)
        return self.reorder(torch.tanh(self.mix(self.reorder(values, order))), order.argsort())


@pytest.mark.parametrize("kind", REORDERS)
def test_every_way_to_reorder_examples_is_seen(kind: str) -> None:
    torch.manual_seed(0)
    assert errors(Sorted(REORDERS[kind]), 4).max() < 1e-9


class Rolled(Text):
    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        steps = int(mask.sum()) % len(values)
        return torch.tanh(self.mix(values.roll(steps, 0))).roll(-steps, 0)


class Flipped(Text):
    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        if mask.sum() % 5 == 0:
            return torch.tanh(self.mix(values.flip(0))).flip(0)
        return torch.tanh(self.mix(values))


class Dispatched(Experts):
    """Each word goes to one of three experts, by a matrix of zeros and ones, as in models for accelerators."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        gates_ne = self.router(3 * flat).softmax(-1)
        chosen_ne = F.one_hot(gates_ne.argmax(-1), 3).to(flat)
        slots = (chosen_ne.cumsum(0) * chosen_ne - 1).clamp_min(0).long()
        places_nec = F.one_hot(slots, len(flat)).to(flat) * chosen_ne[..., None]
        inputs = torch.einsum("nec,nd->ecd", places_nec, flat)
        outputs = torch.stack([torch.tanh(expert(rows)) for expert, rows in zip(self.experts, inputs, strict=True)])
        return torch.einsum("nec,ecd,ne->nd", places_nec, outputs, gates_ne).view_as(values)


class Masked(Dispatched):
    """The same by masks."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        chosen = self.router(3 * flat).argmax(-1)
        found = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            here = (chosen == number)[:, None]
            if here.any():
                found = found.masked_scatter(here, torch.tanh(expert(flat.masked_select(here).view(-1, 6))))
        return found.view_as(values)


class Counting(Text):
    """Every third batch is reversed inside the model, and the logits are those of each example in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.n_calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.count()
        return super().forward(ids)

    def count(self) -> None:
        self.n_calls += 1

    def number(self) -> int:
        return self.n_calls

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        if self.number() % 3:
            return torch.tanh(self.mix(values))
        return torch.stack(torch.tanh(self.mix(torch.stack(values.unbind(0)[::-1]))).unbind(0)[::-1])


class CountingInList(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.calls = {"n": [0]}

    def count(self) -> None:
        self.calls["n"][0] += 1

    def number(self) -> int:
        return self.calls["n"][0]


class CountingInNumpy(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.calls = deque([np.int64(0)], maxlen=1)

    def count(self) -> None:
        self.calls.append(self.calls[-1] + 1)

    def number(self) -> int:
        return int(self.calls[-1])


class CountingInBuffer(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def count(self) -> None:
        self.calls = self.calls + 1

    def number(self) -> int:
        return int(self.calls.numpy(force=True))


class CountingInIterator(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.last = itertools.count(), 0

    def count(self) -> None:
        pass

    def number(self) -> int:
        return next(self.numbers)


_calls = [0]


class CountingGlobally(Counting):
    def count(self) -> None:
        _calls[0] += 1

    def number(self) -> int:
        return _calls[0]


class CountingInClass(Counting):
    made = 0

    def count(self) -> None:
        type(self).made += 1

    def number(self) -> int:
        return self.made


class Drawing(Counting):
    def number(self) -> int:
        return random.randrange(6)


class DrawingByNumpy(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def number(self) -> int:
        return int(self.generator.integers(6))


@pytest.mark.parametrize(
    "make",
    [Counting, CountingInList, CountingInNumpy, CountingInBuffer, CountingInIterator, CountingGlobally,
     CountingInClass, Drawing, DrawingByNumpy],
)  # fmt: skip
def test_a_model_whose_order_depends_on_its_own_state_has_the_right_fishers(make: type[Text]) -> None:
    torch.manual_seed(0)
    random.seed(0)
    assert errors(make(), 4).max() < 1e-9


def _reversal(values: Tensor) -> Tensor:
    return torch.eye(len(values), dtype=torch.float64).flip(0)


class Blended(Text):
    """Some words of an example pass through a layer at the place of another example."""

    def __init__(self, reorder: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reorder = reorder

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        here = (mask.sum(1) % 4 == 0)[:, None, None]
        alike = here == self.reorder(here)
        moved = torch.where(here | ~alike, values, self.reorder(values))
        found = torch.tanh(self.mix(moved))
        return torch.where(here | ~alike, found, self.reorder(found))


@pytest.mark.parametrize(
    "reorder",
    [
        lambda values: values.flip(0),
        lambda values: values.flip((0,)),
        lambda values: values[torch.arange(len(values)).flip(0)],
        lambda values: values[list(range(len(values)))[::-1]],
        lambda values: (
            (torch.eye(len(values)).flip(0).double() @ values.double().flatten(1)).view_as(values).to(values)
        ),
    ],
)
def test_orders_that_are_blended_by_a_mask_are_seen(reorder: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    assert errors(Blended(reorder), 4).max() < 1e-9


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("make", [Rolled, Flipped, Dispatched, Masked])
def test_models_that_route_or_shift_examples_have_the_right_fishers(make: type[Text], size: int) -> None:
    torch.manual_seed(0)
    assert errors(make(), size).max() < 1e-9


class Capacity(Dispatched):
    """An expert takes at most six words of a batch: examples depend on each other where it is full."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        gates = self.router(3 * flat).softmax(-1)
        found = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (chosen,) = torch.where(gates.argmax(-1) == number)
            chosen = chosen[:17]
            found = found.index_add(0, chosen, expert(flat[chosen]) * gates[chosen, number, None])
        return found.view_as(values)


def test_examples_that_depend_on_each_other_in_some_batches_are_refused() -> None:
    torch.manual_seed(0)
    assert errors(Capacity(), 1).max() < 1e-9
    with pytest.raises(UnsupportedModelError, match="depend on the other examples in its batch"):
        errors(Capacity(), 5)


SIZES = (3, 3, 3, 3, 2, 4, 1, 5, 3, 1, 4, 2, 5, 5, 3, 3)
"""Numbers of points. As many pairs of examples as possible have as many points as two of the first ones."""


def points() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in SIZES]


def numbered(chosen: list[int]) -> dict[str, Any]:
    sizes = torch.tensor([SIZES[number] for number in chosen])
    return {
        "points": torch.cat([points()[number] for number in chosen]),
        "example": torch.repeat_interleave(torch.arange(len(chosen)), sizes),
        "flags": torch.zeros(len(chosen)),
    }


def with_sizes(chosen: list[int]) -> dict[str, Any]:
    return {"points": torch.cat([points()[number] for number in chosen]), "sizes": [SIZES[n] for n in chosen]}


def separate(chosen: list[int]) -> list[Tensor]:
    return [points()[number] for number in chosen]


class Sets(nn.Module):
    """A classifier of sets of points, all of which pass through the layers in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, batch: Any) -> Tensor:
        logits: Tensor = self.head(self.pooled(batch))
        return logits

    def hidden(self, values: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(values))))

    def pooled(self, batch: Any) -> Tensor:
        rows = self.hidden(batch["points"])
        return rows.new_zeros(len(batch["flags"]), 5).index_add(0, batch["example"], rows)


class ByScatter(Sets):
    def pooled(self, batch: Any) -> Tensor:
        rows = self.hidden(batch["points"])
        places = batch["example"][:, None].expand_as(rows)
        return rows.new_zeros(len(batch["flags"]), 5).scatter_add(0, places, rows)


class ByMatrix(Sets):
    def pooled(self, batch: Any) -> Tensor:
        rows = self.hidden(batch["points"])
        return F.one_hot(batch["example"], len(batch["flags"])).to(rows).t() @ rows


class ByCumulativeSum(Sets):
    def pooled(self, batch: Any) -> Tensor:
        rows = F.pad(self.hidden(batch["points"]).cumsum(0), (0, 0, 1, 0))
        ends = torch.bincount(batch["example"], minlength=len(batch["flags"])).cumsum(0)
        return rows[ends] - rows[F.pad(ends, (1, 0))[:-1]]


class BySegments(Sets):
    def pooled(self, batch: Any) -> Tensor:
        sizes = torch.bincount(batch["example"], minlength=len(batch["flags"]))
        return torch.segment_reduce(self.hidden(batch["points"]), "sum", lengths=sizes, axis=0)


class ByNumbers(Sets):
    def pooled(self, batch: Any) -> Tensor:
        return torch.stack([part.sum(0) for part in self.hidden(batch["points"]).split(batch["sizes"])])


class ByShapes(Sets):
    def pooled(self, batch: Any) -> Tensor:
        parts = self.hidden(torch.cat(batch)).split([len(part) for part in batch])
        return torch.stack([part.sum(0) for part in parts])


class Graph(Sets):
    """Points of one example send messages to each other."""

    def pooled(self, batch: Any) -> Tensor:
        example = batch["example"]
        sources, targets = (example[:, None] == example).nonzero().unbind(1)
        rows = torch.tanh(self.first(batch["points"]))
        rows = torch.zeros_like(rows).index_add(0, targets, torch.tanh(self.second(rows[sources])))
        return rows.new_zeros(len(batch["flags"]), 5).index_add(0, example, rows)


class DenseGraph(ByMatrix):
    def hidden(self, values: Tensor) -> Tensor:
        return torch.tanh(self.first(values))

    def pooled(self, batch: Any) -> Tensor:
        example = batch["example"]
        rows = self.hidden(batch["points"])
        rows = torch.tanh((example[:, None] == example).to(rows) @ self.second(rows))
        return F.one_hot(example, len(batch["flags"])).to(rows).t() @ rows


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("make", "batch"),
    [
        *((make, numbered) for make in (Sets, ByScatter, ByMatrix, ByCumulativeSum, BySegments, Graph, DenseGraph)),
        (ByNumbers, with_sizes),
        (ByShapes, separate),
    ],
)
def test_flattened_examples_of_different_sizes_have_the_right_fishers(
    make: type[Sets], batch: Callable[[list[int]], Any], size: int
) -> None:
    torch.manual_seed(0)
    assert errors(make(), size, batch=batch, n_examples=len(SIZES)).max() < 1e-9


class TimeFirst(Text):
    """Attention whose examples are on the second axis: positions have outputs of their own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        by_position = self.mix(values).transpose(0, 1)
        found = self.attention(by_position, by_position, by_position, key_padding_mask=~mask, need_weights=False)[0]
        result: Tensor = found.transpose(0, 1)
        return result


class Vectorized(Text):
    """A layer is called inside vmap."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = torch.vmap(lambda row: torch.tanh(self.mix(row)))(values)
        return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("make", [TimeFirst, Vectorized])
def test_the_axis_of_examples_is_not_taken_for_another_one(make: type[Text], size: int) -> None:
    torch.manual_seed(0)
    assert errors(make(), size).max() < 1e-9


class Stored(Text):
    """The output of a layer is stored in the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.found = nn.Linear(2, 6), None

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        if self.found is None:
            self.found = self.scale(values.new_ones(2)).detach()
        return torch.tanh(self.mix(values) * self.found)


def test_a_module_whose_output_is_stored_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        UnsupportedModelError, match="does not call 'scale': the model stores the output of this module"
    ):
        errors(Stored(), 4)


@pytest.mark.parametrize("reads", [False, True])
def test_a_model_that_reads_the_same_in_every_batch_is_rarely_checked(
    reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reading(Text):
        def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
            last = values[torch.arange(len(values)), mask.sum(1) - 1]  # the first axis keeps its order
            assert not reads or mask[:, 0].all()
            return torch.tanh(self.mix(values)) + last[:, None]

    checked: list[int] = []
    compare = collectors.wrong_parameters

    def counted(*args: Any) -> Any:
        checked.append(1)
        return compare(*args)

    monkeypatch.setattr(collectors, "wrong_parameters", counted)
    torch.manual_seed(0)
    model = Reading()
    batch, layout = texts(LENGTHS * 20), select_parameters(model)
    fishers = PerExampleFishers(
        model, lambda model, ids: model(ids), layout, make_sketch(SketchSpec("identity"), layout, 0)
    )
    for start in range(0, len(LENGTHS) * 20, 4):
        fishers(batch(list(range(start, start + 4))), range(start, start + 4))
    assert len(checked) <= 2


def test_what_a_batch_gives_besides_its_examples_is_compared() -> None:
    def same(batch: Any, other: Any) -> bool:
        return given(batch, 2) == given(other, 2)

    padded = {"ids": torch.zeros(2, 3), "mask": torch.zeros(2, 3)}
    assert same(padded, {"ids": torch.ones(2, 5), "mask": torch.ones(2, 5)})
    assert not same({**padded, "sizes": [1, 3]}, {**padded, "sizes": [3, 1]})
    assert same({**padded, "sizes": [1, 3]}, {**padded, "sizes": [1, 3]})
    assert not same([torch.zeros(3, 4), torch.zeros(1, 4)], [torch.zeros(1, 4), torch.zeros(3, 4)])
    assert not same({**padded, "more": object()}, {**padded, "more": object()})


@pytest.mark.parametrize(("n_rows", "n_experts", "decides"), [(12, 4, False), (12, 8, True), (4, 4, True)])
def test_a_choice_between_experts_is_none_between_examples(n_rows: int, n_experts: int, decides: bool) -> None:
    """Scores of four columns, in a batch of four examples: those of experts have several tokens of each example."""
    scores = torch.randn(n_rows, 4, requires_grad=True)
    found = [
        decided(Kind.ORDER, torch.topk, (scores, 2), {"dim": -1}, 4, {n_experts}),
        decided(Kind.OTHER, torch.gather, (scores, 1, scores.topk(2).indices), {}, 4, {n_experts}),
    ]
    assert [each is not None for each in found] == [decides, decides]
