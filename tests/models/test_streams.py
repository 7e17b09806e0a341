"""Streams of batches: the same bits in the same order as one batch after the other, or no streams at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gradients.fisher_models import NAMES, Case, call, make, mlp, vectors
from npeff.fisher import FisherBatch, PerExampleFishers
from npeff.gradients import select_parameters
from npeff.models.streams import Streams, n_streams
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn

CPU = torch.device("cpu")
WITH_RULES = {"mlp", "cnn", "tied encoder", "transposed linear"}
"""Cases in which every layer has a rule of its own."""
BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7], [8]]


@dataclass
class Loaded:
    """Of a `LoadedModel`, what streams look at."""

    case: Case
    device: torch.device = CPU
    shards: Any = None

    def batch(self, examples: Sequence[int]) -> Any:
        return self.case.batch(examples)

    def with_targets(self, examples: Sequence[int]) -> tuple[Any, Tensor]:
        return self.batch(examples), torch.zeros(len(examples), dtype=torch.long)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def streams_of(case: Case) -> Streams:
    layout = select_parameters(case.model, ["*"], [])
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    return Streams(Loaded(case), PerExampleFishers(case.model, case.logits_fn, layout, sketch))  # type: ignore[arg-type]


def fishers(streams: Streams, case: Case) -> list[FisherBatch]:
    def compute(which: PerExampleFishers, batch: Any, examples: list[int]) -> FisherBatch:
        return which(batch, examples, torch.zeros(len(examples), dtype=torch.long))

    return list(streams.map(compute, BATCHES))


@pytest.mark.parametrize("name", NAMES)
def test_streams_of_one_thread_each_compute_the_same_bits_as_one_thread(name: str, threads: Any) -> None:
    case = make(name)
    threads(1)
    expected = fishers(streams_of(case), case)
    assert [len(batch.valid_B) for batch in expected] == [3, 2, 3, 1]
    for n in (2, 3):
        threads(n)
        streams = streams_of(case)
        for _ in range(2):
            results = [found.factors_BRD for found in fishers(streams, case)]
            # without rules of its own a model has one stream, on all threads, and they may divide a sum
            tolerance = {"rtol": 0, "atol": 0} if name in WITH_RULES else {}
            torch.testing.assert_close(results, [batch.factors_BRD for batch in expected], **tolerance)
        assert streams._all is not None
        assert len(streams._all) == (n if name in WITH_RULES else 1)
        assert torch.get_num_threads() == n


class CallsAnother(nn.Module):
    """Its function is not copied with it, and calls the module that it was made for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.head = lambda hidden: self.second(hidden)

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.head(self.first(values).tanh())
        return logits


class WritesBuffer(nn.Module):
    """Reads what it has written to its buffer in the same pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 400), nn.Linear(400, 3)
        self.register_buffer("written", torch.zeros(8, 400), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        self.written[: len(values)] = hidden.detach()
        logits: Tensor = self.second(hidden.tanh() * self.written[: len(values)].clone().square())
        return logits


class Branches(nn.Module):
    """An example says itself which of four layers it goes through; behind the last there is a bias of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
        self.common = nn.Embedding(1, 3)

    def forward(self, values: Tensor) -> Tensor:
        chosen = (values[:, 0] * 10).long() % 4
        logits = values.new_zeros(len(values), 3)
        for place in chosen.unique().tolist():
            rows = chosen == place
            logits = logits + rows[:, None] * self.branches[place](values)
            if place == 3:
                logits = logits + rows[:, None] * self.common(torch.zeros(1, dtype=torch.long))
        return logits


class RefusesCopies(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise TypeError("cannot be copied")


@pytest.mark.parametrize("model", [CallsAnother(), RefusesCopies(6, 3)])
def test_a_model_whose_modules_cannot_be_copied_has_one_stream(model: nn.Module, threads: Any) -> None:
    case = vectors(model.double(), 6)
    threads(1)
    expected = fishers(streams_of(case), case)
    threads(2)
    streams = streams_of(case)
    for found, batch in zip(fishers(streams, case), expected, strict=True):
        torch.testing.assert_close(found.factors_BRD, batch.factors_BRD)
    assert streams._all is not None
    assert len(streams._all) == 1


def test_what_a_batch_raises_is_raised_and_the_streams_go_on(threads: Any) -> None:
    threads(2)
    case = vectors(mlp(), 6)
    streams = streams_of(case)

    def compute(_which: PerExampleFishers, _batch: Any, examples: list[int]) -> int:
        if examples == BATCHES[2]:
            raise ValueError("this one")
        return len(examples)

    results = streams.map(compute, BATCHES)
    assert [next(results), next(results)] == [3, 2]
    with pytest.raises(ValueError, match="this one"):
        next(results)
    assert len(fishers(streams, case)) == 4
    assert torch.get_num_threads() == 2


def test_the_model_is_learnt_from_the_first_valid_examples(threads: Any) -> None:
    threads(2)
    case = vectors(mlp(), 6)
    data = case.batch(range(9))
    data[[0, 2, 3]] = torch.nan
    invalid = Case(case.model, call, lambda examples: data[list(examples)], 9)
    streams = streams_of(invalid)
    found = fishers(streams, invalid)
    assert torch.cat([batch.valid_B for batch in found]).tolist() == [i not in (0, 2, 3) for i in range(9)]
    assert streams._all is not None

    data[:] = torch.nan
    streams = streams_of(invalid)
    assert not any(batch.valid_B.any() for batch in fishers(streams, invalid))
    assert streams._all is None


def on(device: torch.device, shards: Any = None) -> Any:
    return SimpleNamespace(device=device, shards=shards)


def test_a_gpu_computes_one_batch_at_a_time(threads: Any) -> None:
    threads(3)
    assert [n_streams(on(device)) for device in (CPU, torch.device("cuda"))] == [3, 1]
    assert n_streams(on(CPU, shards=object())) == 1  # copies of a divided model would not share what is in memory
    threads(16)
    assert n_streams(on(CPU)) == 4


def test_streams_share_no_buffers(threads: Any) -> None:
    case = vectors(WritesBuffer().double(), 6)
    threads(1)
    expected = fishers(streams_of(case), case)
    threads(4)
    streams = streams_of(case)
    for _ in range(20):
        for found, batch in zip(fishers(streams, case), expected, strict=True):
            torch.testing.assert_close(found.factors_BRD, batch.factors_BRD)
    assert streams._all is not None
    assert len(streams._all) == 4
    assert len({id(stream.collector.model.written) for stream in streams._all}) == 4


def test_modules_that_only_some_examples_call_are_learnt_when_they_do(threads: Any) -> None:
    case = vectors(Branches().double(), 6)
    data = case.batch(range(9))
    data[:, 0] = torch.tensor([0, 0, 0, 1, 0, 2, 1, 3, 3]) / 10 + 0.05
    branching = Case(case.model, call, lambda examples: data[list(examples)], 9)
    layout = select_parameters(case.model, ["*"], [])
    threads(1)
    alone = []
    for example in range(9):
        sketch = make_sketch(SketchSpec("identity"), layout, 0)
        fresh = PerExampleFishers(case.model, call, layout, sketch)
        alone.append(fresh(data[[example]], [example], torch.zeros(1, dtype=torch.long)).grams_BRR)
    for n in (1, 2):
        threads(n)
        found = fishers(streams_of(branching), branching)
        torch.testing.assert_close(torch.cat([batch.grams_BRR for batch in found]), torch.cat(alone))
