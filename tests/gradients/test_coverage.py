from __future__ import annotations

import pytest
import torch
from gradients import fisher_models as models
from npeff.fisher import PerExampleFishers
from npeff.gradients import UnsupportedModelError, check_coverage, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn
from torch.nn import functional as F


class FunctionalHead(nn.Module):
    """The embedding is called as a module, and its weight is used again outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.emb(ids).mean(1))), self.emb.weight)


class UncalledHead(nn.Module):
    """A layer that is only read, never called: the root accounts for it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(values)), self.head.weight) * 2


class SequenceFirst(nn.Module):
    """Examples on the second axis inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        hidden = values.transpose(0, 1).contiguous()
        out: Tensor = torch.tanh(self.mix(hidden))
        return (out * torch.arange(len(out))[:, None, None]).sum(0)


class Overwritten(nn.Module):
    """A layer's input is modified in place after the layer has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        hidden = values * 2
        out: Tensor = self.mix(hidden)
        hidden.zero_()
        return out


class AcrossExamples(nn.Module):
    """Statistics over the batch: there is no Fisher of one example."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.norm(values)
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", models.NAMES)
def test_supported_models_pass(name: str, dtype: torch.dtype) -> None:
    case = models.make(name, dtype)
    check_coverage(case.model, case.logits_fn, case.batch(range(5)), select_parameters(case.model))


def refusal(model: nn.Module, batch: Tensor) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        check_coverage(model, models.call, batch, select_parameters(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_weight_used_outside_its_module_is_refused_by_name_and_can_be_excluded() -> None:
    torch.manual_seed(0)
    model, ids = FunctionalHead(), torch.randint(0, 7, (3, 5))
    message = refusal(model, ids)
    assert "emb.weight" in message
    assert "parameters.exclude" in message
    assert "Embedding" in message
    check_coverage(model, models.call, ids, select_parameters(model, exclude=["emb.weight"]))


def test_a_layer_that_is_only_read_is_accounted_for_by_the_module_that_reads_it() -> None:
    torch.manual_seed(0)
    model = UncalledHead().double()
    values, layout = torch.randn(5, 4).double(), select_parameters(model)
    check_coverage(model, models.call, values, layout)
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    factors = PerExampleFishers(model, models.call, layout, sketch)(values).factors_BRD
    assert factors[:, :, layout.offsets[2] : layout.offsets[3]].abs().amax() > 0
    assert not factors[:, :, layout.offsets[3] :].any()


@pytest.mark.parametrize("n_tokens", [3, 4, 8])
def test_examples_on_another_axis_are_refused_also_where_the_sizes_agree(n_tokens: int) -> None:
    torch.manual_seed(0)
    assert "mix" in refusal(SequenceFirst(), torch.randn(4, n_tokens, 4))


def test_inputs_modified_after_use_are_refused() -> None:
    assert "in place" in refusal(Overwritten(), torch.randn(4, 4))


def test_statistics_across_examples_are_refused() -> None:
    refusal(AcrossExamples(), torch.randn(4, 4))


def test_examples_that_are_not_finite_cannot_be_used_for_the_check() -> None:
    assert "finite" in refusal(nn.Linear(4, 3), torch.full((2, 4), torch.nan))


@pytest.mark.parametrize("family", ["Bert", "GPT2", "ViT"])
def test_models_of_the_transformers_library_pass(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small: dict[str, object] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    batch = {"input_ids": torch.randint(1, 50, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["attention_mask"][1, 5:] = 0
    if family == "ViT":
        config = transformers.ViTConfig(**small, intermediate_size=32, image_size=16, patch_size=4)
        model, batch = transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(3, 3, 16, 16)}
    elif family == "GPT2":
        ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, num_labels=3, **ends)
        model = transformers.GPT2ForSequenceClassification(config)
    else:
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **small))
    check_coverage(model, lambda network, inputs: network(**inputs).logits, batch, select_parameters(model))
