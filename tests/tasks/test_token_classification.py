"""Token classification: a tiny BERT, and a RoBERTa whose tokenizer must be told that words begin with a space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.tasks import IGNORED, UNKNOWN, TaskError

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from tokenizers import pre_tokenizers
from transformers import AutoModelForTokenClassification, BertConfig, RobertaConfig, RobertaTokenizer

WORDS = [["the", "dog", "sleeps", "near", "a", "cat"], ["birds", "?"], ["sleeps", "sleeps", "the", "bird"]]
TAGS = [["O", "B-X", "B-Y", "O", "o", "B-X"], ["b-x", "O"], ["B-Y", "B-Y", "O", "B-X"]]
NUMBERS = [[0, 1, 2, 0, 0, 1], [1, 0], [2, 2, 0, 1]]
COLUMNS = {"words": WORDS, "tags": TAGS, "numbers": NUMBERS, "year": [1, 2, 3]}
NAMES = {"id2label": {0: "O", 1: "B-X", 2: "B-Y"}, "label2id": {"O": 0, "B-X": 1, "B-Y": 2}}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, **NAMES}
FIRST_TOKENS = [[1, 2, 3, 5, 6, 7], [1, 3], [1, 3, 5, 6]]


@pytest.fixture(scope="module", params=["left", "right"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(max_position_embeddings=32, **SMALL, **tiny.SIZE)
    tiny.save_model(folder, AutoModelForTokenClassification, config)
    tiny.save_tokenizer(folder, side=request.param, types=True)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    return tiny.write(tmp_path / "data.parquet", COLUMNS)


def load(model: Path, data: str, **options: Any) -> tiny.Loaded:
    options = {"words_column": "words", "tags_column": "tags", **options}
    return tiny.load("token-classification", model, data, **options)


def called_directly(loaded: tiny.Loaded, row: int) -> torch.Tensor:
    """Logits (T, C) of all tokens of one text."""
    pieces = " ".join(WORDS[row]).replace("sleeps", "sleep ##s").replace("birds", "bird ##s").split()
    with torch.no_grad():
        ids = [tiny.START, *map(tiny.token, pieces), tiny.END]
        return loaded.model(input_ids=torch.tensor([ids])).logits[0]


def test_a_word_is_classified_at_its_first_token(model: Path, data: str) -> None:
    loaded = load(model, data)
    tiny.check_batches(loaded)
    targets = loaded.targets(range(3))
    assert targets is not None
    for row, places in enumerate(FIRST_TOKENS):
        assert (targets[row] != IGNORED).nonzero()[:, 0].tolist() == places
        assert targets[row][places].tolist() == NUMBERS[row]
        torch.testing.assert_close(
            loaded.predictions(range(3))[row], called_directly(loaded, row)[places], rtol=1e-5, atol=1e-5
        )
    assert loaded.examples.class_names == ("O", "B-X", "B-Y")
    assert loaded.column("text")[0] == "the dog/B-X sleeps/B-Y near a cat/B-X"
    assert loaded.column("year") == [1, 2, 3]


@pytest.mark.parametrize("examples", ["sequences", "positions"])
def test_tokens_have_their_places_in_the_text_with_its_marks(examples: str, model: Path, data: str) -> None:
    loaded = load(model, data, examples=examples)
    texts = loaded.column("text")
    for index, tokens in enumerate(loaded.examples.tokens(range(len(texts))) or []):
        assert len(tokens) == loaded.examples.batch([index])["inputs"]["input_ids"].shape[1]
        placed = [token for token in tokens if token.start is not None]
        assert len(placed) == len(tokens) - 2
        assert all(texts[index][token.start : token.stop] == token.text for token in placed)


def test_a_position_is_a_word_in_its_whole_sentence(model: Path, data: str) -> None:
    loaded = load(model, data, examples="positions", tags_column="numbers")
    tiny.check_batches(loaded)
    expected = [(row, word) for row, words in enumerate(WORDS) for word in range(len(words))]
    assert loaded.column("id") == [f"{row}:{word}" for row, word in expected]
    assert loaded.column("label") == [NUMBERS[row][word] for row, word in expected]
    assert loaded.column("word") == [WORDS[row][word] for row, word in expected]
    assert loaded.column("text")[2] == "the dog [sleeps] near a cat"
    assert load(model, data).examples.prediction_texts(expected) == loaded.column("text")
    assert loaded.targets([0]) is None
    logits = loaded.logits(range(len(expected)))
    for example, (row, word) in zip(logits, expected, strict=True):
        at_word = called_directly(loaded, row)[FIRST_TOKENS[row][word]]
        torch.testing.assert_close(example, at_word, rtol=1e-5, atol=1e-5)


def test_of_a_long_sentence_the_words_around_a_prediction_are_shown(model: Path, tmp_path: Path) -> None:
    words = [*14 * ["dog"], "cat", *14 * ["bird"]]
    data = tiny.write(tmp_path / "long.jsonl", {"words": [" ".join(words)]})
    found = load(model, data, tags_column=None, max_length=32).examples.prediction_texts([(0, 14), (0, 0), (0, 28)])
    assert found is not None
    assert found[0] == " ".join(["…", *12 * ["dog"], "[cat]", *12 * ["bird"], "…"])
    assert found[1] == " ".join(["[dog]", *12 * ["dog"], "…"])
    assert found[2] == " ".join(["…", *12 * ["bird"], "[bird]"])


def test_tags_may_be_absent_and_words_may_be_strings(model: Path, tmp_path: Path) -> None:
    columns = {"words": [" ".join(row) for row in WORDS], "tags": [" ".join(map(str, row)) for row in NUMBERS]}
    data = tiny.write(tmp_path / "data.jsonl", columns)
    with_tags, without = load(model, data), load(model, data, tags_column=None)
    torch.testing.assert_close(with_tags.logits(range(3)), without.logits(range(3)))
    targets, unknown = with_tags.targets([0]), without.targets([0])
    assert targets is not None
    assert targets[targets != IGNORED].tolist() == NUMBERS[0]
    assert unknown is not None
    assert unknown[unknown != IGNORED].tolist() == [UNKNOWN] * 6
    assert load(model, data, tags_column=None, examples="positions").column("label") == [None] * 12


def test_words_that_are_cut_off_are_not_predicted(model: Path, data: str) -> None:
    assert len(load(model, data, max_length=5, examples="positions").examples) == 3 + 2 + 2


def test_byte_level_tokenizers_are_given_words_with_a_space_before_each(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, "Ġt", "Ġth"])
    }
    merges = [("Ġ", "t"), ("Ġt", "h")]
    RobertaTokenizer(vocab=vocabulary, merges=merges).save_pretrained(tmp_path / "model")
    config = RobertaConfig(vocab_size=len(vocabulary), max_position_embeddings=40, pad_token_id=1, **SMALL)
    tiny.save_model(tmp_path / "model", AutoModelForTokenClassification, config)
    loaded = load(tmp_path / "model", tiny.write(tmp_path / "data.parquet", COLUMNS))
    tiny.check_batches(loaded)
    assert loaded.batch([0])["inputs"]["input_ids"][0, :3].tolist() == [0, vocabulary["Ġth"], vocabulary["e"]]
    assert [len(found) for found in loaded.predictions(range(3))] == [6, 2, 4]


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"tags": [["O"]] * 3}, {}, "row '0' has 6 words and 1 tags"),
        (
            {"tags": [["O", "B-X", "?", "O", "O", "O"], *TAGS[1:]]},
            {},
            "label '?' is not one of o, b-x, b-y: give label_names",
        ),
        ({}, {"words_column": "year"}, "column 'year' has type int64: give lists, or strings separated by spaces"),
        ({}, {"tags_column": "numbers", "label_names": ["a", "b"]}, "label 2 is not one of the model's 2 classes"),
        ({"words": [[], [], []], "tags": [[], [], []]}, {}, "no row has a prediction"),
    ],
)
def test_a_mistake_is_one_line(
    columns: dict[str, Any], options: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    data = tiny.write(tmp_path / "data.jsonl", COLUMNS | columns)
    with pytest.raises(TaskError) as caught:
        load(model, data, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
