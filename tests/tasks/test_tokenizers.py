"""Tokenizers of every form give the tokens of the text and the same tokens each time, or are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from npeff.tasks import TaskError

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 400}
SPECIAL = [("[CLS]", tiny.START), ("[SEP]", tiny.END)]
WORDS = [word for word in tiny.WORDS if word.isalpha()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    config = transformers.BertConfig(num_labels=3, max_position_embeddings=64, **SMALL)
    for head in ("SequenceClassification", "TokenClassification"):
        tiny.save_model(folder / head, getattr(transformers, f"AutoModelFor{head}"), config)
    return folder


def save(tokenizer: Tokenizer, folder: Path, **options: Any) -> str:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", **options).save_pretrained(folder)
    return str(folder)


def bpe(bytes_: bool = False, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel() if bytes_ else pre_tokenizers.Whitespace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_ else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(tiny.VOCABULARY)[:4], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A tokenizer that puts a mark in front of every word, also of an unknown one."""
    special = [(token, 0.0) for token in list(tiny.VOCABULARY)[:4]]
    tokenizer = Tokenizer(models.Unigram([*special, ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)], unk_id=1))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def word_level(single: str, pair: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(tiny.VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=SPECIAL)
    return tokenizer


def load(folder: Path, tmp_path: Path, columns: dict[str, list[str]], processor: str, **options: Any) -> tiny.Loaded:
    data = tiny.write(tmp_path / "data.parquet", columns)
    options = {"text_columns": list(columns), "processor": processor, **options}
    return tiny.load("sequence-classification", folder / "SequenceClassification", data, **options)


def check_refused(said: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(TaskError) as caught:
        load(*arguments, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dropout_of_a_tokenizer_is_off(folder: Path, tmp_path: Path) -> None:
    """It chooses tokens at random, so that every worker would have others."""
    columns = {"text": ["the small cat sings and the dog sings"] * 20}
    plain, random = (
        load(folder, tmp_path, columns, save(bpe(unk_token="[UNK]", dropout=dropout), tmp_path / str(dropout)))
        for dropout in (None, 0.5)
    )
    assert random.batch(range(20))["input_ids"].tolist() == plain.batch(range(20))["input_ids"].tolist()


UNKNOWN = {
    "a mark for every word": (sentencepiece, {"unk_token": "[UNK]"}, ["кот и собака", "日本語です"]),
    "dropped words": (bpe, {}, ["a собака кот дом", "a 日本語です 日本語"]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_texts_that_the_tokenizer_mostly_does_not_know_are_refused_whatever_it_makes_of_them(
    name: str, folder: Path, tmp_path: Path
) -> None:
    make, options, texts = UNKNOWN[name]
    processor = save(make(), tmp_path / "tokenizer", **options)
    check_refused(
        "set processor to the tokenizer of the model, or choose", folder, tmp_path, {"text": texts}, processor
    )
    known = {"text": [*texts, "the small cat and the dog", "the bird sings in the tree near the cat"]}
    assert len(load(folder, tmp_path, known, processor).examples) == 4


def test_a_tokenizer_of_bytes_knows_every_text(folder: Path, tmp_path: Path) -> None:
    processor = save(bpe(bytes_=True), tmp_path / "tokenizer")
    assert len(load(folder, tmp_path, {"text": ["日本語です", "кот 🙂", "e\u0301\0"]}, processor).examples) == 3


@pytest.mark.parametrize(("columns", "least"), [(["text"], 3), (["text", "other"], 5)])
def test_max_length_leaves_room_for_every_text(columns: list[str], least: int, folder: Path, tmp_path: Path) -> None:
    """Tokenizers do not truncate at all if there is less room than for the special tokens."""
    template = word_level("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
    processor = save(template, tmp_path / "tokenizer", unk_token="[UNK]")
    table = {name: ["the small cat", "a dog"] for name in columns}
    for length in range(1, least):
        said = f"special tokens: set max_length to at least {least}"
        check_refused(said, folder, tmp_path, table, processor, max_length=length)
    loaded = load(folder, tmp_path, table, processor, max_length=least)
    assert loaded.batch([0, 1])["input_ids"].shape == (2, least)


def test_a_text_that_the_tokenizer_leaves_longer_than_max_length_is_refused(folder: Path, tmp_path: Path) -> None:
    doubled = word_level("$A [SEP] $A", "$A [SEP] $B")
    processor = save(doubled, tmp_path / "tokenizer", unk_token="[UNK]")
    said = "truncates row '0' to 7 tokens, not to 4"
    check_refused(said, folder, tmp_path, {"text": ["the small cat and a dog"]}, processor, max_length=4)


def test_a_word_whose_first_token_is_cut_off_is_not_classified(folder: Path, tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer", truncation_side="left")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tiny.write(tmp_path / "data.parquet", {"words": [["a", "dog", "sleeps", "near"], ["the", "cat"]]})
    options = {"words_column": "words", "examples": "positions", "processor": str(tmp_path / "tokenizer")}
    loaded = tiny.load("token-classification", folder / "TokenClassification", data, max_length=4, **options)
    assert loaded.batch([0])["inputs"]["input_ids"][0, 1:3].tolist() == [tiny.token("##s"), tiny.token("near")]
    assert loaded.column("word") == ["near", "the", "cat"]
