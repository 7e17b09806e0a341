"""The parts of the stage `scale` that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part, unit_parts
from npeff.stages.scale import SCALE


def scale_parts(run: RunDirectory) -> Iterator[Part]:
    return unit_parts(run, SCALE, "paths", "block")
