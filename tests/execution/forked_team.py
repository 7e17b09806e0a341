"""The processes of one worker, as forks of this process."""

from __future__ import annotations

import multiprocessing
import sys
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from npeff.execution.team import Team, TeamMember

_FORK = multiprocessing.get_context("fork")


def in_team(size: int, function: Callable[[Team], Any], timeout_s: float = 60.0) -> list[Any]:
    """Return the results of a function in each of the processes of a team. Raises the first error of a process."""
    pipes, processes = [], []
    for rank in range(size):
        here, there = _FORK.Pipe()
        process = _FORK.Process(target=_run, args=(function, rank, size, timeout_s, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        address = pipes[0].recv()
        for pipe in pipes:
            pipe.send(address)
        results = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _run(function: Callable[[Team], Any], rank: int, size: int, timeout_s: float, pipe: Connection) -> None:
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork, and a product would wait for them forever
    # the address of this machine, for which a process group asks Ray
    sys.modules["npeff.execution.ray.placement"] = types.SimpleNamespace(node_address=lambda: "127.0.0.1")  # type: ignore[assignment]
    member = TeamMember(rank, size, "cpu", timeout_s)
    if rank == 0:
        pipe.send(member.open_rendezvous())
    team = member.connect(*pipe.recv())
    try:
        result = function(team)
        team.serve()
        pipe.send(result)
    except Exception as error:
        pipe.send(error)
