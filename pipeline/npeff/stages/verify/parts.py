"""The parts of the stage `verify` that `check` verifies."""

from __future__ import annotations

from collections.abc import Iterator

from npeff.runs.directory import RunDirectory
from npeff.runs.part import Part, unit_parts
from npeff.stages.verify import VERIFY


def verify_parts(run: RunDirectory) -> Iterator[Part]:
    return unit_parts(run, VERIFY, "verification")
