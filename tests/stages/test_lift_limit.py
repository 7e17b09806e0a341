"""The number of directions within `lift.memory_limit_mb`, and the refusal of a limit below one direction."""

from __future__ import annotations

from typing import Any

import pytest
from npeff.runs.config import RunConfig
from npeff.runs.errors import RunDirectoryError
from npeff.stages.lift.memory import fitting_directions

MIB_OF_NUMBERS = 2**18


def config(limit: int | str, kind: str) -> RunConfig:
    document: dict[str, Any] = {"run_dir": "run", "task": {"name": "digits"}, "lift": {"memory_limit_mb": limit}}
    document["factorization"] = {"n_components": 9, "kind": kind}
    document["fishers"] = {"diagonal": {"groups": True}}
    return RunConfig.model_validate(document)


@pytest.mark.parametrize(
    ("limit", "kind", "fitting"),
    [(1, "fishers", 1), (5, "fishers", 5), (3, "diagonal_groups", 1), (6, "diagonal_groups", 2)],
)
def test_as_many_directions_as_fit_are_lifted_at_once(limit: int, kind: str, fitting: int) -> None:
    assert fitting_directions(config(limit, kind), MIB_OF_NUMBERS) == fitting


@pytest.mark.parametrize(
    ("limit", "kind", "needed"), [(1, "fishers", 2), (2, "diagonal_groups", 4), (5, "diagonal_groups", 6)]
)
def test_a_limit_below_one_direction_is_refused(limit: int, kind: str, needed: int) -> None:
    n_parameters = {2: MIB_OF_NUMBERS + 1, 4: MIB_OF_NUMBERS + 1, 6: 2 * MIB_OF_NUMBERS}[needed]
    with pytest.raises(RunDirectoryError, match=rf"takes {needed} MiB.*set lift\.memory_limit_mb to this or more"):
        fitting_directions(config(limit, kind), n_parameters)


@pytest.mark.parametrize(
    ("directions", "kind", "fitting"), [(2048, "fishers", 2048), (0.4, "fishers", 1), (0.4, "diagonal_groups", 1)]
)
def test_without_a_limit_there_is_room_for_one_direction(directions: float, kind: str, fitting: int) -> None:
    assert fitting_directions(config("auto", kind), int(2048 / directions) * MIB_OF_NUMBERS) == fitting
