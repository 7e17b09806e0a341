"""The embeddings of the tokens as inputs of tagged words, generated texts, translations and choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from text_models import BART, CLASSIFIERS, LLAMA, OTHERS, T5, TEXTS, check_equal, made, tokens_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    BartConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    PegasusConfig,
    T5Config,
)

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
