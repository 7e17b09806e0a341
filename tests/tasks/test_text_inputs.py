"""The embeddings of the tokens as inputs of classifiers of texts: the logits at them are those of the tokens, in every
model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.models.loaded import LoadedModel
from npeff.tasks import TaskError
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from text_models import CLASSIFIERS, PAIR, SMALL, T5, TEXTS, check_equal, classifier, spec, tokens_of
from transformers import (
    AutoModelForSequenceClassification,
    ByT5Tokenizer,
    CanineConfig,
    CanineForSequenceClassification,
    T5Config,
)


def weight_gradient(loaded: LoadedModel, layer: nn.Module, batch: Any, direction: Tensor) -> Tensor:
    """The gradient of the embedding table, through the plain model."""
    (weight,) = layer.parameters()
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad((loaded.logits(loaded.model, batch) * direction).sum(), weight)
    return gradient


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_gradients_at_the_embeddings_add_up_to_that_of_the_table(name: str, tmp_path: Path) -> None:
    """For every model: the table acts through the embeddings of the tokens only, so both gradients must agree."""
    loaded = classifier(tmp_path, CLASSIFIERS[name])
    batch, inputs = check_equal(loaded, [0, 1, 2, 3])
    assert inputs.values.shape == (*batch["input_ids"].shape, 16)
    values = inputs.values.clone().requires_grad_()
    logits = inputs.logits(values)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((logits * direction).sum(), values)
    inner: Any = loaded.model
    whole = inner.get_input_embeddings()
    layer = inner.get_encoder().get_input_embeddings() if inner.config.is_encoder_decoder else whole
    expected = weight_gradient(loaded, layer, batch, direction)
    (weight,) = layer.parameters()
    (found,) = torch.autograd.grad(layer(batch["input_ids"]), weight, gradient)
    compared = torch.ones(len(weight), dtype=torch.bool)
    if inner.config.is_encoder_decoder:
        compared[inner.config.decoder_start_token_id] = False  # the first token of the decoder is not one of the text
    scale = expected[compared].abs().max()
    torch.testing.assert_close(found[compared], expected[compared], rtol=1e-4, atol=1e-5 * float(scale))
    assert scale > 1e-3


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_positions_are_the_tokens_in_order_and_special_tokens_and_padding_are_masked(name: str, tmp_path: Path) -> None:
    loaded = classifier(tmp_path, CLASSIFIERS[name])
    inputs = loaded.inputs(loaded.batch([1, 2]))
    assert (inputs.positions, inputs.exchangeable, inputs.groups) == ((1,), True, ("text", "other"))
    long, short = tokens_of(inputs, loaded, [1, 2])
    shown = [(text, group) for text, used, group in short if used]
    assert shown == [("dog", "text"), ("the", "other"), ("bird", "other")]
    assert [text for text, used, _ in long if used] == [*TEXTS[1].replace("sleeps", "sleep s").split(), "a", "dog"]
    assert all(text in ("[CLS]", "[SEP]") and not group for text, used, group in short + long if not used)
    for index in (1, 2):
        alone = loaded.inputs(loaded.batch([index]))
        assert alone.present is not None
        assert alone.present.all()


def test_padding_on_the_left_is_marked(tmp_path: Path) -> None:
    loaded = classifier(tmp_path, CLASSIFIERS["xlnet"])
    inputs = loaded.inputs(loaded.batch([1, 2]))
    assert inputs.present is not None
    assert not inputs.present[1, 0]
    assert inputs.present[:, -1].all()


def test_one_text_has_no_groups(tmp_path: Path) -> None:
    loaded = classifier(tmp_path, CLASSIFIERS["bert"], text_columns=["text"])
    _, inputs = check_equal(loaded, [0, 3])
    assert (tuple(inputs.groups), inputs.group_of) == ((), None)


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
def test_other_values_are_other_embeddings(name: str, tmp_path: Path) -> None:
    """The slow definition, where the model itself takes embeddings and needs no token ids: one example at a time."""
    loaded = classifier(tmp_path, CLASSIFIERS[name])
    for index in range(4):
        batch = loaded.batch([index])
        inputs = loaded.inputs(batch)
        values = inputs.values + torch.randn(inputs.values.shape, generator=torch.Generator().manual_seed(index))
        given = {key: value for key, value in batch.items() if key not in ("input_ids", "segments")}
        with torch.no_grad():
            expected = loaded.model(inputs_embeds=values, **given).logits
            torch.testing.assert_close(inputs.logits(values), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_half_precision_is_computed_in_single_precision(dtype: str, tmp_path: Path) -> None:
    loaded = classifier(tmp_path, CLASSIFIERS["bert"], dtype=dtype)
    exact = classifier(tmp_path, CLASSIFIERS["bert"])
    loaded.check_inputs([0, 1])
    inputs = loaded.inputs(loaded.batch([0, 1]))
    assert inputs.values.dtype == torch.float32
    assert inputs.logits(inputs.values).dtype == torch.float32
    assert next(loaded.model.parameters()).dtype == getattr(torch, dtype), "the model itself is as before"
    for parameter, half in zip(exact.model.parameters(), loaded.model.parameters(), strict=True):
        parameter.data.copy_(half.data)
    torch.testing.assert_close(inputs.logits(inputs.values), exact.logits(exact.model, exact.batch([0, 1])))


def test_flash_attention_is_refused(tmp_path: Path) -> None:
    loaded = classifier(tmp_path, CLASSIFIERS["bert"])
    object.__setattr__(loaded.task.options, "attention", "flash_attention_2")  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match=r"flash_attention_2 computes in half precision.*: set attention to sdpa"):
        loaded.inputs(loaded.batch([0]))


def test_a_model_without_a_table_of_tokens_is_refused(tmp_path: Path) -> None:
    config = CanineConfig(**SMALL, num_labels=3, num_hash_buckets=8)
    loaded = classifier(tmp_path, CLASSIFIERS["bert"])
    object.__setattr__(loaded, "model", CanineForSequenceClassification(config))
    with pytest.raises(TaskError, match=r"has no table of token embeddings, .*: use a model with one"):
        loaded.inputs(loaded.batch([0]))


def test_a_model_that_does_not_use_its_table_is_refused(tmp_path: Path) -> None:
    loaded = classifier(tmp_path, CLASSIFIERS["bert"])
    loaded.model.get_input_embeddings = lambda: nn.Embedding(100, 16)  # type: ignore[operator, method-assign]
    with pytest.raises(TaskError, match="does not embed the tokens of a batch in its input embedding"):
        loaded.check_inputs([0])


@pytest.mark.slow
def test_the_embeddings_of_a_real_model_give_its_logits() -> None:
    shared = Path(os.environ.get("NPEFF_SHARED_DATA", ""))
    model, pairs = shared / "models/minilm-sick", shared / "data/sick/SICK_test_annotated.txt"
    if "NPEFF_SHARED_DATA" not in os.environ or not model.is_dir() or not pairs.is_file():
        pytest.skip("NPEFF_SHARED_DATA names no folder with models/minilm-sick and data/sick/SICK_test_annotated.txt")
    columns = ["sentence_A", "sentence_B"]
    loaded = spec("sequence-classification", model, str(pairs), text_columns=columns, limit=32).load()
    indices = list(range(32))
    batch, inputs = check_equal(loaded, indices)
    assert inputs.values.shape == (*batch["input_ids"].shape, 384)
    for index, tokens in zip(indices, tokens_of(inputs, loaded, indices), strict=True):
        text = loaded.examples.table()["text"][index].as_py().lower().split("\n")
        for column, sentence in zip(columns, text, strict=True):
            assert "".join(token or "" for token, _, group in tokens if group == column).lower() == "".join(
                sentence.split()
            )


def test_a_text_with_the_text_of_a_special_token_is_an_input(tmp_path: Path) -> None:
    """What is special is the place that the tokenizer gives a token, not its number."""
    tiny.save_model(tmp_path, AutoModelForSequenceClassification, CLASSIFIERS["bert"])
    tiny.save_tokenizer(tmp_path)
    data = tiny.write(tmp_path / "data.parquet", {"text": ["a [SEP] cat", "unheard dog", ""]})
    loaded = spec("sequence-classification", tmp_path, data, text_columns=["text"]).load()
    loaded.check_inputs([0, 1, 2])
    inputs = loaded.inputs(loaded.batch([0, 1, 2]))
    assert inputs.mask is not None
    assert inputs.mask.sum(1).tolist() == [3, 2, 0]


def test_an_adapter_of_the_embeddings_takes_part(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs pip install 'npeff-pipeline[hf]'")
    model = tiny.save_model(tmp_path / "model", AutoModelForSequenceClassification, CLASSIFIERS["bert"])
    tiny.save_tokenizer(tmp_path / "model")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["word_embeddings", "query"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    data = tiny.write(tmp_path / "data.parquet", {"text": TEXTS})
    options = {"text_columns": ["text"], "adapter": str(tmp_path / "adapter"), "label_names": ["a", "b", "c"]}
    loaded = spec("sequence-classification", tmp_path / "model", data, **options).load()
    batch, inputs = check_equal(loaded, [0, 1, 2, 3])
    plain = spec("sequence-classification", tmp_path / "model", data, text_columns=["text"]).load()
    assert not torch.allclose(plain.inputs(batch).values, inputs.values, atol=1e-3)


def test_a_tokenizer_that_does_not_tell_texts_apart_gives_no_groups(tmp_path: Path) -> None:
    config = T5Config(**T5, vocab_size=384, num_labels=3, eos_token_id=1, decoder_start_token_id=0)
    tiny.save_model(tmp_path, AutoModelForSequenceClassification, config)
    ByT5Tokenizer().save_pretrained(tmp_path)
    data = tiny.write(tmp_path / "data.parquet", {"text": ["ab", "c"], "other": ["d", "ef"]})
    loaded = spec("sequence-classification", tmp_path, data, text_columns=PAIR).load()
    _, inputs = check_equal(loaded, [0, 1])
    assert [[used for _, used, _ in row] for row in tokens_of(inputs, loaded, [0, 1])] == [
        [True, True, False, True, False],
        [True, False, True, True, False],
    ]
    assert inputs.group_of is not None
    assert (inputs.group_of == -1).all()


def test_a_column_that_is_used_twice_is_two_groups(tmp_path: Path) -> None:
    loaded = classifier(tmp_path, CLASSIFIERS["bert"], text_columns=["text", "text"])
    inputs = loaded.inputs(loaded.batch([2]))
    assert list(inputs.groups) == ["text", "text (2)"]
    found = [(token, group) for token, used, group in tokens_of(inputs, loaded, [2])[0] if used]
    assert found == [("dog", "text"), ("dog", "text (2)")]
