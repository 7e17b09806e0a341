"""Multiple choice: a tiny BERT, against the model called directly on one question at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.tasks import TaskError

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from transformers import AutoModelForMultipleChoice, BertConfig

PROMPTS = ["the dog", "a small bird sings in the tree and", "is the cat near ?"]
CHOICES = [["sleeps", "is a cat", "sings"], ["a bird sings", "the dog", "sleeps near the cat"], ["a", "the", "in"]]
COLUMNS = {
    "prompt": PROMPTS,
    **{name: [row[place] for row in CHOICES] for place, name in enumerate("ABC")},
    "choices": CHOICES,
    "answer": ["B", "a", None],
    "number": [1, 0, None],
}


@pytest.fixture(scope="module", params=["left", "right"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    tiny.save_model(folder, AutoModelForMultipleChoice, BertConfig(max_position_embeddings=32, **small, **tiny.SIZE))
    tiny.save_tokenizer(folder, side=request.param, types=True)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    return tiny.write(tmp_path / "data.parquet", COLUMNS)


def load(model: Path, data: str, **options: Any) -> tiny.Loaded:
    options = {"prompt_column": "prompt", "choice_columns": ["A", "B", "C"], "label_column": "answer", **options}
    return tiny.load("multiple-choice", model, data, **options)


def called_directly(loaded: tiny.Loaded, row: int) -> torch.Tensor:
    """Logits (n,) of the choices of one question, each choice alone and without padding."""
    logits = []
    for choice in CHOICES[row]:
        pieces = [text.replace("sleeps", "sleep ##s").split() for text in (PROMPTS[row], choice)]
        first, second = ([*map(tiny.token, words)] for words in pieces)
        ids = [tiny.START, *first, tiny.END, *second, tiny.END]
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        with torch.no_grad():
            found = loaded.model(input_ids=torch.tensor([[ids]]), token_type_ids=torch.tensor([[types]])).logits
        logits.append(found[0, 0])
    return torch.stack(logits)


def test_the_logits_are_those_of_the_choices(model: Path, data: str) -> None:
    loaded = load(model, data)
    tiny.check_batches(loaded)
    logits = loaded.logits(range(3))
    assert logits.shape == (3, 3)
    for row in range(3):
        torch.testing.assert_close(logits[row], called_directly(loaded, row), rtol=1e-5, atol=1e-5)
    assert loaded.examples.class_names == ("A", "B", "C")
    assert loaded.column("label") == [1, 0, None]
    assert loaded.column("text")[0] == "the dog\nA: sleeps\nB: is a cat\nC: sings"
    assert loaded.column("number") == [1, 0, None]
    assert loaded.lengths() == [8, 16, 9]


def test_choices_may_be_lists_in_one_column(model: Path, data: str) -> None:
    columns, lists = load(model, data), load(model, data, choice_columns=["choices"], label_column="number")
    torch.testing.assert_close(columns.logits(range(3)), lists.logits(range(3)))
    assert lists.examples.class_names == ("0", "1", "2")
    assert lists.column("label") == [1, 0, None]
    named = load(model, data, choice_columns=["choices"], label_names=["a", "b", "c"])
    assert named.examples.class_names == ("a", "b", "c")
    assert named.column("label") == [1, 0, None]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"choice_columns": "A"}, "task.options.choice_columns must be a list, not 'A'"),
        ({"choice_columns": ["A"]}, "column 'A' has type string, not list: give one column per choice"),
        ({"choice_columns": ["A", "D"]}, "has no column 'D'"),
        ({"choice_columns": ["ragged"]}, "row '1' has 2 choices, but the first row has 3: all rows must have"),
        ({"label_column": "prompt"}, "label 'the dog' is not one of a, b, c: give label_names"),
        ({"label_column": "number", "choice_columns": ["A", "C"], "label_names": ["A"]}, "label 1 is not one of"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], said: str, model: Path, tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "data.parquet", COLUMNS | {"ragged": [CHOICES[0], CHOICES[1][:2], CHOICES[2]]})
    with pytest.raises(TaskError) as caught:
        load(model, data, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
