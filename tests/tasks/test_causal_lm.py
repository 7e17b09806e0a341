"""Causal language models: tiny GPT-2, Llama and OPT, against the models called directly on one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.tasks import IGNORED, TaskError

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

TEXTS = ["a small cat", "the dog sleeps and the cat sings near the tree", "a bird", "the bird is in the tree ?"]
PROMPTS = ["the dog and ", "a ", "", "is the cat near "]
COLUMNS = {"key": ["t-0", "t-1", "t-2", "t-3"], "text": TEXTS, "prompt": PROMPTS, "kind": [1, 2, 1, 2]}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, **tiny.SIZE}
CONFIGS = {
    "gpt2": GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, bos_token_id=2, eos_token_id=3, **tiny.SIZE),
    "llama": LlamaConfig(intermediate_size=24, num_key_value_heads=1, max_position_embeddings=32, **SMALL),
    "bloom": BloomConfig(n_layer=2, n_head=2, hidden_size=16, bos_token_id=2, eos_token_id=3, **tiny.SIZE),
}


@pytest.fixture(scope="module", params=[(name, side) for name in CONFIGS for side in ("left", "right")], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer pads on that side; GPT-2's has no padding token."""
    name, side = request.param
    folder = tmp_path_factory.mktemp(name)
    tiny.save_model(folder, AutoModelForCausalLM, CONFIGS[name])
    tiny.save_tokenizer(folder, "[CLS] $A", pad=name != "gpt2", side=side)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny.save_model(folder, AutoModelForCausalLM, CONFIGS["gpt2"])
    tiny.save_tokenizer(folder, "[CLS] $A", pad=False)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    return tiny.write(tmp_path / "data.parquet", COLUMNS)


def load(model: Path, data: str, **options: Any) -> tiny.Loaded:
    return tiny.load("causal-lm", model, data, **{"text_column": "text", "id_column": "key", **options})


def ids_of(text: str) -> list[int]:
    pieces = text.replace("sleeps", "sleep ##s").split()
    return [tiny.START, *map(tiny.token, pieces)]


def called_directly(loaded: tiny.Loaded, tokens: list[int]) -> torch.Tensor:
    """Logits (T, C) of the model on one text, without any padding."""
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor([tokens])).logits[0]


def test_a_row_predicts_each_token_from_those_before_it(model: Path, data: str) -> None:
    loaded = load(model, data)
    tiny.check_batches(loaded)
    assert len(loaded.examples) == 4
    targets = loaded.targets(range(4))
    assert targets is not None
    for index, text in enumerate(TEXTS):
        tokens = ids_of(text)
        torch.testing.assert_close(
            loaded.predictions(range(4))[index], called_directly(loaded, tokens)[:-1], rtol=1e-5, atol=1e-5
        )
        assert targets[index][targets[index] != IGNORED].tolist() == tokens[1:]
        assert loaded.examples.lengths()[index] == len(tokens)  # type: ignore[index]


def test_a_position_is_predicted_from_its_prefix(model: Path, data: str) -> None:
    loaded = load(model, data, examples="positions")
    tiny.check_batches(loaded)
    assert loaded.targets([0, 1]) is None
    expected = [(key, ids_of(text), t) for key, text in zip(COLUMNS["key"], TEXTS, strict=True) for t in range(1, 99)]
    expected = [(key, tokens, t) for key, tokens, t in expected if t < len(tokens)]
    assert loaded.column("id") == [f"{key}:{t}" for key, _, t in expected]
    assert loaded.column("row") == [key for key, _, _ in expected]
    assert loaded.column("position") == [t for _, _, t in expected]
    assert loaded.column("label") == [tokens[t] for _, tokens, t in expected]
    assert loaded.lengths() == [t for _, _, t in expected]
    logits = loaded.logits(range(len(expected)))
    for row, (_, tokens, t) in zip(logits, expected, strict=True):
        torch.testing.assert_close(row, called_directly(loaded, tokens[:t])[-1], rtol=1e-5, atol=1e-5)


def test_some_positions_of_each_row_are_drawn(gpt2: Path, data: str) -> None:
    everything = load(gpt2, data, examples="positions")
    rows = {name: everything.column("row").count(name) for name in COLUMNS["key"]}
    known = {row["id"]: row for row in everything.examples.table().to_pylist()}
    some = load(gpt2, data, examples="positions", positions_per_row=3)
    table = some.examples.table().to_pylist()
    assert [row["row"] for row in table] == [name for name, size in rows.items() for _ in range(min(size, 3))]
    assert all(known[row["id"]] == row for row in table)
    assert [row["position"] for row in table] == [
        place for name in rows for place in sorted(row["position"] for row in table if row["row"] == name)
    ]
    drawn = {load(gpt2, data, examples="positions", positions_per_row=1, limit=n).column("id")[0] for n in (1, 4)}
    assert len(drawn) == 1, "the draw of a row does not depend on the other rows"
    place = list(known).index(table[-1]["id"])
    torch.testing.assert_close(some.logits([len(table) - 1]), everything.logits([place]))


def test_tokens_are_the_positions_that_the_model_reads(model: Path, data: str) -> None:
    rows, positions = load(model, data, prompt_column="prompt"), load(model, data, examples="positions")
    for index, (text, tokens) in enumerate(zip(rows.column("text"), rows.examples.tokens(range(4)) or [], strict=True)):
        assert len(tokens) == rows.examples.batch([index])["inputs"]["input_ids"].shape[1]
        placed = [token for token in tokens if token.start is not None]
        assert len(placed) > 1
        assert all(text[token.start : token.stop] == token.text for token in placed)
    chosen = [0, 3, 5]
    for index, tokens in zip(chosen, positions.examples.tokens(chosen) or [], strict=True):
        assert len(tokens) == positions.examples.batch([index])["inputs"]["input_ids"].shape[1]
        assert {token.start for token in tokens} == {None}, "the text that people read has a mark in it"


def test_a_prompt_is_read_and_not_predicted(gpt2: Path, data: str) -> None:
    loaded = load(gpt2, data, prompt_column="prompt")
    tiny.check_batches(loaded)
    targets = loaded.targets(range(4))
    assert targets is not None
    for index, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        tokens, n_prompt = ids_of(prompt + text), len(ids_of(prompt))
        assert targets[index][targets[index] != IGNORED].tolist() == tokens[n_prompt:]
        expected = called_directly(loaded, tokens)[n_prompt - 1 : -1]
        torch.testing.assert_close(loaded.predictions(range(4))[index], expected, rtol=1e-5, atol=1e-5)
    assert loaded.column("text") == [prompt + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    assert loaded.column("kind") == COLUMNS["kind"]
    assert loaded.column("label") == [None] * 4
    positions = load(gpt2, data, prompt_column="prompt", examples="positions")
    assert len(positions.examples) == int((targets != IGNORED).sum())
    assert positions.column("kind")[0] == 1


@pytest.mark.parametrize(("prompt", "text"), [("a sm", "all cat"), ("a", " small cat")])
def test_a_token_is_the_prompts_if_it_ends_in_it(prompt: str, text: str, gpt2: Path, tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "data.jsonl", {"prompt": [prompt], "text": [text]})
    loaded = load(gpt2, data, prompt_column="prompt", id_column=None)
    targets = loaded.targets([0])
    assert targets is not None
    assert targets[targets != IGNORED].tolist() == [tiny.token("small"), tiny.token("cat")]


def test_the_end_of_a_text_is_predicted_where_the_tokenizer_marks_it(gpt2: Path, tmp_path: Path, data: str) -> None:
    tiny.save_tokenizer(tmp_path / "ending", "[CLS] $A [SEP]")
    loaded = load(gpt2, data, processor=str(tmp_path / "ending"), prompt_column="prompt")
    targets = loaded.targets([2])
    assert targets is not None
    assert targets[targets != IGNORED].tolist() == [*ids_of("a bird")[1:], tiny.END]


def test_a_person_sees_which_token_is_meant(gpt2: Path, data: str) -> None:
    loaded = load(gpt2, data, examples="positions", filter={"key": ["t-0", "t-1"]})
    text, tokens = loaded.column("text"), loaded.column("token")
    assert text[2].endswith("a small [cat]")
    assert tokens[2] == "cat"
    assert text[3 + 2].endswith("the dog [sleep]")
    assert text[-1].startswith("[CLS] the dog")


def test_long_texts_are_cut(gpt2: Path, data: str) -> None:
    loaded = load(gpt2, data, max_length=4)
    assert loaded.lengths() == [4, 4, 3, 4]
    assert loaded.logits(range(4)).shape == (4, 3, len(tiny.VOCABULARY))
    assert len(load(gpt2, data, max_length=4, examples="positions").examples) == 3 + 3 + 2 + 3


def test_only_logits_that_are_needed_are_computed(gpt2: Path, data: str) -> None:
    loaded = load(gpt2, data, prompt_column="prompt", filter={"key": ["t-0", "t-3"]})
    shapes = []
    loaded.model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[:2])))
    loaded.logits([0, 1])
    assert shapes == [(2, 3 + 5)], "positions before the texts' first tokens are left out"


def test_a_text_that_is_cut_before_its_first_token_predicts_nothing(gpt2: Path, data: str) -> None:
    loaded = load(gpt2, data, prompt_column="prompt", max_length=4)
    targets = loaded.targets([0])
    assert targets is not None
    assert (targets == IGNORED).all()
    with pytest.raises(TaskError, match="no row has a prediction: check its columns, or raise max_length"):
        load(gpt2, data, prompt_column="prompt", max_length=4, filter={"key": ["t-0", "t-3"]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text_column": "txt"}, "has no column 'txt'"),
        ({"text_column": "text", "examples": "tokens"}, "examples must be one of sequences, positions, not 'tokens'"),
        ({"text_column": "text", "positions_per_row": 1}, "positions_per_row needs examples: positions"),
        (
            {"text_column": "text", "examples": "positions", "positions_per_row": 0},
            "positions_per_row must be at least 1, not 0",
        ),
        ({"prompt_column": "p"}, "has no column 'p'"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], said: str, gpt2: Path, data: str) -> None:
    with pytest.raises(TaskError) as caught:
        load(gpt2, data, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_tell_where_its_tokens_come_from_is_refused(
    gpt2: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.BatchEncoding.encodings", None)
    with pytest.raises(TaskError, match="has no character offsets: use a fast tokenizer"):
        load(gpt2, data)


def test_a_text_without_tokens_is_named(gpt2: Path, tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path / "bare", "$A")
    data = tiny.write(tmp_path / "data.parquet", {"key": ["x", "y"], "text": ["a cat", ""]})
    with pytest.raises(TaskError, match="the text of row 'y' has no tokens"):
        load(gpt2, data, processor=str(tmp_path / "bare"))


def test_a_prediction_is_shown_with_the_text_before_it(gpt2: Path, data: str) -> None:
    sequences = load(gpt2, data, prompt_column="prompt").examples
    positions = load(gpt2, data, prompt_column="prompt", examples="positions")
    wanted = positions.column("text")
    sizes = [positions.column("row").count(name) for name in COLUMNS["key"]]
    made = [(row, number) for row, size in enumerate(sizes) for number in range(size)]
    assert sequences.prediction_texts(made) == wanted
    assert positions.examples.prediction_texts([(index, 0) for index in range(len(wanted))]) == wanted
    assert wanted[0] == "[CLS] the dog and [a]"
