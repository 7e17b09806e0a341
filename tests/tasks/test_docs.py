"""docs/tasks.md: its options are those that there are, its task works."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.tasks import IGNORED, Examples, Inputs, load_task
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from npeff.tasks.huggingface.options import PretrainedOptions, TextOptions
from npeff.tasks.names import BUILT_IN
from npeff.tasks.planted import coloured_digits
from npeff.tasks.planted.coloured_digits import ColouredDigitsTask

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
FAMILIES = [name for name in BUILT_IN if name.startswith("huggingface-")]


def options_in(text: str) -> set[str]:
    """Names in the first column of tables of options."""
    first = re.findall(r"^\| (`[a-z_`, ]+`) \|", text, re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`(\w+)`", cell)}


def sources(title: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", section(title), re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_common_options_are_all_described() -> None:
    described = options_in(section("Data")) | options_in(section("Models"))
    assert described == {option.name for option in (*fields(PretrainedOptions), *fields(TextOptions))}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_options_of_a_task_are_all_described(name: str) -> None:
    module, _, task = BUILT_IN[name].partition(":")
    options = {option.name for option in fields(getattr(__import__(module, fromlist=[task]), task).Options)}
    described = section("Options of each task").split(f"\n`{name}`")[1].split("\n`huggingface-")[0]
    assert options_in(described) == options - {option.name for option in fields(TextOptions)}
    assert f"| `{name}` |" in PAGE


def test_the_options_of_coloured_digits_are_all_described_with_their_defaults() -> None:
    described = section("Ground truth").split("**`coloured-digits`**")[1].split("**`planted-heuristics`**")[0]
    options = inspect.signature(ColouredDigitsTask).parameters
    assert options_in(described) == set(options)
    for name, said in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", described, re.MULTILINE):
        default = options[name].default
        if name == "strength":
            assert float(said) == coloured_digits._STRENGTH
        elif name == "weight":
            weights = [coloured_digits._WEIGHTS[each] for each in ("share", "balance", "reciprocal", "dropout")]
            assert [float(each) for each in said.split(", ")] == weights
        else:
            assert said.strip("`") == ("none" if default is None else str(default))


def test_the_task_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = sources("A task of your own")
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
    assert live.sum(1).tolist() == loaded.column("terms") == loaded.lengths()
    first = torch.arange(targets.shape[1]).expand_as(targets) == 0
    assert (logits.argmax(-1) == targets)[live & first].float().mean() > 0.9, "the sum of one digit is easy"


def test_the_table_of_inputs_has_all_tasks_and_fields() -> None:
    tasks = re.findall(r"^\| `([a-z0-9-]+)` \|", section("Inputs"), re.MULTILINE)
    fields_of_inputs = options_in(section("Inputs").split("| field |")[1])
    assert tasks[: len(BUILT_IN)] == list(BUILT_IN)
    assert fields_of_inputs == {field.name for field in fields(Inputs)}


def test_two_modalities_of_the_page_are_two_groups() -> None:
    (source,) = sources("Inputs")
    namespace: dict[str, Any] = {}
    exec(source, namespace)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picture, self.sound = nn.Linear(192, 3), nn.Linear(40, 3)

        def forward(self, picture: Tensor, sound: Tensor) -> Tensor:
            return self.picture(picture.flatten(1)).tanh() * self.sound(sound)

    class Drawn(Examples):
        class_names = ("a", "b", "c")

        def __len__(self) -> int:
            return 4

        def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(0)
            picture, sound = (torch.randn(4, *shape, generator=generator) for shape in ((3, 8, 8), (40,)))
            return {"picture": picture[list(indices)], "sound": sound[list(indices)]}

        def table(self) -> pa.Table:
            return pa.table({"id": list("abcd"), "label": [0, 1, 2, 0]})

    class Whole(namespace["PictureAndSound"]):  # type: ignore[misc]
        def model(self, cache: Path) -> nn.Module:
            return Sum()

        def examples(self, cache: Path) -> Examples:
            return Drawn()

    task = Whole()
    spec = ModelSpec("page:Whole", {}, Path("unused"), ("*",), (), "cpu")
    loaded = LoadedModel(spec, task, Sum(), Drawn(), torch.device("cpu"))
    loaded.check_inputs([0, 1, 2])
    inputs = loaded.inputs(loaded.batch([0, 1]), 2)
    assert inputs.group_of is not None
    assert torch.bincount(inputs.group_of).tolist() == [192, 40]
