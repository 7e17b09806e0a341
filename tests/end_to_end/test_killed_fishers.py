"""The Fishers' stage, killed at random moments and started again each time, stores what an undisturbed one stores.

Each attempt is a process forked from one that has imported everything and computed nothing, so that it starts at once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from end_to_end import run_contents
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.fishers.stage import compute_fishers
from npeff.tasks import Examples, Task
from torch import Tensor, nn

pytestmark = pytest.mark.process

N_EXAMPLES, SHARD_SIZE = 128, 8
N_SHARDS = N_EXAMPLES // SHARD_SIZE
PAD = 0


class _Sequences(Examples):
    """Sequences of 1 to 12 numbers; batches are of those of like length, padded."""

    class_names = ("a", "b", "c")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(1, 13, (N_EXAMPLES,), generator=generator).tolist()
        self._sequences = [torch.randint(1, 20, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self._sequences)

    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self._sequences]

    def batch(self, indices: Sequence[int]) -> Tensor:
        chosen = [self._sequences[index] for index in indices]
        return nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=PAD)

    def table(self) -> pa.Table:
        labels = [int(sequence.sum()) % 3 for sequence in self._sequences]
        return pa.table({"id": [f"sequence-{i}" for i in range(len(self))], "label": labels})


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.out = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        used_BT1 = (tokens_BT != PAD)[:, :, None]
        mean = (self.hidden(self.embedding(tokens_BT)).tanh() * used_BT1).sum(1) / used_BT1.sum(1)
        logits: Tensor = self.out(mean)
        return logits


class SequencesTask(Task):
    """Named in run files as ``end_to_end.test_killed_fishers:SequencesTask``."""

    def model(self, cache: Path) -> nn.Module:
        torch.manual_seed(0)
        return _Classifier()

    def examples(self, cache: Path) -> Examples:
        return _Sequences()

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits: Tensor = model(batch)
        return logits


def run_directory(path: Path) -> RunDirectory:
    return RunDirectory.create(
        RunConfig.model_validate(
            {
                "run_dir": str(path),
                "task": {"name": "end_to_end.test_killed_fishers:SequencesTask"},
                "fishers": {
                    "labels": "sampled",
                    "rank": 2,
                    "sketch": {"kind": "tensorsketch", "dim": 256},
                    "shard_size": SHARD_SIZE,
                    "batch_size": 3,
                },
                "factorization": {"n_components": 2},
                "executor": {"kind": "serial"},
            }
        )
    )


Start = Callable[[RunDirectory], ForkServerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the stage on a run, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["npeff.stages.pipeline", "npeff.stages.fishers.stage", "npeff.tasks.digits", "pytest"]
    )
    started: list[ForkServerProcess] = []

    def begin(target: Callable[..., object], *arguments: object) -> ForkServerProcess:
        started.append(context.Process(target=target, args=arguments))
        started[-1].start()
        return started[-1]

    begin(int).join()  # the process to fork from is there, and has imported everything
    yield lambda run: begin(compute_fishers, run)
    for process in started:
        process.kill()
        process.join()


def stored_bytes(run: RunDirectory) -> dict[str, bytes]:
    """Every file of the store that is not the litter of a killed writer, by its name."""
    files = (path for path in run.fishers.rglob("*") if path.is_file() and not path.name.endswith(".partial"))
    return {str(path.relative_to(run.fishers)): path.read_bytes() for path in files}


@pytest.mark.parametrize("n_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_stage_killed_at_random_moments_stores_the_same_bytes(n_kills: int, start: Start, tmp_path: Path) -> None:
    reference, began = run_directory(tmp_path / "reference"), time.monotonic()
    process = start(reference)
    process.join()
    assert process.exitcode == 0
    whole_s = time.monotonic() - began

    moments, numbers = random.Random(0), itertools.count()
    kills, finished = 0, 0
    between: list[int] = []  # of these kills, those between two shards of one attempt: how many shards were recorded
    run = run_directory(tmp_path / f"run-{next(numbers)}")
    while kills < n_kills or len(between) < n_kills // 4:
        before = run_contents.units_done(run.path, "fishers")
        process = start(run)
        process.join(timeout=moments.uniform(0, 0.8 * whole_s))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        after = run_contents.units_done(run.path, "fishers")
        assert before.items() <= after.items(), "finished shards are there, and were not written again"
        if process.exitcode == 0:
            assert_same(run, reference)
            finished += 1
            run = run_directory(tmp_path / f"run-{next(numbers)}")
            continue
        kills += 1
        if len(before) < len(after) < N_SHARDS:
            between.append(len(after))
    process = start(run)
    process.join()
    assert process.exitcode == 0
    assert_same(run, reference)
    print(
        f"{kills} kills in {finished + 1} runs of {whole_s:.1f} s; {len(between)} of them between two shards of one "
        f"attempt, with {', '.join(map(str, between))} of {N_SHARDS} recorded"
    )


def assert_same(run: RunDirectory, reference: RunDirectory) -> None:
    assert run_contents.differences(run.path, reference.path, ["fishers"]) == []
    stored, expected = stored_bytes(run), stored_bytes(reference)
    assert stored.keys() == expected.keys()
    assert [name for name in expected if stored[name] != expected[name]] == []
