"""Layers of experts of transformers: their rows are those of plain autograd, one example and one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import GradientCollector, LabelSpec, collector, exact_label_factor, select_parameters
from npeff.gradients.contribution import Dense
from npeff.gradients.routed import Routed
from npeff.gradients.sums import total_gram
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

SIZES: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "num_experts_per_tok": 2, "num_labels": 3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "GptOss": {"num_local_experts": 4, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
}
LENGTHS = (5, 9, 2, 7, 9, 4)


def built(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A classifier with random weights. The implementations other than "eager" do not compute in float64."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    model: nn.Module = getattr(transformers, f"{family}ForSequenceClassification")._from_config(config)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # type: ignore[operator]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 20, (length,), generator=generator) for length in LENGTHS]


def batch(numbers: Sequence[int], left: int = 0, right: int = 0) -> Tensor:
    """Texts, padded to the longest one on the right, and further on both sides."""
    ids = nn.utils.rnn.pad_sequence([texts()[number] for number in numbers], batch_first=True)
    return nn.functional.pad(ids, (left, right))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False).logits
    return logits


def defined_rows(model: nn.Module, names: Sequence[str]) -> Tensor:
    """A (B, R, P): row r of an example is Σ_c L_cr ∂z_c/∂θ."""
    model = copy.deepcopy(model).double()
    named, rows = dict(model.named_parameters()), []
    for number in range(len(LENGTHS)):
        logits = logits_of(model, batch([number]))
        factor_CR = exact_label_factor(logits.detach())[0]
        for weights_C in factor_CR.T:
            found = torch.autograd.grad(logits[0] @ weights_C, [named[name] for name in names], retain_graph=True)
            rows.append(torch.cat([each.flatten() for each in found]))
    return torch.stack(rows).unflatten(0, (len(LENGTHS), -1))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_grams_norms_and_sketches_are_those_of_plain_autograd(family: str) -> None:
    model = built(family)
    layout = select_parameters(model)
    rows = defined_rows(model, layout.names)
    collected = GradientCollector(model, logits_of, layout).collect(batch(range(6)), range(6))
    parts = collected.contributions
    experts = [name for name in layout.names if ".experts." in name]
    assert len(experts) == (8 if family == "GptOss" else 4)
    assert {type(parts[name]) for name in experts} == ({Routed, Dense} if family == "GptOss" else {Routed})
    scales_B11 = collected.labels.scales_B[:, None, None]
    for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
        expected = rows[:, :, offset : offset + size]
        assert difference(parts[name].dense().flatten(2) * scales_B11, expected) < 1e-10, name
        assert difference(parts[name].gram() * scales_B11**2, expected @ expected.mT) < 1e-10, name
    grams = rows @ rows.mT
    assert difference(total_gram(parts.values()) * scales_B11**2, grams) < 1e-10
    sketch = make_sketch(SketchSpec("tensorsketch", 64), layout, 3)
    vectors = {
        name: rows[..., offset : offset + size].reshape(-1, *shape)
        for name, offset, size, shape in zip(layout.names, layout.offsets, layout.sizes, layout.shapes, strict=True)
    }
    expected = sketch.apply_dense(vectors).unflatten(0, (6, -1))
    for method in ("fft", "scatter", "auto"):
        assert difference(sketch.apply(parts, method) * scales_B11, expected) < 1e-10, method
    fishers = PerExampleFishers(model, logits_of, layout, make_sketch(SketchSpec("identity"), layout, 0))
    found = fishers(batch(range(6)), range(6))
    assert difference(found.factors_BRD, rows) < 1e-10
    assert difference(found.frobenius_norms_B, grams.flatten(1).norm(dim=1)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_implementation_of_lower_precision_agrees(family: str, dtype: torch.dtype) -> None:
    model = built(family, dtype)
    assert model.config._experts_implementation != "eager"
    layout = select_parameters(model, ["*.experts.*"])
    parts = GradientCollector(model, logits_of, layout).collect(batch(range(6)), range(6)).contributions
    assert any(isinstance(part, Routed) for part in parts.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_composition_and_the_padding_of_a_batch_change_nothing(family: str) -> None:
    model = built(family)
    layout = select_parameters(model)
    sketch = make_sketch(SketchSpec("tensorsketch", 64), layout, 3)
    fishers = PerExampleFishers(model, logits_of, layout, sketch)
    together = fishers(batch(range(6)), range(6))
    for numbers, left, right in (([3], 0, 0), ([3], 0, 4), ([4, 2, 3, 0], 0, 0), ([0, 3], 0, 3), ([1, 3], 5, 0)):
        found = fishers(batch(numbers, left, right), numbers)
        tolerance = 1e-4 if left else 1e-9  # the angles of rotary embeddings are those of other positions, in float32
        assert difference(found.factors_BRD, together.factors_BRD[numbers]) < tolerance
        assert difference(found.grams_BRR, together.grams_BRR[numbers]) < tolerance


class Batches:
    """Counts the batches whose rows are compared with an ordinary backward pass."""

    def __init__(self) -> None:
        self.compared = 0

    def __call__(self, *arguments: Any) -> Any:
        self.compared += 1
        return collector_wrong_parameters(*arguments)


collector_wrong_parameters = collector.wrong_parameters


@pytest.mark.parametrize("include", ["*", "*self_attn*"])
def test_routing_alone_is_no_reason_to_check_a_batch_even_with_as_many_examples_as_experts(include: str) -> None:
    model = built("Mixtral", torch.float32)
    ids = torch.randint(3, 20, (24, 7), generator=torch.Generator().manual_seed(0))
    rows = GradientCollector(model, logits_of, select_parameters(model, [include]))
    with patch.object(collector, "wrong_parameters", counted := Batches()):
        for start in range(0, 24, 4):
            rows.collect(ids[start : start + 4], range(start, start + 4))
    assert counted.compared == 1


class Halved(transformers.models.mixtral.modeling_mixtral.MixtralExperts):  # type: ignore[misc]
    """Something else than the attributes say."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = 0.5 * super().forward(hidden, chosen, weights)
        return result


@pytest.mark.parametrize("changes", [{"__class__": Halved}, {"is_transposed": True}])
def test_a_layer_that_computes_something_else_than_it_says_has_the_general_rule(changes: dict[str, Any]) -> None:
    model = built("Mixtral")
    for layer in model.model.layers:  # type: ignore[union-attr, operator]
        for name, value in changes.items():
            setattr(layer.mlp.experts, name, value)
    layout = select_parameters(model, ["*.experts.*"])
    collected = GradientCollector(model, logits_of, layout).collect(batch(range(6)), range(6))
    parts = [collected.contributions[name] for name in layout.names]
    assert {type(part) for part in parts} == {Dense}
    rows = torch.cat([part.dense().flatten(2) for part in parts], dim=2) * collected.labels.scales_B[:, None, None]
    assert difference(rows, defined_rows(model, layout.names)) < 1e-10


class Prompted(nn.Module):
    """Texts are compared with two prompts, which pass through a mixture that all texts share."""

    def __init__(self) -> None:
        super().__init__()
        self.texts = nn.Embedding(20, 3)
        self.prompts = built("Mixtral")
        self.register_buffer("ids", torch.arange(4, 12).view(2, 4))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.texts(ids).sum(1).tanh() @ logits_of(self.prompts, self.ids).t()  # type: ignore[arg-type]
        return logits


@pytest.mark.parametrize("size", [2, 4, 3])
def test_a_mixture_that_all_examples_share_is_right(size: int) -> None:
    torch.manual_seed(0)
    model = Prompted().double().eval()
    layout = select_parameters(model, ["*.experts.*"])
    ids = torch.randint(1, 20, (size, 5), generator=torch.Generator().manual_seed(2))
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    fishers = PerExampleFishers(
        model, lambda m, batch: m(batch), layout, sketch, one=lambda number: (ids[number : number + 1], None)
    )
    found = fishers(ids, range(size)).factors_BRD
    expected = []
    for number in range(size):
        logits = model(ids[number : number + 1])
        direction = exact_label_factor(logits.detach())[0, :, 0]
        named = dict(model.named_parameters())
        parts = torch.autograd.grad(logits[0] @ direction, [named[name] for name in layout.names])
        expected.append(torch.cat([part.flatten() for part in parts]))
    assert difference(found[:, 0], torch.stack(expected)) < 1e-9


def test_sampled_labels_and_examples_one_at_a_time_are_joined() -> None:
    """Where a batch has to be computed one example at a time, its rows are those of the batch."""
    model = built("GptOss")
    layout = select_parameters(model, ["*.experts.*"])
    spec = LabelSpec("sampled", rank=1)
    rows = GradientCollector(model, logits_of, layout, spec, lambda number: (batch([number]), None))
    together = rows.collect(batch(range(6)), range(6))
    rows.n_irregular = 3
    apart = rows.collect(batch(range(6)), range(6))
    for name in layout.names:
        found, expected = (each.contributions[name].dense() for each in (apart, together))
        scales = [each.labels.scales_B.view(-1, *[1] * (found.dim() - 1)) for each in (apart, together)]
        torch.testing.assert_close(found * scales[0], expected * scales[1], rtol=1e-9, atol=1e-12)
