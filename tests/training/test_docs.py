"""docs/training.md: its code runs, and its options are those that there are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from npeff.training import EWC, FAdam, FunctionalInformation
from tiny_runs import prepared
from tiny_task import TinyTask
from torch import Tensor, nn

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
SOURCES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def source_with(text: str) -> str:
    (source,) = (each for each in SOURCES if text in each)
    return source


class Rows:
    """Gradient rows of a weight. Those of the bias are zero."""

    shapes: ClassVar = {"weight": (3, 4), "bias": (3,)}

    def __init__(self, rows_n34: Tensor) -> None:
        self._rows_nx = rows_n34.flatten(1).double()

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self._rows_nx @ direction["weight"].flatten().double()

    def weighted_sum(self, weights_n: Tensor) -> dict[str, Tensor]:
        return {"weight": (weights_n @ self._rows_nx).reshape(3, 4), "bias": torch.zeros(3)}


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = prepared(tmp_path / "runs" / "digits-diagonals")
    task = TinyTask()
    model = task.model(tmp_path)
    batches = [(task.batch(range(6)), torch.arange(6) % 3)] * 3
    names: dict[str, Any] = {"model": model, "batches": batches, "torch": torch, "fisher": {"weight": torch.ones(3, 4)}}
    names["rows"] = {"weight": torch.ones(5, 3, 4)}
    before = model(batches[0][0]).detach()
    for source in SOURCES[:6]:
        exec(source, names)
        if "low_rank" in source and "runs/" in source:
            assert names["penalty"].item() > 0  # the training has left the parameters of the run
    assert not torch.equal(model(batches[0][0]), before)
    assert isinstance(names["optimizer"], FAdam)
    assert names["penalty"].item() == 0
    before = model(batches[0][0]).detach()
    exec(source_with("npeff.natural_gradient"), names)
    assert not torch.equal(model(batches[0][0]), before)
    rows_n34, diagonal = (
        torch.randn(7, 3, 4),
        {name: torch.ones_like(value) for name, value in names["direction"].items()},
    )
    names |= {"rows": Rows(rows_n34), "sketched": rows_n34.flatten(1)[:, :9], "diagonal": diagonal}
    exec(source_with("DiagonalPreconditioner"), names)
    assert names["direction"].keys() == diagonal.keys()
    assert run.path == tmp_path / "runs" / "digits-diagonals"


class ImageAndColour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.colour = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, image: Tensor, colour: Tensor) -> Tensor:
        return self.image(image).tanh() + self.colour(colour)


def test_the_code_about_modalities_raises_the_share_of_the_image() -> None:
    (source,) = (each for each in SOURCES if "FunctionalInformation" in each)
    torch.manual_seed(0)
    model = ImageAndColour()
    inputs = {"image": torch.randn(30, 4), "colour": torch.randn(30, 2)}
    batches = [(inputs, torch.arange(30) % 3)] * 40
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names: dict[str, Any] = {"model": model, "batches": batches, "torch": torch, "optimizer": optimizer}
    made = FunctionalInformation(["image", "colour"], samples=50)

    def share() -> float:
        with torch.no_grad():
            found = made(lambda given: model(given["image"], given["colour"]), inputs)
        return (found[0] / found.sum()).item()

    before = share()
    exec(source, names)
    assert share() > before + 0.1


@pytest.mark.parametrize("described", [FAdam, FunctionalInformation])
def test_the_table_has_every_option_with_its_default(described: type) -> None:
    (table,) = re.findall(rf"^\| option of `{described.__name__}` .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)?) \| ([^|]*) \|", table, re.MULTILINE)
    said: dict[str, str] = {}
    for names, defaults in rows:
        options = re.findall(r"`(\w+)`", names)
        said |= dict(zip(options, defaults.split(", ") if len(options) > 1 else [defaults], strict=True))
    parameters = inspect.signature(described).parameters.items()
    expected = {name: option.default for name, option in parameters if name not in ("params", "modalities")}
    assert list(said) == list(expected)
    for name, text in said.items():
        value = expected[name]
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert text.strip("`") == shown or float(text) == value, name


class Regression(nn.Module):
    """A model as the Trainer wants it: it takes names and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, inputs: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
        found = self.linear(inputs)[:, 0]
        return {"loss": (found - labels).square().mean(), "logits": found}


FISHER, ANCHOR = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, -1.0]])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["EWCTrainer", "EWCCallback"])
def test_the_trainers_of_the_page_add_the_penalty_once(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Regression()
    examples = [{"inputs": torch.tensor([1.0, i]), "labels": torch.tensor(2.0 * i)} for i in range(8)]
    ewc = EWC([{"linear.weight": FISHER}], [{"linear.weight": ANCHOR}], weight=2)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1, use_cpu=True,
        report_to=[], disable_tqdm=True, max_grad_norm=0.0, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    names = {"model": model, "arguments": arguments, "examples": examples, "ewc": ewc, "FAdam": FAdam}
    names["Trainer"] = transformers.Trainer
    source = source_with(f"class {form}")
    definition, first, training = source.partition("optimizer = " if form == "EWCTrainer" else "trainer = ")
    exec(definition, names)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)  # shows the gradient
    options = {"train_dataset": examples, "optimizers": (optimizer, None)}
    if form == "EWCTrainer":
        trainer = names[form](model, arguments, ewc=ewc, **options)
    else:
        trainer = transformers.Trainer(model, arguments, callbacks=[names[form](ewc)], **options)
        trainer.model_accepts_loss_kwargs = False  # the model would have to average accumulated batches itself
    expected = nn.Parameter(torch.zeros(1, 2))
    inputs, labels = (torch.stack([example[key] for example in examples]) for key in ("inputs", "labels"))
    loss = ((inputs @ expected.T)[:, 0] - labels).square().mean()
    loss = loss + (FISHER * (expected - ANCHOR).square()).sum()
    loss.backward()
    trainer.train()
    assert expected.grad is not None
    torch.testing.assert_close(model.linear.weight.detach(), -0.25 * expected.grad)
    exec(first + training, names)
