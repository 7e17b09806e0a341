"""docs/tasks.md: its options are those that there are, its task works."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from npeff.tasks import IGNORED, load_task

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from npeff.tasks import _BUILT_IN
from npeff.tasks.huggingface.pretrained import PretrainedOptions
from npeff.tasks.huggingface.tokens import TextOptions

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
FAMILIES = [name for name in _BUILT_IN if name.startswith("huggingface-")]


def options_in(text: str) -> set[str]:
    """Names in the first column of tables of options."""
    first = re.findall(r"^\| (`[a-z_`, ]+`) \|", text, re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`(\w+)`", cell)}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_common_options_are_all_described() -> None:
    described = options_in(section("Data")) | options_in(section("Models"))
    assert described == {option.name for option in (*fields(PretrainedOptions), *fields(TextOptions))}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_options_of_a_task_are_all_described(name: str) -> None:
    module, _, task = _BUILT_IN[name].partition(":")
    options = {option.name for option in fields(getattr(__import__(module, fromlist=[task]), task).Options)}
    described = section("Options of each task").split(f"\n`{name}`")[1].split("\n`huggingface-")[0]
    assert options_in(described) == options - {option.name for option in fields(TextOptions)}
    assert f"| `{name}` |" in PAGE


def test_the_task_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "sum_task.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    task = load_task("sum_task:SumTask", {"n": 30})
    task.prepare(tmp_path)
    loaded = tiny.Loaded(task, task.model(tmp_path).eval(), task.examples(tmp_path))
    tiny.check_batches(loaded)
    for text, tokens in zip(loaded.column("text"), loaded.examples.tokens(range(30)) or [], strict=True):
        assert [text[token.start : token.stop] for token in tokens] == [token.text for token in tokens]
        assert len(tokens) == text.count("+") + 1
    logits, targets = loaded.logits(range(30)), loaded.targets(range(30))
    assert targets is not None
    live = targets != IGNORED
    assert live.sum(1).tolist() == loaded.column("terms") == list(loaded.examples.lengths() or [])
    first = torch.arange(targets.shape[1]).expand_as(targets) == 0
    assert (logits.argmax(-1) == targets)[live & first].float().mean() > 0.9, "the sum of one digit is easy"
