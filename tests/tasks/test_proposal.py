"""Recognition of columns: of the right ones, and a refusal with the option to give where two are possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from npeff.tasks.errors import TaskError
from npeff.tasks.proposal import Columns, propose

TEXTS = ["a small cat", "the dog sings", "a bird is near"]
MODELS = {
    "classifier": {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}},
    "generic": {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
    "tags": {"architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": "B"}},
    "images": {"architectures": ["ViTForImageClassification"], "id2label": {"0": "red", "1": "blue"}},
    "language": {"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257},
    "pairs": {"architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128},
    "encoder": {"architectures": ["BertModel"]},
}
FOUND: dict[str, tuple[str, dict[str, list[Any]], dict[str, Any]]] = {
    "a label by its name": (
        "classifier",
        {"text": TEXTS, "label": ["no", "yes", "no"], "other": ["yes", "yes", "no"]},
        {"text_columns": ["text"], "label_column": "label"},
    ),
    "a label by its values": (
        "classifier",
        {"review": TEXTS, "verdict": ["No", "YES", None], "stars": [1, 5, 2]},
        {"text_columns": ["review"], "label_column": "verdict"},
    ),
    "a numbered pair and an id": (
        "classifier",
        {"pair_ID": [7, 8, 9], "sentence_A": TEXTS, "sentence_B": TEXTS, "label": [0, 1, 1]},
        {"text_columns": ["sentence_A", "sentence_B"], "label_column": "label", "id_column": "pair_ID"},
    ),
    "a known pair": (
        "classifier",
        {"Premise": TEXTS, "Hypothesis": TEXTS, "note": TEXTS, "label": [0, 1, 1]},
        {"text_columns": ["Premise", "Hypothesis"], "label_column": "label"},
    ),
    "no id with repeated values": ("language", {"text": TEXTS, "id": [1, 1, 2]}, {"text_column": "text"}),
    "words and tags": (
        "tags",
        {"tokens": [["a", "b"]], "ner_tags": [[0, 1]]},
        {"words_column": "tokens", "tags_column": "ner_tags"},
    ),
    "a prompt and a completion": (
        "language",
        {"prompt": TEXTS, "completion": TEXTS},
        {"prompt_column": "prompt", "text_column": "completion"},
    ),
    "a source and a target": (
        "pairs",
        {"document": TEXTS, "summary": TEXTS, "url": ["a b", "c d", "e f"]},
        {"source_column": "document", "target_column": "summary"},
    ),
    "paths of images": (
        "images",
        {"file": ["a.png", "b.JPG"], "label": ["red", "blue"]},
        {"image_column": "file", "label_column": "label"},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "several columns can be the texts: one, two: give --text": ("classifier", {"one": TEXTS, "two": TEXTS}),
    "several columns can be the labels: first, second: give --label": (
        "classifier",
        {"text": TEXTS, "first": ["no", "yes", "no"], "second": ["no", "yes", "yes"]},
    ),
    "no column of texts is recognized among label: give --text": ("classifier", {"label": [0, 1]}),
    "no column of source and target is recognized among text: give --text twice": ("pairs", {"text": TEXTS}),
    "no column of words is recognized": ("tags", {"other": ["a"]}),
    "LABEL_0, LABEL_1, and column 'label' has neg, pos: give their names in the order of the logits": (
        "generic",
        {"text": TEXTS, "label": ["pos", "neg", "pos"]},
    ),
    "is BertModel, for which no task is known: give --task, one of huggingface-sequence": ("encoder", {"text": TEXTS}),
    "data.jsonl has no column 'txt': it has text": ("language --text txt", {"text": TEXTS}),
}


def proposed(folder: Path, model: str, data: dict[str, list[Any]], chosen: Columns | None = None) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(MODELS[model]))
    (folder / "model.safetensors").touch()
    rows = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = propose(str(folder), str(folder / "data.jsonl"), None, chosen or Columns()).options
    assert options.pop("model") == str(folder)
    assert options.pop("data") == str(folder / "data.jsonl")
    return options


@pytest.mark.parametrize("case", FOUND)
def test_columns_are_recognized(tmp_path: Path, case: str) -> None:
    model, data, expected = FOUND[case]
    assert proposed(tmp_path, model, data) == expected


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_clear_is_refused_with_the_option_to_give(tmp_path: Path, said: str) -> None:
    model, data = REFUSED[said]
    model, _, text = model.partition(" --text ")
    with pytest.raises(TaskError) as raised:
        proposed(tmp_path, model, data, Columns(text=[text]) if text else None)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_chosen_is_not_recognized(tmp_path: Path) -> None:
    data = {"one": TEXTS, "two": TEXTS, "label": ["pos", "neg", "pos"], "gold": ["neg", "neg", "pos"]}
    chosen = Columns(["two"], "gold", ["neg", "pos"])
    assert proposed(tmp_path, "generic", data, chosen) == {
        "text_columns": ["two"],
        "label_column": "gold",
        "label_names": ["neg", "pos"],
    }


def test_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["images"]))
    (tmp_path / "model.safetensors").touch()
    for name in ("red", "blue"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "1.png").touch()
    found = propose(str(tmp_path), str(tmp_path / "pictures"), None, Columns())
    assert found.task == "huggingface-image-classification"
    assert (found.options["image_column"], found.options["label_column"]) == ("image", "label")


def test_without_a_model_the_rows_of_a_table_are_classified(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("x,y,target\n1,2,a\n2,3,b\n")
    found = propose(None, str(tmp_path / "data.csv"), None, Columns())
    assert (found.task, found.options["label_column"]) == ("sklearn-table", "target")
