"""Architectures of the transformers library, built small with random weights, against one backward pass per class.

Everything is in float64 (`InFloat64`) unless a test says otherwise, and all parameters are selected.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from gradients import dense_definition
from npeff.fisher import FisherBatch, PerExampleFishers
from npeff.gradients import IGNORED, LabelSpec, ParameterLayout, check_coverage, label_rows, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]'")

CLASSIFIERS = ["bert", "roberta", "distilbert", "gpt2", "llama", "t5", "vit", "resnet"]
LANGUAGE_MODELS = ["gpt2-lm", "llama-lm", "t5-lm"]
IMAGES = ["vit", "resnet"]
ALL = CLASSIFIERS + LANGUAGE_MODELS
FEW = {"bert", "llama", "t5", "gpt2-lm"}
"""Families with which every property is tested. Some properties of the others are slow tests."""
N_EXAMPLES, VOCABULARY = 8, 50
PAD, START, END = 0, 1, 2
DRAWS = LabelSpec("sampled", 3, seed=4)
ROUNDING = 1e-9
RENAMED = "ignore:.*gradient_checkpointing.*:FutureWarning"  # in a later version of transformers 5; peft calls it too


def few(families: Sequence[str]) -> list[Any]:
    """Parameters of a test: those that are not in `FEW` are slow."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in families]


class InFloat64(TorchFunctionMode):
    """Casts to float32 inside a model (norms, the softmax of attention) are to float64: rounding stays below 1e-9."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func, args = torch.Tensor.double, args
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **kwargs)


@pytest.fixture(autouse=True)
def _float64(request: pytest.FixtureRequest) -> Iterator[None]:
    if "as_it_is" in request.fixturenames:
        yield
        return
    with InFloat64():
        yield


@pytest.fixture
def as_it_is() -> None:
    """Leaves the precision within a model to the model."""


def build(family: str) -> nn.Module:
    """A model of two layers with weights large enough for attention and logits to be far from uniform."""
    name = family.removesuffix("-lm")
    ends = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    common: dict[str, Any] = {"num_labels": 3, "use_cache": False}
    texts: dict[str, Any] = {**common, **ends, "vocab_size": VOCABULARY}
    configs: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertConfig(**texts, **layers, max_position_embeddings=24),
        "roberta": lambda: transformers.RobertaConfig(**texts, **layers, max_position_embeddings=24),
        "distilbert": lambda: transformers.DistilBertConfig(
            **texts, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24
        ),
        "gpt2": lambda: transformers.GPT2Config(**texts, n_embd=16, n_layer=2, n_head=2, n_positions=24),
        "llama": lambda: transformers.LlamaConfig(
            **texts, **{**layers, "num_attention_heads": 4}, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "t5": lambda: transformers.T5Config(
            **texts, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=PAD
        ),
        "vit": lambda: transformers.ViTConfig(num_labels=3, **layers, image_size=32, patch_size=8),
        "resnet": lambda: transformers.ResNetConfig(
            num_labels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
        ),
    }
    heads = {
        "gpt2-lm": transformers.AutoModelForCausalLM,
        "llama-lm": transformers.AutoModelForCausalLM,
        "t5-lm": transformers.AutoModelForSeq2SeqLM,
        "vit": transformers.AutoModelForImageClassification,
        "resnet": transformers.AutoModelForImageClassification,
    }
    torch.manual_seed(0)
    factory = heads.get(family, transformers.AutoModelForSequenceClassification)
    model: nn.Module = factory.from_config(configs[name]()).double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                n_channels = module.num_features
                statistics = {"running_mean": torch.randn(n_channels), "running_var": 0.5 + torch.rand(n_channels)}
                module.load_state_dict(statistics, strict=False)
    return model


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (4, 8, 2, 5, 8, 3, 6, 1)]
    words[1][3] = PAD  # a padding token that is read as any other: its embedding has no gradient in most families
    return [torch.cat([value, torch.tensor([END])]) for value in words]


def padded(values: Sequence[Tensor], fill: int, side: str, extra: int = 0) -> Tensor:
    longest = extra + max(map(len, values))
    rows = [value.new_full((longest,), fill) for value in values]
    for row, value in zip(rows, values, strict=True):
        row[slice(len(value)) if side == "right" else slice(longest - len(value), None)] = value
    return torch.stack(rows)


def batch_of(
    family: str, indices: Sequence[int], side: str = "right", extra: int = 0
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs of examples, and for a language model the targets, padded on a side and further by `extra`."""
    if family in IMAGES:
        images = torch.randn(N_EXAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return {"pixel_values": images[list(indices)]}, None
    chosen = [texts()[index] for index in indices]
    mask = padded([torch.ones_like(value) for value in chosen], 0, side, extra)
    inputs = {"input_ids": padded(chosen, PAD, side, extra), "attention_mask": mask}
    if family.removesuffix("-lm") in ("bert", "distilbert", "gpt2", "llama"):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if family == "t5-lm":
        # the decoder's own sequences, which are padded on the right whatever the encoder's side
        answers = [value.flip(0)[:4] for value in chosen]
        starts = [torch.cat([torch.tensor([PAD]), value[:-1]]) for value in answers]
        inputs["decoder_input_ids"] = padded(starts, PAD, "right", extra)
        return inputs, padded(answers, IGNORED, "right", extra)
    if family in LANGUAGE_MODELS:
        following = [torch.cat([value[1:], torch.tensor([IGNORED])]) for value in chosen]
        return inputs, padded(following, IGNORED, side, extra)
    return inputs, None


def call(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits


def labels_of(family: str) -> LabelSpec:
    return DRAWS if family in LANGUAGE_MODELS else LabelSpec()


def fishers_of(family: str, model: nn.Module, layout: ParameterLayout | None = None) -> PerExampleFishers:
    layout = layout or select_parameters(model)
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    return PerExampleFishers(model, call, layout, sketch, labels_of(family))


def compute(
    family: str, model: nn.Module, indices: Sequence[int] = range(N_EXAMPLES), side: str = "right", extra: int = 0
) -> FisherBatch:
    inputs, targets = batch_of(family, indices, side, extra)
    return fishers_of(family, model)(inputs, list(indices), targets)


@functools.cache
def plain_fishers(family: str) -> FisherBatch:
    """The Fishers of all examples, padded on the right to the longest, by the model as `build` makes it."""
    return compute(family, build(family))


def plain_rows(model: nn.Module, layout: ParameterLayout, family: str, index: int) -> Tensor:
    """Rows A (n, P) with F = AᵀA of one example by itself, without padding, from plain autograd.

    √p_y ∇log p(y) for each class y; of a language model ∇ Σ_t log p(ŷ_t) / √R for each draw ŷ.
    """
    inputs, targets = batch_of(family, [index])
    if targets is None:
        logits, jacobian_CP = dense_definition.dense_jacobian(model, call, layout, inputs)
        p = logits.softmax(0)
        return p.sqrt()[:, None] * (jacobian_CP - p @ jacobian_CP)
    model.eval()
    logits = call(model, inputs)
    log_p = logits.log_softmax(-1)
    made = targets[0] != IGNORED
    parameters = [model.get_parameter(name) for name in layout.names]
    rows = []
    for direction in label_rows(DRAWS, logits.detach(), [index], targets).directions:
        drawn = direction[0].argmax(-1)  # the only entry above zero
        score = log_p[0].gather(1, drawn[:, None])[made].sum() / DRAWS.max_rank(VOCABULARY) ** 0.5
        found = torch.autograd.grad(score, parameters, retain_graph=True)
        rows.append(torch.cat([value.flatten() for value in found]))
    return torch.stack(rows)


def fisher_distance(rows: Tensor, others: Tensor) -> float:
    """‖AᵀA − BᵀB‖_F of rows A (m, P) and B (n, P), to the accuracy of rounding without a P × P matrix."""
    _, triangle = torch.linalg.qr(torch.cat([rows, others]).T)
    left, right = triangle[:, : len(rows)], triangle[:, len(rows) :]
    return float((left @ left.T - right @ right.T).norm())


def check_factors(found_BRP: Tensor, expected: Sequence[Tensor], layout: ParameterLayout, tolerance: float) -> None:
    """Every example's Fisher as a whole, and the diagonal block of every parameter, however small it is."""
    for found_RP, expected_nP in zip(found_BRP, expected, strict=True):
        norm = float((expected_nP @ expected_nP.T).norm())
        assert fisher_distance(found_RP, expected_nP) <= tolerance * norm
        for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
            block, other = found_RP[:, offset : offset + size], expected_nP[:, offset : offset + size]
            block_norm = float((other @ other.T).norm())
            # a key's bias has a gradient that is zero but for rounding
            assert fisher_distance(block, other) <= tolerance * block_norm + 1e-20 * norm, name


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


def check_same(value: FisherBatch, expected: FisherBatch, tolerance: float = ROUNDING) -> None:
    assert value.valid_B.all()
    assert value.ranks_B.tolist() == expected.ranks_B.tolist()
    assert relative_error(value.factors_BRD, expected.factors_BRD) < tolerance
    assert relative_error(value.grams_BRR, expected.grams_BRR) < tolerance
    torch.testing.assert_close(value.losses_B, expected.losses_B, rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", ALL)
def test_fishers_equal_those_of_plain_autograd(family: str) -> None:
    model = build(family)
    layout = select_parameters(model)
    result = plain_fishers(family)
    assert result.valid_B.all()
    expected = [plain_rows(model, layout, family, index) for index in range(N_EXAMPLES)]
    check_factors(result.factors_BRD, expected, layout, ROUNDING)
    norms = torch.stack([(rows @ rows.T).norm() for rows in expected])
    torch.testing.assert_close(result.frobenius_norms_B, norms, rtol=ROUNDING, atol=0)
    # examples are told apart by what they are, not by rounding
    assert fisher_distance(expected[0], expected[1]) > 0.1 * float(norms[0])


@pytest.mark.parametrize("family", few(ALL))
def test_the_check_of_coverage_passes(family: str) -> None:
    model = build(family)
    inputs, targets = batch_of(family, range(4))
    check_coverage(model, call, inputs, select_parameters(model), labels=labels_of(family), targets=targets)


@pytest.mark.parametrize("family", few(ALL))
def test_batch_composition_changes_nothing(family: str) -> None:
    whole, fishers = plain_fishers(family), fishers_of(family, build(family))
    for indices in ([4], [7, 0, 5], [2], range(N_EXAMPLES), [1]):
        inputs, targets = batch_of(family, indices)
        result = fishers(inputs, list(indices), targets)
        assert relative_error(result.factors_BRD, whole.factors_BRD[list(indices)]) < ROUNDING


@pytest.mark.parametrize("family", few([name for name in ALL if name not in IMAGES]))
def test_padding_on_the_right_changes_nothing(family: str) -> None:
    check_same(compute(family, build(family), extra=4), plain_fishers(family))


# the others classify what stands at the first position, or (T5) read it first without a mask
@pytest.mark.parametrize("family", ["gpt2", "llama", *LANGUAGE_MODELS])
def test_padding_on_the_left_changes_nothing(family: str) -> None:
    model = build(family)
    for extra in (0, 4):
        check_same(compute(family, model, side="left", extra=extra), plain_fishers(family))


@pytest.mark.parametrize("family", few([name for name in ALL if name != "resnet"]))
def test_the_implementation_of_attention_changes_nothing(family: str) -> None:
    model = build(family)
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    model.set_attn_implementation("eager")  # type: ignore[operator]
    assert model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    check_same(compute(family, model), plain_fishers(family))


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.parametrize("family", few([name for name in ALL if name != "resnet"]))
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = build(family)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    model.train()
    check_same(compute(family, model), plain_fishers(family))
    assert model.training


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_adapters_of_low_rank(family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["query", "value"] if family == "bert" else ["q_proj", "down_proj"]
    model = peft.get_peft_model(
        build(family), peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.1, init_lora_weights=False)
    ).double()
    layout = select_parameters(model, include=["*lora_*"])
    assert len(layout.names) == 2 * 2 * 2
    inputs, _ = batch_of(family, range(N_EXAMPLES))
    check_coverage(model, call, inputs, layout)
    found = fishers_of(family, model, layout)(inputs).factors_BRD
    expected = [plain_rows(model, layout, family, index) for index in range(N_EXAMPLES)]
    check_factors(found, expected, layout, ROUNDING)


@pytest.mark.usefixtures("as_it_is")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_single_precision(dtype: torch.dtype) -> None:
    """Of the model with the same, rounded weights; within 5e-2 for every example."""
    half = build("bert").to(dtype)
    result = compute("bert", half)
    single = compute("bert", copy.deepcopy(half).float())
    assert result.factors_BRD.dtype == torch.float32
    check_same(result, single, tolerance=5e-2)
    check_coverage(half, call, batch_of("bert", range(4))[0], select_parameters(half))


@pytest.mark.usefixtures("as_it_is")
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_norms_and_attention_in_single_precision_pass_the_check_of_coverage_in_single_precision(family: str) -> None:
    model = build(family).float()
    inputs, _ = batch_of(family, range(4))
    check_coverage(model, call, inputs, select_parameters(model))
