"""Fishers of the architectures that people use: their norms are those of the definition, and docs/models.md is true.

The definition is computed in float64, one example and one class at a time, by plain autograd.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import LabelSpec, UnsupportedModelError, select_parameters
from npeff.gradients.experts import stacks
from npeff.gradients.layer_rules import rule_for
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

from models.architectures import ARCHITECTURES, Architecture, N

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
REFUSED = {"Nyströmformer": "the logits of an example depend on the other examples in its batch"}
ONLY_FLOAT32 = ("Mamba",)
"""Architectures that transformers does not compute in float64."""


def one(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value[index : index + 1] for name, value in batch.items()}


def fishers(architecture: Architecture, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Norms of the Fishers of a batch, by the rules."""
    layout = select_parameters(model, ["*"], [])
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    computed = PerExampleFishers(
        model, architecture.logits, layout, sketch, LabelSpec("exact"), lambda index: (one(batch, index), None)
    )
    found = computed(batch, range(N))
    assert found.valid_B.all()
    return found.frobenius_norms_B


def defined(architecture: Architecture, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Norms ‖Jᵀ (diag p − p pᵀ) J‖ of the definition."""
    parameters = list(model.requires_grad_(True).parameters())  # also those that are frozen in training
    norms = []
    for index in range(N):
        logits = architecture.logits(model, one(batch, index))[0]
        rows = []
        for logit in logits:
            found = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]).double())
        jacobian, p = torch.stack(rows), logits.detach().double().softmax(0)
        product = (p.diag() - p[:, None] * p) @ jacobian @ jacobian.T
        norms.append((product @ product).trace().sqrt())
    return torch.stack(norms)


def in_float64(architecture: Architecture) -> nn.Module:
    model = architecture.build()
    if architecture.name in ONLY_FLOAT32:
        return model
    if hasattr(model, "set_experts_implementation") and "num_experts_per_tok" in architecture.options:
        model.set_experts_implementation("eager")  # the other ones do not compute in float64
    return model.double()


def by_the_general_rule(model: nn.Module) -> list[str]:
    """Names of the classes of modules, without a layer rule, that have parameters of their own."""
    names = set()
    for module in model.modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own and rule_for(module, own) is None and stacks(module) is None:
            names.add(type(module).__name__)
    return sorted(names)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_the_norms_are_those_of_the_definition(architecture: Architecture) -> None:
    model, batch = architecture.build(), architecture.inputs()
    if (reason := REFUSED.get(architecture.name)) is not None:
        with pytest.raises(UnsupportedModelError, match=reason):
            fishers(architecture, model, batch)
        return
    exact = in_float64(architecture)
    kind = next(exact.parameters()).dtype
    inputs = {name: value.to(kind) if value.is_floating_point() else value for name, value in batch.items()}
    torch.testing.assert_close(
        fishers(architecture, model, batch), defined(architecture, exact, inputs), rtol=1e-4, atol=0.0
    )


def table() -> list[str]:
    lines = []
    for each in ARCHITECTURES:
        if each.name in REFUSED:
            handled = f"refused: {REFUSED[each.name]}"
        else:
            names = by_the_general_rule(each.build())
            handled = ", ".join(f"`{name}`" for name in names) or "none"
        lines.append(f"| {each.name} | {each.kind} | {handled} |")
    return lines


def test_the_table_of_the_page_is_that_of_the_models() -> None:
    rows = re.findall(r"^\| (?!architecture|---).*\|$", PAGE, re.MULTILINE)
    assert rows == table()
