"""Texts of single tokens, for display."""

from __future__ import annotations

import pytest
from npeff.tasks.huggingface.tokens import token_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BLOCK = "\N{LOWER ONE EIGHTH BLOCK}"


def of(model: models.Model, pieces: object, decoder: object) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def bytes_of_gpt2() -> PreTrainedTokenizerFast:
    vocabulary = {"the": 0, "\u0120the": 1, "\u00e2": 2, "\u010a": 3}
    return of(models.BPE(vocabulary, []), pre_tokenizers.ByteLevel(), decoders.ByteLevel())


@pytest.fixture
def sentence_pieces() -> PreTrainedTokenizerFast:
    vocabulary = [("<unk>", 0.0), (f"{BLOCK}the", -1.0), ("the", -2.0), (BLOCK, -3.0)]
    return of(models.Unigram(vocabulary, unk_id=0), pre_tokenizers.Metaspace(), decoders.Metaspace())


def test_spaces_are_kept_and_parts_of_characters_are_shown_as_in_the_vocabulary(
    bytes_of_gpt2: PreTrainedTokenizerFast,
) -> None:
    assert token_texts(bytes_of_gpt2, [0, 1, 2, 3]) == ["the", " the", "\u00e2", "\n"]


def test_a_word_of_a_sentence_piece_model_begins_with_a_space(sentence_pieces: PreTrainedTokenizerFast) -> None:
    assert token_texts(sentence_pieces, [1, 2, 3]) == [" the", "the", BLOCK]


def test_a_row_of_the_embedding_without_a_token_has_no_text(bytes_of_gpt2: PreTrainedTokenizerFast) -> None:
    assert token_texts(bytes_of_gpt2, [0, 4, 50_000]) == ["the", None, None]
