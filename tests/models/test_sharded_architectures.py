"""The architectures of docs/models.md, divided among two processes: their Fishers are bit for bit the same."""

from __future__ import annotations

import pytest
import torch
from execution.forked_team import in_team
from npeff.execution.team import Team
from npeff.fisher import FisherBatch, PerExampleFishers
from npeff.gradients import LabelSpec, UnsupportedModelError, model_fingerprint, select_parameters
from npeff.models.sharding import Shards, divide
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

from models.architectures import ARCHITECTURES, Architecture, N
from models.test_architectures import REFUSED, one

pytestmark = pytest.mark.process
TRIED = ("BERT", "DeBERTa", "GPT-2", "Llama", "Mixtral")
"""DeBERTa uses the weight of a module that it never calls, GPT-2 has a tied weight, and Mixtral has experts."""


def fishers(architecture: Architecture, model: nn.Module, shards: Shards | None) -> FisherBatch:
    def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        try:
            return architecture.logits(model, batch)
        except RuntimeError as error:
            if shards is None or not shards.keep_uncalled(error):
                raise
            return architecture.logits(model, batch)

    batch, layout = architecture.inputs(), select_parameters(model)
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    computed = PerExampleFishers(
        model, logits, layout, sketch, LabelSpec("exact"), lambda index: (one(batch, index), None)
    )
    return computed(batch, range(N))


def compared(team: Team, architectures: list[Architecture]) -> dict[str, str]:
    found = {}
    for architecture in architectures:
        whole, model = architecture.build(), architecture.build()
        layout, shards = select_parameters(whole), divide(model, team, torch.device("cpu"))
        try:
            divided = fishers(architecture, model, shards)
            expected = fishers(architecture, whole, None)
            names = ("unit_factors_BRD", "grams_BRR", "logits")
            differ = [name for name in names if not torch.equal(getattr(divided, name), getattr(expected, name))]
            if model_fingerprint(model, layout) != model_fingerprint(whole, layout):
                differ.append("fingerprint")
            found[architecture.name] = ", ".join(differ)
        except UnsupportedModelError as error:
            found[architecture.name] = str(error)
        team.serve()
    return found


def check(architectures: list[Architecture]) -> None:
    for found in in_team(2, lambda team: compared(team, architectures), timeout_s=300.0):
        assert found.keys() == {architecture.name for architecture in architectures}
        for name, difference in found.items():
            assert difference.startswith(REFUSED[name]) if name in REFUSED else difference == "", name


def test_fishers_of_divided_models() -> None:
    check([architecture for architecture in ARCHITECTURES if architecture.name in TRIED])


@pytest.mark.slow
def test_fishers_of_all_other_divided_models() -> None:
    check([architecture for architecture in ARCHITECTURES if architecture.name not in TRIED])
