"""How pretrained models are loaded: adapters, precision, attention, missing weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.sketches import SketchSpec, make_sketch
from npeff.tasks import TaskError

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIG = BertConfig(max_position_embeddings=32, num_labels=3, **SMALL, **tiny.SIZE)
TEXTS = ["a small cat", "the dog sleeps and the cat sings", "a bird"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tiny.save_model(folder, AutoModelForSequenceClassification, CONFIG)
    tiny.save_tokenizer(folder, types=True)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model without a classifier, of so many classes as a model has by default."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny.save_model(folder, AutoModel, BertConfig(max_position_embeddings=32, **SMALL, **tiny.SIZE))
    tiny.save_tokenizer(folder, types=True)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    return tiny.write(tmp_path / "data.parquet", {"text": TEXTS})


def load(model: Path | str, data: str, **options: Any) -> tiny.Loaded:
    return tiny.load("sequence-classification", model, data, **{"text_columns": ["text"], **options})  # type: ignore[arg-type]


def save_adapter(model: Path, folder: Path, n_classes: int = 3, **options: Any) -> Any:
    """A LoRA adapter with random weights on a classifier; the adapted model is returned."""
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=n_classes)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, **options)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(folder)
    return adapted


def logits_of(model: Any, loaded: tiny.Loaded) -> torch.Tensor:
    with torch.no_grad():
        return model(**loaded.batch(range(3))).logits


def test_an_adapter_is_put_on_the_model(model: Path, data: str, tmp_path: Path) -> None:
    adapted = save_adapter(model, tmp_path / "adapter")
    loaded = load(model, data, adapter=str(tmp_path / "adapter"))
    tiny.check_batches(loaded)
    torch.testing.assert_close(loaded.logits(range(3)), logits_of(adapted, loaded), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded.logits(range(3)), load(model, data).logits(range(3)), atol=1e-3)


def test_the_fishers_of_an_adapters_weights_are_those_of_autograd(model: Path, data: str, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "adapter")
    loaded = load(model, data, adapter=str(tmp_path / "adapter"))
    layout = select_parameters(loaded.model, include=["*lora_*"])
    assert layout.size == 2 * 2 * (2 * 16 + 16 * 2), "two layers, two matrices, A and B"
    compute = PerExampleFishers(
        loaded.model, loaded.task.logits, layout, make_sketch(SketchSpec("identity"), layout, 0)
    )
    found = compute(loaded.batch(range(3)))
    parameters = [dict(loaded.model.named_parameters())[name].requires_grad_() for name in layout.names]
    for index in range(3):
        log_p = loaded.task.logits(loaded.model, loaded.batch([index]))[0].log_softmax(0)
        rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in log_p]
        rows_CP = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        rows_CP = rows_CP * log_p.detach().exp().sqrt()[:, None]
        factor_RP = found.factors_BRD[index]
        torch.testing.assert_close(factor_RP.T @ factor_RP, rows_CP.T @ rows_CP, rtol=1e-4, atol=1e-5)


def test_a_classifier_that_comes_with_the_adapter_needs_none_in_the_model(
    encoder: Path, data: str, tmp_path: Path
) -> None:
    adapted = save_adapter(encoder, tmp_path / "adapter", n_classes=4, task_type="SEQ_CLS")
    options = {"adapter": str(tmp_path / "adapter"), "label_names": ["a", "b", "c", "d"]}
    loaded = load(encoder, data, **options)
    torch.testing.assert_close(loaded.logits(range(3)), logits_of(adapted, loaded), rtol=1e-5, atol=1e-5)
    again = dict(load(encoder, data, **options).model.named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in loaded.model.named_parameters())
    with pytest.raises(TaskError, match=r"cannot load adapter .* on ") as caught:
        load(encoder, data, adapter=str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


def test_a_language_model_takes_an_adapter(tmp_path: Path, data: str) -> None:
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, bos_token_id=2, eos_token_id=3, **tiny.SIZE)
    base = tiny.save_model(tmp_path / "model", AutoModelForCausalLM, config)
    tiny.save_tokenizer(tmp_path / "model", "[CLS] $A")
    lora = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    loaded = tiny.load("causal-lm", tmp_path / "model", data, text_column="text", adapter=str(tmp_path / "adapter"))
    tiny.check_batches(loaded)
    tokens = torch.tensor([[tiny.START, *map(tiny.token, TEXTS[0].split())]])
    with torch.no_grad():
        expected = base(input_ids=tokens).logits[0, :-1]  # peft puts the adapter into the model that it is given
    torch.testing.assert_close(loaded.predictions([0])[0], expected, rtol=1e-5, atol=1e-5)


def test_weights_that_were_never_trained_are_refused(encoder: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"has no weights classifier\.bias, classifier\.weight: it is not trained for"):
        load(encoder, data)
    save_adapter(encoder, tmp_path / "adapter")  # without a classifier
    with pytest.raises(TaskError, match=r"has no weights classifier\.bias, classifier\.weight: it is not trained for"):
        load(encoder, data, adapter=str(tmp_path / "adapter"), label_names=["a", "b", "c"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Lora", {"target_modules": ["query", "classifier"]}),
        ("Lora", {"target_modules": "all-linear", "bias": "all"}),
        ("IA3", {"target_modules": ["query", "classifier"], "feedforward_modules": []}),
        ("OSF", {"target_modules": ["query", "classifier"]}),
    ],
)
def test_a_classifier_that_was_never_trained_is_refused_under_an_adapter_too(
    kind: str, options: dict[str, Any], encoder: Path, data: str, tmp_path: Path
) -> None:
    """The adapter adds weights to the classifier, or changes it, but does not replace it."""
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    config = getattr(peft, f"{kind}Config")(**options)
    peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(encoder), config).save_pretrained(tmp_path)
    with pytest.raises(TaskError, match=r"has no weights classifier\.bias, classifier\.weight: it is not trained for"):
        load(encoder, data, adapter=str(tmp_path), label_names=["a", "b"])


def test_precision_and_attention_are_the_ones_asked_for(model: Path, data: str) -> None:
    plain, half = load(model, data), load(model, data, dtype="bfloat16", attention="eager")
    assert {parameter.dtype for parameter in plain.model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.model.config._attn_implementation == "eager"
    assert load(model, data, attention="sdpa").model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(half.logits(range(3)).float(), plain.logits(range(3)), rtol=0.1, atol=0.1)


def test_the_tokenizer_may_lie_elsewhere(model: Path, data: str, tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path / "tokenizer", "[CLS] [CLS] $A [SEP]", types=True)
    loaded = load(model, data, processor=str(tmp_path / "tokenizer"))
    assert loaded.batch([2])["input_ids"][0, :2].tolist() == [tiny.START, tiny.START]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "no-such-model/at-all"}, "cannot load 'no-such-model/at-all'"),
        ({"processor": "no-such-tokenizer"}, "cannot load 'no-such-tokenizer'"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, not 'float64'"),
        ({"attention": "fast"}, "attention must be one of sdpa, eager, flash_attention_2, not 'fast'"),
        ({"attention": "flash_attention_2"}, "attention: flash_attention_2 needs dtype: float16 or bfloat16"),
        (
            {"modle": "x"},
            "unexpected keyword argument 'modle' (it takes: data, split, columns, filter, limit, streaming, ",
        ),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], said: str, model: Path, data: str) -> None:
    with pytest.raises(TaskError) as caught:
        load(**{"model": model, "data": data, **options})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_adapter_or_library_is_one_line(
    model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="needs pip install peft")
    with pytest.raises(TaskError, match=r"cannot load adapter .*nowhere") as caught:
        load(model, data, adapter=str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TaskError, match="adapter needs the package peft: pip install"):
        load(model, data, adapter=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu_accurate"])
def test_gelus_tanh_approximation_is_computed_by_one_kernel(activation: str, tmp_path: Path, data: str) -> None:
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, activation_function=activation, bos_token_id=2, eos_token_id=3,
        **tiny.SIZE,
    )  # fmt: skip
    plain = tiny.save_model(tmp_path / "gpt2", AutoModelForCausalLM, config).double()
    tiny.save_tokenizer(tmp_path / "gpt2", template="$A")
    loaded = tiny.load("causal-lm", tmp_path / "gpt2", data, text_column="text")
    assert not {type(module).__name__ for module in loaded.model.modules()} & {
        type(layer.mlp.act).__name__ for layer in plain.transformer.h
    }
    inputs = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.double()(inputs).logits, plain(inputs).logits, rtol=1e-9, atol=1e-9)
