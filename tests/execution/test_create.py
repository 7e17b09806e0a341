"""Which executor a run gets."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import dask.system
import pytest
import torch
from npeff.execution import create
from npeff.execution.create import available_cores, make_executor
from npeff.execution.executor import ExecutorError
from npeff.execution.serial import SerialExecutor

DEFAULTS: dict[str, Any] = {
    "address": "local",
    "workers": 1,
    "cpus_per_worker": "auto",
    "gpus_per_worker": 0.0,
    "devices_per_model": 1,
    "timeout_s": 1.0,
}
CORES = 7


class StubRay:
    """What was asked of Ray, which is not started."""

    def __init__(self, address: str, **asked: Any) -> None:
        self.asked = {"address": address, **asked}

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    stub: Any = ModuleType("npeff.execution.ray.executor")
    stub.RayExecutor = StubRay
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(create, "available_cores", lambda: CORES)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


def threads_of(kind: str, **asked: Any) -> int | None:
    """Threads that a worker computes with in this process; None where Ray is asked for."""
    with make_executor(kind, **DEFAULTS | asked) as executor:
        if isinstance(executor, StubRay):
            return None
        assert isinstance(executor, SerialExecutor)
        return executor._threads


def test_one_worker_without_a_gpu_runs_here_on_all_cores() -> None:
    assert threads_of("auto") == CORES
    assert threads_of("auto", cpus_per_worker=3) == 3


@pytest.mark.parametrize(
    "asked",
    [
        {"workers": 2},
        {"devices_per_model": 2},
        {"gpus_per_worker": 0.5},
        {"address": "auto"},
        {"address": "10.0.0.1:6379"},
    ],
)
def test_what_needs_ray_gets_it(asked: dict[str, Any]) -> None:
    assert threads_of("auto", **asked) is None


def test_a_ray_job_uses_its_cluster_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert threads_of("auto") is None
    assert threads_of("serial") == 1


def test_the_other_kinds_are_taken_at_their_word() -> None:
    assert threads_of("ray") is None
    assert threads_of("serial") == 1
    assert threads_of("serial", cpus_per_worker=2) == 2


@pytest.mark.parametrize(("asked", "cpus"), [("auto", 1), (4, 4)])
def test_an_actor_has_one_core_unless_told_otherwise(asked: object, cpus: int) -> None:
    with make_executor("auto", **DEFAULTS | {"workers": 2, "cpus_per_worker": asked}) as executor:
        assert executor.asked == {  # type: ignore[attr-defined]
            "address": "local",
            "workers": 2,
            "cpus_per_worker": cpus,
            "gpus_per_worker": 0.0,
            "devices_per_model": 1,
            "timeout_s": 1.0,
        }


@pytest.mark.parametrize(("threads", "limit", "cores"), [(1, 8, 1), (3, 8, 3), (3, 2, 2)])
def test_the_cores_are_torchs_threads_within_the_limit_of_the_control_group(
    threads: int, limit: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(dask.system, "cpu_count", lambda: limit)
    torch.set_num_threads(threads)
    try:
        assert available_cores() == cores
    finally:
        torch.set_num_threads(before)


def test_the_serial_kind_has_no_address() -> None:
    with pytest.raises(ExecutorError, match="runs in this process, and not at the address 'auto': remove the address"):
        make_executor("serial", **DEFAULTS | {"address": "auto"})
