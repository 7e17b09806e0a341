"""Shares of positions against their definition: every position computes layers' outputs with parameters of its own."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gradients.fisher_models import NAMES, Case, call, make, token_case, vectors
from npeff.gradients import (
    GradientCollector,
    LabelSpec,
    PositionShares,
    UnsupportedModelError,
    label_rows,
    position_shares,
    select_parameters,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@dataclass(frozen=True)
class Place:
    """Which modules have the positions in their output, said by hand; of these, those with channels before them, and
    those whose own and whose children's parameters are theirs to move."""

    positions: tuple[int, ...]
    layers: frozenset[str] = frozenset()
    channels_first: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


def places(*names: str) -> frozenset[str]:
    return frozenset(names)


CASES = {
    "mlp": Place((8,)),
    "cnn": Place(
        (4, 7),
        places("first", "group_norm", "grouped", "batch_norm"),
        places("first", "group_norm", "grouped", "batch_norm"),
    ),
    "convolutions": Place((4,), places("one"), places("one")),
    "tied encoder": Place((6,), places("tokens", "positions", "norm", "query", "key", "value", "feed_forward")),
    "torch encoder": Place(
        (6,),
        places("tokens", "layer.self_attn", "layer.linear1", "layer.linear2", "layer.norm1", "layer.norm2"),
        whole=places("layer.self_attn"),
    ),
    "custom": Place((3,), places("flat", "scaled", "scaled.inner")),
    "transposed linear": Place((3,), places("inner", "head")),
    "recurrent": Place((4,)),
}


class Original(nn.Module):
    """A module as it was before its `forward` was replaced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def split_by_position(model: nn.Module, place: Place, direction: dict[str, Tensor], steps: Tensor) -> None:
    """Replace the forward of every module with parameters, for batches of one example: what it puts out at position t
    is computed with θ + steps[t]·g, and all else with θ + steps[T]·g."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    n_positions = len(steps) - 1

    def mask(name: str, output: Tensor, position: int) -> Tensor:
        """Where among a module's output this position is."""
        in_layer = name in place.layers and not (output.dim() < 3 and name != "flat" and name != "positions")
        if not in_layer:
            return torch.full_like(output, float(position == n_positions))
        marks_T = torch.zeros(n_positions, dtype=output.dtype)
        marks_T[position : position + 1] = 1
        marks = marks_T.reshape(place.positions)
        if output.dim() == 2:
            return marks[:, None].expand_as(output)
        if name in place.channels_first:
            return marks.expand_as(output)
        return marks[None, :, None].expand_as(output)

    def replace(name: str, module: nn.Module) -> None:
        own = dict(module.named_parameters(recurse=name in place.whole, remove_duplicate=False))
        moving = {local: direction[names[id(value)]] for local, value in own.items()}
        original = Original(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            total: list[Any] = []
            for position, step in enumerate(steps):
                moved = {f"module.{local}": own[local] + step * moving[local] for local in own}
                output = functional_call(original, moved, args, kwargs, tie_weights=False)
                leaves, spec = pytree.tree_flatten(output)
                parts = [mask(name, x, position) * x if isinstance(x, Tensor) else x for x in leaves]
                sums = zip(total, parts, strict=True) if total else ()
                total = [a + b if isinstance(b, Tensor) else b for a, b in sums] or parts
            return pytree.tree_unflatten(total, spec)

        module.forward = forward

    for name, module in list(model.named_modules()):
        inside = any(name.startswith(f"{whole}.") for whole in place.whole)
        if not inside and any(True for _ in module.parameters(recurse=name in place.whole)):
            replace(name, module)


def definition(case: Case, place: Place, directions: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
    """Shares (k, T) and what is left (k,) of one example by itself."""
    found = []
    n_positions = math.prod(place.positions)
    for k in range(len(next(iter(directions.values())))):
        model = copy.deepcopy(case.model).eval()
        steps = torch.zeros(n_positions + 1, dtype=torch.float64, requires_grad=True)
        split_by_position(model, place, {name: value[k] for name, value in directions.items()}, steps)
        logits = case.logits_fn(model, case.batch([index]))
        labels = label_rows(LabelSpec(), logits.detach())
        scores = torch.stack(
            [torch.autograd.grad((logits * row).sum(), steps, retain_graph=True)[0] for row in labels.directions]
        )
        scores = scores * labels.scales_B
        found.append((scores * scores.sum(1, keepdim=True)).sum(0))
    shares = torch.stack(found)
    return shares[:, :-1], shares[:, -1]


def collector_of(case: Case) -> GradientCollector:
    return GradientCollector(case.model, case.logits_fn, select_parameters(case.model))


def draw(model: nn.Module, count: int = 2) -> dict[str, Tensor]:
    """Unit directions of noise in every parameter."""
    torch.manual_seed(3)
    drawn = {name: torch.randn(count, *value.shape).to(value) for name, value in model.named_parameters()}
    norm_k = torch.cat([value.reshape(count, -1) for value in drawn.values()], dim=1).norm(dim=1)
    return {name: value / norm_k.reshape(-1, *(1,) * (value.dim() - 1)) for name, value in drawn.items()}


def evidence(collector: GradientCollector, batch: Any, directions: dict[str, Tensor], *numbers: Any) -> Tensor:
    """‖A_i g‖² (k, B) from rows that are formed."""
    collected = collector.collect(batch, *numbers)
    parts = [
        part.dense().double().reshape(part.n_examples, part.rank, -1)
        @ directions[name].double().reshape(len(directions[name]), -1).T
        for name, part in collected.contributions.items()
    ]
    products_BRk: Tensor = sum(parts) * collected.labels.scales_B[:, None, None]
    return products_BRk.square().sum(1).T


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Relative to the largest of each direction's and example's values."""
    scale = expected.abs() if expected.dim() == 2 else expected.abs().amax(2, keepdim=True)
    return bool(((found - expected).abs() <= tolerance * scale).all())


def check_sum(found: PositionShares, expected_kB: Tensor, tolerance: float) -> None:
    assert close(found.evidence_kB, expected_kB, tolerance)
    assert close(found.shares_kBT.sum(2) + found.other_kB, expected_kB, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NAMES)
def test_shares_and_the_rest_sum_to_the_evidence_from_the_rows(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = make(name, dtype)
    collector, directions, batch = collector_of(case), draw(case.model), case.batch(range(5))
    found = position_shares(collector, batch, directions, CASES[name].positions)
    assert found.shares_kBT.dtype == torch.float64
    check_sum(found, evidence(collector, batch, directions), tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_every_share_is_that_of_a_position_with_parameters_of_its_own(name: str) -> None:
    case, place = make(name), CASES[name]
    directions, indices = draw(case.model), [5, 0, 3]
    batch = case.batch(indices)
    if name.endswith("encoder"):
        place = Place((batch.shape[1],), place.layers, place.channels_first, place.whole)
    found = position_shares(collector_of(case), batch, directions, place.positions)
    for row, index in enumerate(indices):
        alone = place
        if name.endswith("encoder"):
            length = case.batch([index]).shape[1]
            alone = Place((length,), place.layers, place.channels_first, place.whole)
        shares_kT, other_k = definition(case, alone, directions, index)
        n_positions, scale = shares_kT.shape[1], float(found.evidence_kB[:, row].abs().max())
        assert (found.shares_kBT[:, row, :n_positions] - shares_kT).abs().max() < 1e-10 * scale
        assert (found.shares_kBT[:, row, n_positions:] == 0).all(), "padding"
        assert (found.other_kB[:, row] - other_k).abs().max() < 1e-10 * scale
    if place.layers:
        assert (found.shares_kBT.abs().amax(2) > 0).all()
    else:
        assert not found.shares_kBT.any()


@pytest.mark.parametrize("name", ["tied encoder", "torch encoder", "custom", "cnn"])
def test_shares_do_not_depend_on_the_batch_or_its_padding(name: str) -> None:
    case = make(name)
    directions = draw(case.model)
    batch = case.batch(range(6))
    place = (batch.shape[1],) if name.endswith("encoder") else CASES[name].positions
    whole = position_shares(collector_of(case), batch, directions, place)
    for indices in ([2], [4, 1], [3, 3, 3]):
        part = case.batch(indices)
        place = (part.shape[1],) if name.endswith("encoder") else CASES[name].positions
        found = position_shares(collector_of(case), part, directions, place)
        length = found.shares_kBT.shape[2]
        torch.testing.assert_close(found.shares_kBT, whole.shares_kBT[:, indices, :length], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(found.other_kB, whole.other_kB[:, indices], rtol=1e-9, atol=1e-14)
    if name == "tied encoder":
        padded = token_case(case.model, extra_padding=3).batch(range(6))
        found = position_shares(collector_of(case), padded, directions, (padded.shape[1],))
        assert not found.shares_kBT[:, :, -3:].any()
        torch.testing.assert_close(found.shares_kBT[:, :, :-3], whole.shares_kBT, rtol=1e-9, atol=1e-14)


def test_a_layer_with_another_number_of_positions_is_among_the_rest() -> None:
    case = make("transposed linear")
    directions, batch = draw(case.model), case.batch(range(4))
    collector = collector_of(case)
    right, wrong = (position_shares(collector, batch, directions, (count,)) for count in (3, 2))
    assert not right.other_kB.any()
    assert not wrong.shares_kBT.any()
    torch.testing.assert_close(wrong.other_kB, right.evidence_kB)
    torch.testing.assert_close(wrong.evidence_kB, right.evidence_kB)


def test_parameters_that_a_direction_does_not_name_do_not_move() -> None:
    case = make("tied encoder")
    collector, batch, directions = collector_of(case), case.batch(range(4)), draw(case.model)
    chosen = {name: value for name, value in directions.items() if name in ("query.weight", "value.bias")}
    zeros = {name: value * (name in chosen) for name, value in directions.items()}
    found, expected = (position_shares(collector, batch, value, (6,)) for value in (chosen, zeros))
    torch.testing.assert_close(found.shares_kBT, expected.shares_kBT)
    check_sum(found, evidence(collector, batch, zeros), 1e-10)


class TokenLogits(nn.Module):
    """Logits of every position from this position alone; token 5 is read as any other, but its embedding is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 5, padding_idx=5)
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.hidden(self.tokens(ids))))
        return logits


def test_where_positions_do_not_mix_only_those_with_a_prediction_have_a_share() -> None:
    torch.manual_seed(0)
    case = token_case(TokenLogits().double())
    ids = case.batch(range(4))
    targets = torch.where(ids > 4, ids % 4, -100)
    layout = select_parameters(case.model)
    collector = GradientCollector(case.model, call, layout, LabelSpec("sampled", 3, seed=1))
    directions = draw(case.model)
    found = position_shares(collector, ids, directions, ids.shape[1:], [7, 8, 9, 10], targets)
    check_sum(found, evidence(collector, ids, directions, [7, 8, 9, 10], targets), 1e-10)
    assert (found.shares_kBT.ne(0) == (targets != -100)).all()
    assert not found.other_kB.any()


class Doubled(torch.autograd.Function):
    """Twice its input, with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return 2 * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Opaque(nn.Module):
    """A parameter behind such a function, and if wanted one that is not, whose derivative must not pass for both's."""

    def __init__(self, in_part: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.gate = nn.Parameter(torch.linspace(-1, 1, 5)) if in_part else None

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = Doubled.apply(hidden * self.scale)
        return output if self.gate is None else output + hidden * self.gate


class Pooled(nn.Module):
    """A layer over positions, another one, and a classifier of their mean."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.first, self.other, self.head = nn.Linear(4, 5), other, nn.Linear(5, 3)

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.other(self.first(values))).mean(1))
        return logits


@pytest.mark.parametrize("in_part", [False, True])
def test_a_module_whose_backward_pass_has_no_derivative_is_among_the_rest_and_the_sum_exact(in_part: bool) -> None:
    torch.manual_seed(0)
    case = vectors(Pooled(Opaque(in_part)).double(), 6, 4)
    collector, batch, directions = collector_of(case), case.batch(range(3)), draw(case.model)
    found = position_shares(collector, batch, directions, (6,))
    check_sum(found, evidence(collector, batch, directions), 1e-10)
    only = {name: value * (name == "other.scale") for name, value in directions.items()}
    assert not position_shares(collector, batch, only, (6,)).shares_kBT.any()
    assert found.shares_kBT.all()


@pytest.mark.parametrize("family", ["Bert", "Llama", "GPT2"])
def test_shares_of_architectures_of_transformers_sum_to_the_evidence(family: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]'")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = getattr(transformers, f"{family}Config")(vocab_size=30, pad_token_id=0, num_labels=3, **sizes)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForSequenceClassification")(config)
    ids = torch.randint(1, 30, (4, 7))
    ids[0, 4:] = ids[2, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    collector = GradientCollector(model, lambda model, batch: model(**batch).logits, select_parameters(model))
    directions = draw(model)
    found = position_shares(collector, batch, directions, (7,))
    check_sum(found, evidence(collector, batch, directions), 1e-4)
    assert (found.shares_kBT.ne(0) == batch["attention_mask"].bool()).all()
    assert bool(found.other_kB.any()) == (family == "Bert"), "the pooler, and the classifier of what it gives"


def test_a_hook_that_changes_a_layers_output_is_not_taken_for_the_layer() -> None:
    torch.manual_seed(0)
    case = vectors(Pooled(nn.Linear(5, 5)).double(), 6, 4)
    case.model.get_submodule("other").register_forward_hook(lambda module, args, output: output.exp())
    collector, batch, directions = collector_of(case), case.batch(range(3)), draw(case.model)
    check_sum(position_shares(collector, batch, directions, (6,)), evidence(collector, batch, directions), 1e-10)


def test_a_half_precision_model_is_widened_before_sums_are_taken() -> None:
    torch.manual_seed(0)
    case = vectors(Pooled(nn.LayerNorm(5)).to(torch.bfloat16), 6, 4)
    collector, batch, directions = collector_of(case), case.batch(range(3)), draw(case.model)
    check_sum(position_shares(collector, batch, directions, (6,)), evidence(collector, batch, directions), 1e-5)


def test_layers_and_directions_that_do_not_fit_are_refused() -> None:
    case = make("mlp")
    collector, batch, directions = collector_of(case), case.batch(range(3)), draw(case.model)
    for wrong in ({"0.weight": torch.zeros(2, 3)}, {"nothing": torch.zeros(2, 3)}):
        with pytest.raises(ValueError, match="does not match a parameter"):
            position_shares(collector, batch, wrong, (6,))
    with pytest.raises(ValueError, match="number of directions must be the same"):
        position_shares(collector, batch, {**directions, "0.bias": torch.zeros(3, 8)}, (6,))
    for positions in ((), (0,)):
        with pytest.raises(ValueError, match="sizes of axes"):
            position_shares(collector, batch, directions, positions)
    table = token_case(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.LazyLinear(3)))
    table.model(table.batch(range(4)))
    with pytest.raises(UnsupportedModelError, match="max_norm"):
        position_shares(collector_of(table), table.batch(range(4)), draw(table.model), (6,))
