"""The parts of the stage `inputs` that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part, unit_parts
from npeff.stages.inputs import INPUTS


def input_parts(run: RunDirectory) -> Iterator[Part]:
    return unit_parts(run, INPUTS, "information", "block of examples")
