"""A worker of several processes, each with a part of the model: the results are those of one process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import ray
import torch
from defective_tasks import SoundTask
from end_to_end.run_contents import differences
from npeff.execution.create import make_executor
from npeff.execution.executor import Executor, WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.execution.team import current_team
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table
from npeff.tasks import TaskError
from safetensors.torch import load_file
from torch import Tensor, nn

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # every start of an actor imports torch
N, PROCESSES = 23, 2


class BlocksTask(SoundTask):
    """A network with blocks. In the other processes, it has other values, which do not matter."""

    def __init__(self) -> None:
        super().__init__(N)

    def model(self, cache: Path) -> nn.Module:
        torch.manual_seed(0)
        return Blocks()

    def skeleton(self, cache: Path) -> nn.Module:
        with torch.device("meta"):
            return Blocks()


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(2))
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        result: Tensor = self.last(x)
        return result


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Executor]:
    resources: dict[str, Any] = {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0.0, "timeout_s": 120.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the actors import the task
        with make_executor("ray", address="local", devices_per_model=PROCESSES, **resources) as executor:
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
            yield executor


def config_of(path: Path, processes: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(path),
            "task": {"name": "end_to_end.test_devices_per_model:BlocksTask"},
            "fishers": {
                "sketch": {"kind": "tensorsketch", "dim": 64},
                "labels": "exact",
                "shard_size": 8,
                "batch_size": 3,
                "store_dtype": "float32",
                "diagonal": {"mean": True, "groups": True},
            },
            "factorization": {"n_components": 3, "held_out_fraction": 0.4, "max_iterations": 20},
            "verification": {"top_examples": 3, "baseline_examples": 6},
            "executor": {"devices_per_model": processes},
        }
    )


def completed(path: Path, processes: int, executor: Executor) -> RunDirectory:
    run = RunDirectory.create(config_of(path, processes))
    with run.lock():  # as `npeff.run` does, whose workers are those of all stages
        for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift, npeff.verify):
            stage(run, executor=executor)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, two_processes: Executor) -> tuple[RunDirectory, RunDirectory]:
    folder = tmp_path_factory.mktemp("divided")
    whole = completed(folder / "whole", 1, SerialExecutor())
    return whole, completed(folder / "divided", PROCESSES, two_processes)


def test_fishers_are_bit_for_bit_those_of_one_process(runs: tuple[RunDirectory, RunDirectory]) -> None:
    stores = [FisherStore.open(run.fishers) for run in runs]
    names = stores[0].array_names
    assert {"factors", "grams", "grouped_diagonal"} <= set(names)
    for shard in range(stores[0].plan.n_shards):
        first, second = (store.read_shard(shard, names=names) for store in stores)
        assert all(np.array_equal(first[name], second[name]) for name in names)
    means = [load_file(run.diagonal_fisher) for run in runs]
    assert all(torch.allclose(means[0][name], means[1][name], rtol=1e-6, atol=0) for name in means[0])


def test_directions_and_tables_are_those_of_one_process(runs: tuple[RunDirectory, RunDirectory]) -> None:
    assert differences(*(run.path for run in runs)) == []
    first, second = (read_table(run.table("verification"), "verification") for run in runs)
    assert first.equals(second)


class Ends:
    """A worker whose last process ends at the first attempt."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def square(self, item: int) -> int:
        team = current_team()
        assert team is not None
        if team.rank == team.size - 1 and not (self._scratch / "ended").exists():
            (self._scratch / "ended").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item + int(team.total(torch.tensor([team.rank]))[0])

    def fail_in_the_last_process(self, item: int) -> int:
        team = current_team()
        assert team is not None
        if team.rank == team.size - 1 and not (self._scratch / f"failed {item}").exists():
            (self._scratch / f"failed {item}").touch()
            raise TaskError("the last process cannot read its examples")
        return int(team.total(torch.tensor([item]))[0])


def test_a_lost_process_is_replaced_with_its_worker(tmp_path: Path, two_processes: Executor) -> None:
    spec = WorkerSpec(Ends, {"scratch": tmp_path})
    rest = sum(range(PROCESSES))
    assert dict(two_processes.map(spec, "square", [3, 4])) == {3: 9 + rest, 4: 16 + rest}
    assert (tmp_path / "ended").exists()


def test_the_error_of_any_process_is_told(tmp_path: Path, two_processes: Executor) -> None:
    spec = WorkerSpec(Ends, {"scratch": tmp_path})
    with pytest.raises(TaskError, match="the last process cannot read"):
        list(two_processes.map(spec, "fail_in_the_last_process", [1]))
    assert list(two_processes.map(spec, "fail_in_the_last_process", [2], keep_going=True)) == [(2, 2 * PROCESSES)]


def test_one_process_cannot_be_several(tmp_path: Path) -> None:
    document = config_of(tmp_path, 2).model_dump(mode="json")
    with pytest.raises(ValueError, match="devices_per_model: 1 or kind: auto"):
        RunConfig.model_validate(document | {"executor": {"kind": "serial", "devices_per_model": 2}})
    with pytest.raises(ValueError, match="cannot share a GPU: set gpus_per_worker: 1"):
        RunConfig.model_validate(document | {"executor": {"gpus_per_worker": 0.5, "devices_per_model": 2}})
