"""Inputs that a task gives: what is checked, and the line in which each mistake is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from defective_tasks import Points, SoundTask
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.tasks import Examples, Inputs, TaskError, Token
from torch import Tensor, nn


class InputsTask(SoundTask):
    """Points, whose inputs a test changes."""

    change: Callable[[Inputs], Any] = staticmethod(lambda inputs: inputs)

    def inputs(self, model: nn.Module, batch: Any) -> Any:
        inputs = super().inputs(model, batch)
        assert inputs is not None
        return self.change(inputs)


class Numbered(Points):
    """Points in which each entry is a token; `n_tokens` are named."""

    n_tokens = 5

    def tokens(self, indices: Any) -> list[list[Token]]:
        return [[Token(str(place)) for place in range(self.n_tokens)] for _ in indices]


class TokensTask(InputsTask):
    def examples(self, cache: Path) -> Examples:
        return Numbered(self._n, self.class_names)


class HalfTask(SoundTask):
    def __init__(self) -> None:
        super().__init__()
        self._model = super().model(Path()).to(torch.float16)

    def model(self, cache: Path) -> nn.Module:
        return self._model

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits: Tensor = model(batch.to(next(model.parameters()).dtype))
        return logits


class NoFloatsTask(SoundTask):
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch["numbers"].float())
        return logits


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "input_tasks", sys.modules[__name__])


def loaded(task: type[SoundTask], change: Callable[[Inputs], Any] | None = None) -> LoadedModel:
    result = ModelSpec(f"input_tasks:{task.__name__}", {}, Path("unused"), ("*",), (), "cpu").load()
    if change is not None:
        result.task.change = change  # type: ignore[attr-defined]
    return result


def test_a_batch_of_numbers_is_the_input() -> None:
    sound = loaded(InputsTask)
    sound.check_inputs([0, 3])
    batch = sound.batch([0, 3])
    inputs = sound.inputs(batch, 2)
    assert torch.equal(inputs.values, batch)
    assert inputs.values.dtype == torch.float32
    assert torch.equal(inputs.logits(inputs.values), sound.logits(sound.model, batch))
    flat = sound.flat_inputs(batch)
    assert flat.values_BPF.shape == (2, 5, 1)
    assert torch.equal(flat.logits(flat.values_BPF), sound.logits(sound.model, batch))


def test_a_task_without_numbers_is_refused() -> None:
    with pytest.raises(TaskError, match="has no floating-point inputs: give the task an `inputs` method that returns"):
        loaded(NoFloatsTask).inputs({"numbers": torch.ones(2, 5, dtype=torch.int64)})


def flags(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool)


DEFECTS: dict[str, tuple[Callable[[Inputs], Any], str]] = {
    "other class": (lambda inputs: inputs.values, "inputs() must return npeff.tasks.Inputs, not Tensor"),
    "numbers": (lambda inputs: replace(inputs, values=[1.0]), "values as a floating-point tensor, not list"),
    "ids": (
        lambda inputs: replace(inputs, values=inputs.values.long()),
        "values as a floating-point tensor, not torch.int64",
    ),
    "batch": (
        lambda inputs: replace(inputs, values=inputs.values.T),
        "first axis is the examples, here 2, and not of shape (5, 2)",
    ),
    "no features": (
        lambda inputs: replace(inputs, values=inputs.values[:, 0]),
        "first axis is the examples, here 2, and not of shape (2,)",
    ),
    "no function": (lambda inputs: replace(inputs, logits=None), "logits as a function of the values, not NoneType"),
    "axis 0": (lambda inputs: replace(inputs, positions=(0,)), "different axes of the values from 1 to 1, not (0,)"),
    "no axis": (lambda inputs: replace(inputs, positions=(2,)), "different axes of the values from 1 to 1, not (2,)"),
    "last axis": (lambda inputs: replace(inputs, positions=(-1,)), "from 1 to 1, not (-1,): axis 0 is the examples"),
    "twice": (lambda inputs: replace(inputs, positions=(1, 1)), "different axes of the values from 1 to 1, not (1, 1)"),
    "exchangeable": (lambda inputs: replace(inputs, exchangeable=1), "exchangeable as True or False, not 1"),
    "mask of numbers": (
        lambda inputs: replace(inputs, mask=torch.ones(2, 5)),
        "must return mask as a tensor of bool, not torch.float32",
    ),
    "mask of other shape": (
        lambda inputs: replace(inputs, mask=flags(1, 5)),
        "must return mask as (examples, positions) (2, 5), not (1, 5)",
    ),
    "present of other shape": (
        lambda inputs: replace(inputs, present=flags(2, 4)),
        "must return present as (examples, positions) (2, 5), not (2, 4)",
    ),
    "padding in use": (
        lambda inputs: replace(inputs, mask=flags(2, 5), present=~flags(2, 5)),
        "must return a mask that is False wherever present is False",
    ),
    "names": (lambda inputs: replace(inputs, names=["a"] * 4), "one name for each of the 5 positions, not 4"),
    "one name": (lambda inputs: replace(inputs, names="abcde"), "must return names as a list of strings, not 'abcde'"),
    "groups": (lambda inputs: replace(inputs, groups=[1]), "must return groups as a list of strings, not [1]"),
    "equal groups": (lambda inputs: replace(inputs, groups=["a", "a"]), "groups with different names, not ['a', 'a']"),
    "groups of nothing": (
        lambda inputs: replace(inputs, groups=["a"]),
        "must return group_of, the number of the group",
    ),
    "group_of list": (
        lambda inputs: replace(inputs, groups=["a"], group_of=[0] * 5),
        "group_of as a tensor of int64, not list",
    ),
    "group_of of other shape": (
        lambda inputs: replace(inputs, groups=["a"], group_of=torch.zeros(2, dtype=torch.int64)),
        "group_of as (positions,) (5,) or (examples, positions) (2, 5), not (2,)",
    ),
    "no such group": (
        lambda inputs: replace(inputs, groups=["a", "b"], group_of=torch.tensor([-1, 0, 1, 2, 0])),
        "group numbers from 0 to 1, the number of its groups less one, or -1 for no group, not -1 to 2",
    ),
    "logits of other values": (
        lambda inputs: replace(inputs, logits=lambda values: inputs.logits(1.01 * values)),
        "the logits of inputs() differ from those of logits() by 0.0",
    ),
    "logits that are NaN": (
        lambda inputs: replace(inputs, logits=lambda values: inputs.logits(values) * torch.nan),
        "the logits of inputs() differ from those of logits() by nan",
    ),
    "logits of other shape": (
        lambda inputs: replace(inputs, logits=lambda values: inputs.logits(values)[:1]),
        "the logits of inputs() have the shape (1, 3), not (2, 3) as those of logits()",
    ),
    "constant logits": (
        lambda inputs: replace(inputs, logits=lambda values: inputs.logits(values.detach()).detach()),
        "the logits of inputs() do not depend on the values by differentiable operations",
    ),
    "no tensor": (
        lambda inputs: replace(inputs, logits=lambda values: {"logits": inputs.logits(values)}),
        "inputs().logits() must return a tensor, not dict",
    ),
    "exception": (
        lambda inputs: replace(inputs, logits=lambda values: values @ torch.ones(4)),
        "inputs().logits() raised RuntimeError",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_mistake_is_one_line(name: str) -> None:
    change, said = DEFECTS[name]
    with pytest.raises(TaskError) as caught:
        loaded(InputsTask, change).check_inputs([0, 1])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "input_tasks:InputsTask" in str(caught.value)


def test_rounding_and_excluded_classes_are_no_mistakes() -> None:
    loaded(
        InputsTask, lambda inputs: replace(inputs, logits=lambda values: inputs.logits(values * (1 + 1e-6)))
    ).check_inputs([0])

    def excluded(values: Tensor, sound: LoadedModel) -> Tensor:
        return sound.model(values) + torch.tensor([0.0, 0.0, -torch.inf])

    sound = loaded(InputsTask)
    sound.task.logits = lambda model, batch: excluded(batch, sound)  # type: ignore[method-assign]
    sound.check_inputs([0, 1])


def test_positions_of_exchangeable_inputs_are_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(TokensTask, lambda inputs: replace(inputs, exchangeable=True)).check_inputs([0])
    present = torch.tensor([[True, True, False, True, True]])
    with pytest.raises(TaskError, match=r"one position for each token, .*: example 3 has 5 tokens, and 4 positions"):
        loaded(TokensTask, lambda inputs: replace(inputs, exchangeable=True, present=present)).check_inputs([3])
    monkeypatch.setattr(Numbered, "n_tokens", 4)
    loaded(TokensTask, lambda inputs: replace(inputs, exchangeable=True, present=present)).check_inputs([3])
    loaded(TokensTask).check_inputs([3])  # positions that are not tokens have names


def test_half_precision_becomes_single_precision() -> None:
    half = loaded(HalfTask)
    batch = half.batch([0, 1]).to(torch.float16)
    inputs = half.inputs(batch, 2)
    assert inputs.values.dtype == torch.float32
    values = inputs.values.requires_grad_()
    found = inputs.logits(values)
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert found.dtype == gradient.dtype == torch.float32
    exact: Any = half.model.double()
    expected = exact(batch.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert half.single_precision_model is half.single_precision_model
    double = loaded(InputsTask)
    assert double.single_precision_model is double.model


def test_tied_weights_stay_tied_in_single_precision() -> None:
    half = loaded(HalfTask)
    half.model.append(nn.Linear(5, 8).half())  # type: ignore[operator]
    half.model[-1].weight = half.model[0].weight  # type: ignore[index]
    copied: Any = half.single_precision_model
    assert copied[-1].weight is copied[0].weight
    assert copied[0].weight.dtype == torch.float32
