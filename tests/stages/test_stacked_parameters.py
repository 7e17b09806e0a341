"""Fishers of a version that sketched the weights of experts in another way are not mixed with those of this one."""

from __future__ import annotations

import pytest
from npeff.gradients import ParameterLayout
from npeff.runs.errors import RunDirectoryError
from npeff.stages.earlier_results import sketch_of

LAYOUT = ParameterLayout(("mlp.experts.up_proj", "mlp.gate.weight"), ((3, 2, 4), (3, 4)), ("mlp.experts.up_proj",))


def attributes(layout: ParameterLayout, kind: str = "tensorsketch") -> dict[str, object]:
    return {"parameter_layout": layout.to_json(), "sketch": {"kind": kind, "dim": 16, "size": None, "seed": 0}}


def test_a_sketch_that_reshapes_otherwise_is_refused_in_one_line() -> None:
    assert sketch_of(attributes(LAYOUT), LAYOUT).dim == 16
    former = ParameterLayout(LAYOUT.names, LAYOUT.shapes)
    for stored, mine in ((former, LAYOUT), (LAYOUT, former)):
        with pytest.raises(RunDirectoryError, match=r"'mlp\.experts\.up_proj' differs: compute them again") as refused:
            sketch_of(attributes(stored), mine)
        assert "\n" not in str(refused.value)
    assert sketch_of(attributes(former, "identity"), LAYOUT).dim == 36
