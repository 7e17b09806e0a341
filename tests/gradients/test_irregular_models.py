"""Models whose rows are wrong in some batches if what two examples show is trusted for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import dense_definition
from gradients.irregular import Experts, Text, errors, logits_of, texts
from npeff.fisher import PerExampleFishers
from npeff.gradients import UnsupportedModelError, select_parameters
from npeff.gradients import collector as collectors
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn
from torch.nn import functional as F

Make = Callable[[], nn.Module]


class Ragged(Text):
    """Padding is taken out before a layer and put back after it."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(values).masked_scatter(mask[..., None], torch.tanh(self.mix(values[mask])))


class RaggedByNumbers(Text):
    """The same with places in place of a mask."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        places = mask.flatten().nonzero()[:, 0]
        return (
            torch.zeros_like(values.flatten(0, 1))
            .index_add(0, places, torch.tanh(self.mix(values.flatten(0, 1)[places])))
            .view_as(values)
        )


class Regrouped(Text):
    """Examples are sorted by length inside the model, as for packing."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True, stable=True)
        return torch.tanh(self.mix(values[order]))[order.argsort()]


class RegroupedBySelection(Text):
    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True, stable=True)
        return torch.tanh(self.mix(values.index_select(0, order))).index_select(0, order.argsort())


class Branch(Text):
    """A weight is used a second time, outside its module, in batches with a long text only."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        mixed = torch.tanh(self.mix(values))
        far = (mask.sum(1) > 8)[:, None, None]
        return mixed + far * torch.tanh(F.linear(mixed, self.mix.weight)) if bool(far.any()) else mixed


class UncalledBranch(Text):
    """A module that is never called, whose weight is used in batches with a long text only."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(6, 6)

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        mixed = torch.tanh(self.mix(values))
        far = (mask.sum(1) > 8)[:, None, None]
        return mixed + far * torch.tanh(F.linear(mixed, self.more.weight)) if bool(far.any()) else mixed


class Routed(Experts):
    """Each word goes to one of three experts."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        gates = self.router(3 * flat).softmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (chosen,) = torch.where(gates.argmax(-1) == number)
            if len(chosen):
                out = out.index_add(0, chosen, expert(flat[chosen]) * gates[chosen, number, None])
        return out.view_as(values)


class Positions(Text):
    """Positions are shared by all examples where nothing is padded, and are counted for each where something is."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, 6)

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        counted = (mask.long().cumsum(1) - 1).clamp_min(0)
        places = torch.arange(mask.shape[1])[None] if bool(mask.all()) else counted
        return torch.tanh(self.mix(values * self.positions(places)))


class Reused(Text):
    """A layer's weight is also used outside its module, always."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(values)), self.mix.weight)


class Listed(Text):
    """A layer's weight is also in a list, with which the outputs are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [self.mix.weight]

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(values)) * self.scales[0].sum()


class Transposed(Text):
    """A view of a layer's weight was stored before."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.again = [self.mix.weight.t()]

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(values)) @ self.again[0]


class Constant(Text):
    """A detached weight is a constant, which has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.scales = [self.mix.weight.detach()]

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.mix(values)) * self.scales[0].sum() * self.mix.weight.detach().sum()


class Depth(Text):
    """A layer is called once for every third word of the longest text."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        for step in range(0, mask.shape[1], 3):
            active = (mask.sum(1) > step)[:, None, None]
            values = torch.where(active, torch.tanh(self.mix(values)), values)
        return values


class InPlace(Text):
    """The input of a layer is modified after the layer has read it."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        values = values * 2
        out = torch.tanh(self.mix(values))
        values.zero_()
        return out


class Views(Text):
    """The output of a layer is modified through a view."""

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.mix(values)
        out[:, 0].mul_(2)
        out[..., :3].tanh_()
        return out


class _Scaled(torch.autograd.Function):
    """x ∘ w, whose batching rule for vmap is wrong."""

    @staticmethod
    def forward(values: Tensor, weight: Tensor) -> Tensor:
        return values * weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, weight = ctx.saved_tensors
        return gradient * weight, (gradient * values).flatten(0, -2).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: Any, values: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        return values.flip(0) * weight, 0


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 6))

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = _Scaled.apply(values, self.weight)
        return out


class WrongBatchingRule(Text):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.scale(torch.tanh(self.mix(values)))
        return out


class _WrongDerivative(torch.autograd.Function):
    """Backward passes add the mean over the batch: the derivative of an example alone is another one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + gradient.mean(0, keepdim=True)


class MixedDerivative(Text):
    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = _WrongDerivative.apply(torch.tanh(self.mix(values)))
        return out


class Packed(Text):
    """A recurrent layer over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(6, 6, batch_first=True)

    def mixed(self, values: Tensor, mask: Tensor) -> Tensor:
        pack, unpack = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
        out, _ = self.recurrent(pack(self.mix(values), mask.sum(1), batch_first=True, enforce_sorted=False))
        result: Tensor = unpack(out, batch_first=True, total_length=mask.shape[1])[0]
        return result


class SharedTower(nn.Module):
    """Texts are scored against four prompts, which pass through layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.prompts = Text(), Text()
        self.project = nn.Linear(3, 3)
        self.register_buffer("ids", torch.arange(1, 13).view(4, 3))

    def forward(self, ids: Tensor) -> Tensor:
        prompts = F.normalize(self.project(self.prompts(self.ids)), dim=-1)
        logits: Tensor = 5 * F.normalize(self.text(ids), dim=-1) @ prompts.t()
        return logits


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForSequenceClassification(config)


SUPPORTED: tuple[Make, ...] = (
    Text, Ragged, RaggedByNumbers, Regrouped, RegroupedBySelection, UncalledBranch, Routed, Positions, Depth, Views,
    WrongBatchingRule, MixedDerivative, Packed, SharedTower, Constant, mixtral,
)  # fmt: skip


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("make", SUPPORTED)
def test_fishers_are_right_whatever_later_batches_do(make: Make, size: int) -> None:
    torch.manual_seed(0)
    assert errors(make(), size).max() < (1e-4 if make is mixtral else 1e-9)


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Branch, "'mix.weight' at module 'mix' (Linear) are not its gradient, because the model uses it outside"),
        (Reused, "'mix.weight' at module 'mix' (Linear) are not its gradient, because the model uses it outside"),
        (Listed, "'mix.weight' at module 'mix' (Linear) are not its gradient, because the model uses it outside"),
        (Transposed, "'mix.weight' at module 'mix' (Linear) are not its gradient"),
        (InPlace, "modified in place after it is used"),
    ],
)
def test_what_cannot_be_right_is_refused_with_its_cause(make: Make, said: str, size: int) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError) as refused:
        errors(make(), size)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("n_classes", [2, 3, 5, 17])
@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_a_batching_rule_that_is_wrong_for_some_shapes_is_not_used(n_classes: int, size: int) -> None:
    """PReLU's is wrong where there is one row per example, and where there are as many rows as examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(144, n_classes)).double()
    images, layout = torch.randn(16, 1, 8, 8, dtype=torch.float64), select_parameters(model, ["1.weight"])
    fishers = PerExampleFishers(model, logits_of, layout, make_sketch(SketchSpec("identity"), layout, 0))
    found = torch.cat([fishers(images[start : start + size]).factors_BRD for start in range(0, 16, size)])
    expected = dense_definition.dense_fishers(model, logits_of, layout, [image[None] for image in images])
    torch.testing.assert_close(found.mT @ found, expected, rtol=1e-9, atol=1e-12)


def test_few_batches_are_checked_where_the_model_does_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    compare = collectors.wrong_parameters

    def counted(model: Any, layout: Any, run: Any, collected: Any, *more: Any) -> Any:
        checked.append(len(collected.logits))
        return compare(model, layout, run, collected, *more)

    monkeypatch.setattr(collectors, "wrong_parameters", counted)
    torch.manual_seed(0)
    model = Text()
    batch, layout = texts((6,) * 2000), select_parameters(model)
    fishers = PerExampleFishers(model, logits_of, layout, make_sketch(SketchSpec("identity"), layout, 0))
    for start in range(0, 2000, 4):
        fishers.collector.collect(batch(list(range(start, start + 4))), range(start, start + 4))
    assert len(checked) - 1 in (500 // collectors.CHECKED_EVERY, 500 // collectors.CHECKED_EVERY + 1)
