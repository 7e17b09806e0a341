"""The embeddings of the tokens as inputs of text models: the logits at them are those of the tokens, in every model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.tasks import Inputs, TaskError
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    ByT5Tokenizer,
    CanineConfig,
    CanineForSequenceClassification,
    DistilBertConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LongformerConfig,
    MarianConfig,
    PegasusConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

TEXTS = ["a small cat", "the dog sleeps and the cat sings", "dog", "a bird sings in the small tree near the dog"]
OTHERS = ["the cat is small ?", "a dog", "the bird", "the tree"]
PAIR = ["text", "other"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 40, "eos_token_id": tiny.END}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.START,
    "eos_token_id": tiny.END,
    "decoder_start_token_id": tiny.END,
    "scale_embedding": True,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": tiny.PAD}
CLASSIFIERS: dict[str, Any] = {
    "bert": BertConfig(**SMALL, **tiny.SIZE, num_labels=3),
    "roberta": RobertaConfig(**SMALL, **tiny.SIZE, num_labels=3, pad_token_id=0, max_position_embeddings=42),
    "distilbert": DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=3, **tiny.SIZE),
    "gpt2": GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, num_labels=3, bos_token_id=2, **tiny.SIZE),
    "llama": LlamaConfig(**LLAMA, **tiny.SIZE, num_labels=3),
    "gemma": GemmaConfig(**LLAMA, **tiny.SIZE, num_labels=3),
    "xlnet": XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, num_labels=3, **tiny.SIZE),
    "longformer": LongformerConfig(
        **SMALL, **tiny.SIZE, num_labels=3, attention_window=8, pad_token_id=0, max_position_embeddings=50
    ),
    "bart": BartConfig(**BART, **tiny.SIZE, num_labels=3),
    "t5": T5Config(**T5, **tiny.SIZE, num_labels=3, eos_token_id=tiny.END, decoder_start_token_id=tiny.PAD),
}


def spec(family: str, folder: Path, data: str, **options: Any) -> ModelSpec:
    return ModelSpec(
        f"huggingface-{family}", {"model": str(folder), "data": data, **options}, Path("unused"), ("*",), (), "cpu"
    )


def classifier(folder: Path, config: Any, **options: Any) -> LoadedModel:
    template = {"xlnet": "$A [SEP] [CLS]", "t5": "$A [SEP]"}.get(config.model_type, "[CLS] $A [SEP]")
    tiny.save_model(folder, AutoModelForSequenceClassification, config)
    tiny.save_tokenizer(folder, template, types=config.model_type == "bert")
    data = tiny.write(folder / "data.parquet", {"text": TEXTS, "other": OTHERS})
    return spec("sequence-classification", folder, data, **{"text_columns": PAIR, **options}).load()


def check_equal(loaded: LoadedModel, indices: list[int]) -> tuple[Any, Inputs]:
    """The logits at the embeddings of a batch are those of its tokens, to the last bits."""
    loaded.check_inputs(indices)
    batch = loaded.batch(indices)
    inputs = loaded.inputs(batch, len(indices))
    with torch.no_grad():
        torch.testing.assert_close(inputs.logits(inputs.values), loaded.logits(loaded.model, batch), rtol=1e-6, atol=0)
        changed = inputs.logits(inputs.values.flip(-1))
        assert not torch.allclose(changed, inputs.logits(inputs.values), atol=1e-3)
        torch.testing.assert_close(loaded.logits(loaded.model, batch), inputs.logits(inputs.values), rtol=1e-6, atol=0)
    return batch, inputs


def tokens_of(inputs: Inputs, loaded: LoadedModel, indices: list[int]) -> list[list[tuple[str | None, bool, str]]]:
    """Text, mask and group of each position that is no padding."""
    assert inputs.mask is not None
    assert inputs.present is not None
    tokens = loaded.input_tokens(indices)
    assert tokens is not None
    group_of = torch.full_like(inputs.mask, -1, dtype=torch.int64) if inputs.group_of is None else inputs.group_of
    found = []
    for row, mask, present, groups in zip(tokens, inputs.mask, inputs.present, group_of, strict=True):
        assert int(present.sum()) == len(row)
        names = [inputs.groups[group] if group >= 0 else "" for group in groups[present].tolist()]
        found.append(list(zip((token.text for token in row), mask[present].tolist(), names, strict=True)))
        assert not mask[~present].any()
        assert (groups[~present] == -1).all()
    return found


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
    norms = inputs.values.norm(dim=2)
    assert np.isfinite(norms.numpy()).all()


def made(
    folder: Path, family: str, factory: Any, config: Any, template: str, columns: dict[str, Any], **options: Any
) -> LoadedModel:
    tiny.save_model(folder, factory, config)
    tiny.save_tokenizer(folder, template, types=config.model_type == "bert")
    return spec(family, folder, tiny.write(folder / "data.parquet", columns), **options).load()


WORDS = [text.split() for text in TEXTS]
GENERATORS: dict[str, Any] = {
    "gpt2": GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, bos_token_id=2, eos_token_id=3, **tiny.SIZE),
    "llama": LlamaConfig(**LLAMA, **tiny.SIZE),
    "gemma": GemmaConfig(**LLAMA, **tiny.SIZE),
    "gemma3": Gemma3TextConfig(**LLAMA, **tiny.SIZE),
    "bart": BartConfig(**BART, **tiny.SIZE, is_decoder=True),
}
TRANSLATORS: dict[str, Any] = {
    "t5": T5Config(**T5, **tiny.SIZE, eos_token_id=tiny.END, decoder_start_token_id=tiny.PAD),
    "bart": BartConfig(**BART, **tiny.SIZE),
    "marian": MarianConfig(**BART, **tiny.SIZE),
    "pegasus": PegasusConfig(**BART, **tiny.SIZE),
}


@pytest.mark.parametrize("examples", ["sequences", "positions"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_tagged_words(name: str, examples: str, tmp_path: Path) -> None:
    loaded = made(
        tmp_path,
        "token-classification",
        AutoModelForTokenClassification,
        CLASSIFIERS[name],
        "[CLS] $A [SEP]",
        {"words": WORDS},
        words_column="words",
        examples=examples,
    )
    indices = [0, 1, 2, 3]
    _, inputs = check_equal(loaded, indices)
    assert not inputs.groups
    last = tokens_of(inputs, loaded, indices)[3]
    texts = WORDS[1] if examples == "positions" else WORDS[3]
    assert [token for token, used, _ in last if used] == " ".join(texts).replace("sleeps", "sleep s").split()


@pytest.mark.parametrize("examples", ["sequences", "positions"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generated_texts_with_prompts(name: str, examples: str, tmp_path: Path) -> None:
    loaded = made(
        tmp_path,
        "causal-lm",
        AutoModelForCausalLM,
        GENERATORS[name],
        "[CLS] $A",
        {"text": TEXTS, "prompt": [f"{text} " for text in OTHERS]},
        text_column="text",
        prompt_column="prompt",
        examples=examples,
    )
    indices = [0, 1, 5, 6] if examples == "positions" else [0, 1, 2, 3]
    _, inputs = check_equal(loaded, indices)
    assert list(inputs.groups) == ["prompt", "text"]
    first = tokens_of(inputs, loaded, indices)[1]
    expected = [("[CLS]", False, ""), *((word, True, "prompt") for word in OTHERS[0].split())]
    if examples == "positions":  # the second token of the first text, before which is its first
        expected = [*expected, ("a", True, "text")]
    else:
        words = [
            ("the", True),
            ("dog", True),
            ("sleep", True),
            ("s", True),
            ("and", True),
            ("the", True),
            ("cat", True),
        ]
        expected = [("[CLS]", False, ""), ("a", True, "prompt"), ("dog", True, "prompt")]
        expected += [(word, used, "text") for word, used in [*words, ("sings", True)]]
    assert first == expected


@pytest.mark.parametrize("examples", ["sequences", "positions"])
@pytest.mark.parametrize("name", TRANSLATORS)
def test_sources_of_targets(name: str, examples: str, tmp_path: Path) -> None:
    """Also of a target that is the source, with the same tokens in the decoder."""
    loaded = made(
        tmp_path,
        "seq2seq-lm",
        AutoModelForSeq2SeqLM,
        TRANSLATORS[name],
        "$A [SEP]",
        {"text": TEXTS, "other": [TEXTS[0], *OTHERS[1:]]},
        source_column="text",
        target_column="other",
        examples=examples,
    )
    _, inputs = check_equal(loaded, [0, 1, 2, 3])
    tokens = tokens_of(inputs, loaded, [0, 1, 2, 3])
    assert tokens[0] == [("a", True, ""), ("small", True, ""), ("cat", True, ""), ("[SEP]", False, "")]
    assert not inputs.groups
    shown = loaded.examples.table()["text"].to_pylist()
    for text, row in zip(shown, loaded.input_tokens([0, 1, 2, 3]) or [], strict=False):
        assert all(text[token.start : token.stop] == token.text for token in row if token.start is not None)


CHOICES = [["a cat", "the bird sings"], ["sleeps", "in the tree ?"], ["is small", "a dog"], ["near", "and"]]


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlnet"])
def test_choices(name: str, lists: bool, tmp_path: Path) -> None:
    columns = {"prompt": OTHERS, "A": [a for a, _ in CHOICES], "B": [b for _, b in CHOICES], "both": CHOICES}
    loaded = made(
        tmp_path,
        "multiple-choice",
        AutoModelForMultipleChoice,
        CLASSIFIERS[name],
        "$A [SEP] [CLS]" if name == "xlnet" else "[CLS] $A [SEP]",
        columns,
        prompt_column="prompt",
        choice_columns=["both"] if lists else ["A", "B"],
    )
    batch, inputs = check_equal(loaded, [0, 1])
    assert inputs.positions == (1, 2)
    assert inputs.values.shape == (*batch["input_ids"].shape, 16)
    names = ["both[0]", "both[1]"] if lists else ["A", "B"]
    assert list(inputs.groups) == ["prompt", *names]
    found = [(token, group) for token, used, group in tokens_of(inputs, loaded, [0, 1])[1] if used]
    prompt = [("a", "prompt"), ("dog", "prompt")]
    second = [(word, names[1]) for word in CHOICES[1][1].split()]
    assert found == [*prompt, ("sleep", names[0]), ("s", names[0]), *prompt, *second]
    shown = loaded.examples.table()["text"].to_pylist()
    for text, row in zip(shown, loaded.input_tokens([0, 1, 2, 3]) or [], strict=True):
        assert all(text[token.start : token.stop] == token.text for token in row if token.start is not None)


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


def test_only_the_encoder_gets_other_values_if_the_decoder_embeds_in_the_same_layer(tmp_path: Path) -> None:
    """Here, even the tokens are the same, and the slow definition is a model that takes embeddings."""
    text = " ".join(["[SEP]"] * 3)
    loaded = made(
        tmp_path,
        "seq2seq-lm",
        AutoModelForSeq2SeqLM,
        TRANSLATORS["bart"],
        "$A [SEP]",
        {"text": [text], "other": [text]},
        source_column="text",
        target_column="other",
    )
    model: Any = loaded.model
    model.set_input_embeddings(model.get_input_embeddings())
    assert model.get_encoder().embed_tokens is model.get_decoder().embed_tokens
    inputs = loaded.inputs(loaded.batch([0]))
    loaded.check_inputs([0])
    values = inputs.values + torch.randn(inputs.values.shape, generator=torch.Generator().manual_seed(0))
    decoder = torch.full((1, 4), tiny.END)
    with torch.no_grad():
        expected = model(inputs_embeds=values, decoder_input_ids=decoder).logits
        torch.testing.assert_close(inputs.logits(values), expected, rtol=1e-5, atol=1e-5)


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
