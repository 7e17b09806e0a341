"""Checks of a task without its model: every mistake is one line with the remedy, and no torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from npeff.tasks.checks import check_task
from npeff.tasks.errors import TaskError
from npeff.tasks.names import BUILT_IN

NAME = "huggingface-sequence-classification"


def folder(path: Path, architecture: str = "BertForSequenceClassification", **config: Any) -> str:
    """A folder with the files of a model that the checks read."""
    path.mkdir()
    labels = {"id2label": {"0": "no", "1": "yes"}} | config
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], **labels}))
    (path / "model.safetensors").touch()
    return str(path)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "data.csv"
    data.write_text("text,other,label\na,b,yes\nc,d,NO\n,,\n")
    return {"model": folder(tmp_path / "model"), "data": str(data), "text_columns": ["text"], "label_column": "label"}


def test_what_is_found(options: dict[str, Any]) -> None:
    facts = check_task(NAME, options)
    assert facts["task"] == f"{NAME}, 4 options"
    assert facts["model"].endswith("model: BertForSequenceClassification")
    assert facts["data"].endswith("data.csv: columns text, other, label")
    assert facts["labels"] == "2 of the first 3 rows have one of 2 classes"


MISTAKES = {
    "task.options.label_colum (did you mean 'label_column'?)": {"label_colum": "label"},
    "task.options.rows (it takes: ": {"rows": 3},
    "task.options.limit must be a whole number or null, not 'ten'": {"limit": "ten"},
    "text_columns: {data} has no column 'txt' (did you mean 'text'?): it has text, other, label": {
        "text_columns": ["txt"]
    },
    "label_column: {data} has no column 'class': it has": {"label_column": "class"},
    "filter: {data} has no column 'group': it has": {"filter": {"group": 1}},
    "label 'b' is not one of no, yes: give label_names": {"label_column": "other"},
    "cannot read {folder}/none.csv: ": {"data": "{folder}/none.csv"},
    "model '{folder}/none' does not exist: correct the path, or give a hub id": {"model": "{folder}/none"},
    "text_columns must be a list of one column, or of two": {"text_columns": ["text", "text", "other"]},
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_one_line_with_the_remedy(options: dict[str, Any], tmp_path: Path, said: str) -> None:
    changes = {
        name: value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value
        for name, value in MISTAKES[said].items()
    }
    with pytest.raises(TaskError) as raised:
        check_task(NAME, options | changes)
    assert said.format(data=options["data"], folder=tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_option_and_an_unknown_task(options: dict[str, Any]) -> None:
    del options["text_columns"]
    with pytest.raises(TaskError, match=f"task '{NAME}' needs task.options.text_columns: add this key"):
        check_task(NAME, options)
    with pytest.raises(TaskError, match=f"unknown task .* \\(did you mean '{NAME}'\\?\\): use one of digits, "):
        check_task("huggingface-sequence-clasification", options)


def test_the_files_of_a_model(options: dict[str, Any], tmp_path: Path) -> None:
    tags = folder(tmp_path / "tags", "BertForTokenClassification")
    with pytest.raises(TaskError, match=r"use task\.name: huggingface-token-classification"):
        check_task(NAME, options | {"model": tags})
    check_task(NAME, options | {"model": tags, "adapter": "adapter"})  # which has the weights of the classifier
    (Path(tags) / "model.safetensors").unlink()
    with pytest.raises(TaskError, match="has no weights"):
        check_task(NAME, options | {"model": tags})
    (Path(tags) / "config.json").write_text("{")
    with pytest.raises(TaskError, match=r"cannot read .*config\.json: .*: save the model again"):
        check_task(NAME, options | {"model": tags})
    (Path(tags) / "config.json").rename(Path(tags) / "adapter_config.json")
    with pytest.raises(TaskError, match="it contains a PEFT adapter: set model to the model without it"):
        check_task(NAME, options | {"model": tags})
    assert check_task(NAME, options | {"model": "owner/name"})["model"] == "owner/name: on the hub, not checked"


def test_only_the_options_are_checked_where_the_files_are_elsewhere(options: dict[str, Any]) -> None:
    absent = options | {"model": "./none", "data": "none.csv"}
    assert check_task(NAME, absent, files=False) == {"task": f"{NAME}, 4 options"}
    with pytest.raises(TaskError, match=r"task\.options\.limits"):
        check_task(NAME, absent | {"limits": 3}, files=False)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.startswith("huggingface-")])
def test_options_of_every_other_task_are_known_from_its_source(name: str) -> None:
    with pytest.raises(TaskError, match=r"does not take task\.options\.no_such_option"):
        check_task(name, {"no_such_option": 1})


def test_the_options_of_a_class_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "raise ImportError\nclass Mine:\n    def __init__(self, width=1, *, depth=2): ...\n"
    (tmp_path / "checked_task.py").write_text(source + "class Free:\n    def __init__(self, **options): ...\n")
    check_task("checked_task:Mine", {"width": 3, "depth": 1})
    with pytest.raises(TaskError, match=r"task\.options\.widht \(did you mean 'width'\?\)"):
        check_task("checked_task:Mine", {"widht": 3})
    assert "when it starts" in check_task("checked_task:Free", {"any": 3})["task"]
    with pytest.raises(TaskError, match=r"checked_task has no Fre \(did you mean 'Free'\?\)"):
        check_task("checked_task:Fre", {})
    with pytest.raises(TaskError, match=r"there is no module no_such_package\.task: install it, or run npeff in"):
        check_task("no_such_package.task:Task", {})
    assert "not found here" in check_task("no_such_package.task:Task", {}, files=False)["task"]


def test_only_the_beginning_of_the_data_is_read(options: dict[str, Any]) -> None:
    with open(options["data"], "a") as file:
        file.write("x,y,yes\n" * 1000 + "x,y,maybe\n")
    assert check_task(NAME, options)["labels"].startswith("999 of the first 1,000 rows")


@pytest.mark.process
def test_a_check_imports_no_torch(options: dict[str, Any]) -> None:
    script = (
        "import sys; from npeff.tasks.checks import check_task; import npeff.stages.validation;"
        f"check_task({NAME!r}, {options!r});"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
