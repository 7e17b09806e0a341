"""The processes of a worker: contents are fetched and stored, however much each process has to do."""

from __future__ import annotations

import pytest
import torch
from execution.forked_team import in_team
from npeff.execution.executor import WorkerLostError
from npeff.execution.team import Team
from torch import Tensor

pytestmark = pytest.mark.process

N_CONTENTS, LENGTH = 4, 6


def content(number: int) -> Tensor:
    return torch.arange(LENGTH, dtype=torch.uint8) + 10 * number


def keep(team: Team) -> None:
    own = [content(number).chunk(team.size)[team.rank].clone() for number in range(N_CONTENTS)]
    team.keep(own)


def fetched(team: Team, number: int) -> list[int]:
    values = torch.zeros(LENGTH, dtype=torch.uint8)
    team.fetch(number, values)
    return values.tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_processes_fetch_different_contents_a_different_number_of_times(size: int) -> None:
    def work(team: Team) -> list[tuple[int, list[int]]]:
        keep(team)
        numbers = [(7 * place + team.rank) % N_CONTENTS for place in range(5 * team.rank)]  # the first one only serves
        return [(number, fetched(team, number)) for number in numbers]

    results = in_team(size, work)
    assert [len(found) for found in results] == [5 * rank for rank in range(size)]
    assert all(values == content(number).tolist() for found in results for number, values in found)


def test_a_stored_content_is_that_of_all_processes() -> None:
    def work(team: Team) -> list[int]:
        keep(team)
        if team.rank == 1:
            team.store(2, content(2) + 1)
        team.serve()
        return fetched(team, 2)

    assert in_team(3, work) == [(content(2) + 1).tolist()] * 3


def test_a_process_that_serves_takes_part_in_loading() -> None:
    def work(team: Team) -> tuple[str, list[float], list[float]]:
        found: list[tuple[str, list[float], list[float]]] = []

        def load() -> None:
            text = team.text(f"folder of process {team.rank}" + "." * team.rank)
            values = torch.tensor([0.5, 1.5]) + team.rank
            total = team.total(values).tolist()
            found.append((text, team.broadcast(values).tolist(), total))

        team.when_loading(load)
        if team.rank == 0:
            team.begin_loading()
            load()
        team.serve()
        return found[0]

    assert in_team(3, work) == [("folder of process 0", [0.5, 1.5], [4.5, 7.5])] * 3


def test_the_first_process_receives_the_bytes_of_all() -> None:
    sent = in_team(3, lambda team: team.gather_bytes(b"x" * (2 * team.rank)))
    assert sent == [[b"", b"xx", b"xxxx"], [], []]


def test_a_lost_process_is_an_error_of_the_others() -> None:
    def work(team: Team) -> None:
        if team.rank == 1:
            raise KeyError("this process ends")
        team.serve()

    with pytest.raises((KeyError, WorkerLostError)):
        in_team(2, work, timeout_s=2.0)
