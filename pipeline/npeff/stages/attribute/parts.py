"""The parts of the stage `attribute` that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part, unit_parts
from npeff.stages.attribute import ATTRIBUTE


def attribute_parts(run: RunDirectory) -> Iterator[Part]:
    return unit_parts(run, ATTRIBUTE, "shares")
