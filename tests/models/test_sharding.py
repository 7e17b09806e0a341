"""A model that is divided among processes is the same model: its rows are bit for bit those of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from execution.forked_team import in_team
from npeff.execution.team import Team
from npeff.fisher import FisherBatch, PerExampleFishers
from npeff.gradients import LabelSpec, UnsupportedModelError, in_memory, model_fingerprint, select_parameters
from npeff.models.sharding import Shards, divide
from npeff.sketches import SketchSpec, make_sketch
from npeff.verification import moved
from torch import Tensor, nn

pytestmark = pytest.mark.process

CPU = torch.device("cpu")
N, FEATURES, CLASSES = 6, 5, 3
LABELS = LabelSpec("exact")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x)).tanh()


class Network(nn.Module):
    """Blocks in a list, a tied weight, a parameter of the model itself, a module with the general rule, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)
        self.again = nn.Linear(FEATURES, FEATURES)
        self.again.weight = self.first.weight
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.general = nn.PReLU(FEATURES)
        self.register_buffer("shift", torch.randn(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(x)) * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        return self.last(self.general(x))


class UsesWeight(nn.Module):
    """A model that uses the weight of a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.last = nn.Embedding(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x @ self.positions.weight).tanh())


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def inputs() -> Tensor:
    return torch.randn(N, FEATURES, generator=torch.Generator().manual_seed(1))


def fishers(
    model: nn.Module, shards: Shards | None = None, examples: slice = slice(None), exclude: tuple[str, ...] = ()
) -> FisherBatch:
    def logits(model: nn.Module, batch: Any) -> Tensor:
        try:
            result: Tensor = model(batch)
        except RuntimeError as error:
            if shards is None or not shards.keep_uncalled(error):
                raise
            result = model(batch)
        return result

    layout = select_parameters(model, ["*"], exclude)
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    return PerExampleFishers(model, logits, layout, sketch, LABELS, lambda i: (inputs()[i : i + 1], None))(
        inputs()[examples]
    )


def equal(found: FisherBatch, expected: FisherBatch) -> bool:
    names = ("unit_factors_BRD", "grams_BRR", "frobenius_norms_B", "logits")
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in names)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [Network, UsesWeight])
def test_fishers_are_bit_for_bit_those_of_the_whole_model(kind: type[nn.Module], size: int) -> None:
    def work(team: Team) -> tuple[bool, bool]:
        whole, model = made(kind), made(kind)
        if team.rank > 0:
            with torch.no_grad():
                for value in (*model.parameters(), *model.buffers()):
                    value.fill_(torch.nan)  # the values are those of the first process
        shards = divide(model, team, CPU)
        own = slice(team.rank % 3, team.rank % 3 + 2)  # another batch in each process
        different = equal(fishers(model, shards, own), fishers(whole, None, own))
        alone = team.rank > 0 or equal(fishers(model, shards), fishers(whole))  # the first process alone
        return different, alone

    assert in_team(size, work) == [(True, True)] * size


def test_a_process_keeps_its_shards_and_one_unit() -> None:
    """Except for rows of a module that contains others: they are computed with all its parameters in memory."""

    def work(team: Team) -> tuple[int, int, int, int]:
        model = made(Network)
        shards = divide(model, team, CPU)
        sizes = [unit.flat.nbytes if unit.is_present else 0 for unit in shards.units]
        before = sum(sizes)
        most, fetch = [0], shards._fetch

        def counted(unit: Any) -> None:
            fetch(unit)
            most[0] = max(most[0], sum(each.content.nbytes for each in shards.units if each.is_present))

        shards._fetch = counted  # type: ignore[method-assign]
        fishers(model, shards, exclude=("scale",))
        largest = max(unit.n_entries * 4 for unit in shards.units)
        return before, most[0], largest, sum(len(unit.shard) for unit in shards.units)

    whole = sum(value.nbytes for value in made(Network).parameters())
    for before, most, largest, kept in in_team(2, work):
        assert before == 0  # nothing is in memory before the first pass
        assert most <= 2 * largest  # one module, and the small unit of the model itself
        assert whole / 2 <= kept <= whole / 2 + 64 * 2 * 20  # parameters are aligned to 64 bytes


def test_a_step_moves_all_processes_and_is_undone_bit_for_bit() -> None:
    def work(team: Team) -> tuple[bool, bool, bool]:
        whole, model = made(Network), made(Network)
        divide(model, team, CPU)
        layout = select_parameters(whole)
        direction = {name: torch.full(shape, 0.25) for name, shape in zip(layout.names, layout.shapes, strict=True)}
        before, moves = model_fingerprint(whole, layout), []
        if team.rank == 0:
            with moved(model, direction, 0.5):
                moves.append(model(inputs()))
            with moved(whole, direction, 0.5):
                moves.append(whole(inputs()))
        team.serve()
        after = model_fingerprint(model, layout) == before
        team.serve()
        held = []
        with in_memory([model.get_parameter("last.weight")]):
            held.append(torch.equal(model.get_parameter("last.weight"), whole.get_parameter("last.weight")))
        return not moves or torch.equal(*moves), after, all(held)

    assert in_team(2, work) == [(True, True, True)] * 2


def test_a_changed_unit_is_that_of_the_other_processes() -> None:
    def work(team: Team) -> list[float]:
        model = made(Network)
        divide(model, team, CPU)
        scale = model.get_parameter("scale")
        if team.rank == 0:
            with in_memory([scale], changed=True), torch.no_grad():
                scale.mul_(3)
            with in_memory([model.get_parameter("last.weight")]):
                pass  # the changed unit leaves the memory
        team.serve()
        with in_memory([scale]):
            return scale.tolist()

    assert in_team(2, work) == [[3.0] * FEATURES] * 2


class InPlace(nn.Module):
    """A model that overwrites what the backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self._overwritten(x))

    def _overwritten(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        squared = hidden.exp()
        squared.mul_(2)
        return squared


class OverwritesInBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([InPlace()])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks[0](x)
        return result


def test_a_value_that_is_overwritten_after_it_is_saved_is_refused_as_in_a_whole_model() -> None:
    def work(team: Team) -> str:
        model = made(OverwritesInBlock)
        shards = divide(model, team, CPU)
        try:
            fishers(model, shards)
        except UnsupportedModelError as error:
            return str(error)
        return "nothing is refused"

    assert all("modified by an inplace operation" in message for message in in_team(2, work))


def test_other_parameters_and_other_models_are_refused() -> None:
    class Special(nn.Parameter):
        pass

    def work(team: Team) -> tuple[str, str]:
        special, other = made(Network), made(Network)
        special.scale = Special(torch.ones(FEATURES))
        if team.rank == 1:
            other.scale = nn.Parameter(torch.ones(FEATURES + 1))
        messages = []
        for model in (special, other):
            try:
                divide(model, team, CPU)
                messages.append("")
            except UnsupportedModelError as error:
                messages.append(str(error))
        return messages[0], messages[1]

    results = in_team(2, work, timeout_s=5.0)
    assert all("'scale' is a Special of float32, which cannot be divided" in first for first, _ in results)
    assert "different models" in results[1][1]
